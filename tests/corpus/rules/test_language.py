"""The language of a document."""

import socket
from typing import Any

import pytest

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.rules import language, language_model
from megatrain.corpus.rules.language import detect, language_step, sample
from megatrain.corpus.rules.rule_choices import LanguageConfig


@pytest.mark.parametrize(
    ("text", "code", "scores"),
    [
        ("今天天气很好，我们去公园玩。", "zh", {"language.probability": 1, "language.traditional": 0}),
        ("在這個網站上，您可以找到關於臺灣的資訊。", "zh", {"language.probability": 1, "language.traditional": 1}),
        ("我喜欢日本动漫《ドラえもん》，从小看到大。", "zh", {"language.probability": 1, "language.traditional": 0}),
        ("用 GPU 训练模型。", "zh", {"language.probability": 15 / 18, "language.traditional": 0}),
        ("今日は天気がいいですね。", "ja", {"language.probability": 1}),
        ("日本国憲法 第九条 戦争放棄", "ja", {"language.probability": 1}),
        ("「你好」は中国語の挨拶の一つです。", "ja", {"language.probability": 1}),
        ("한국어 문장입니다", "ko", {"language.probability": 1}),
        ("καλημέρα κόσμε", "el", {"language.probability": 1}),
        ("", "", {"language.probability": 0}),
        ("12 345 — \U0001f600 \U000f0000", "", {"language.probability": 0}),
    ],
)
def test_a_script_tells_the_language(text: str, code: str, scores: dict[str, float]) -> None:
    assert detect(text) == (code, {name: round(value, 4) for name, value in scores.items()})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Hello, how are you doing today,\nmy friend?", "en"),
        ("THE READER OF THIS TEXT IS NOT FROM JAPAN", "en"),
        ("Bonjour tout le monde, comment allez-vous ?", "fr"),
        ("Привет, как дела?", "ru"),
        ("Це українська мова", "uk"),
        ("مرحبا بكم في موقعنا", "ar"),
    ],
)
def test_the_model_tells_languages_of_one_script(text: str, code: str) -> None:
    found, scores = detect(text)
    assert found == code
    assert 0.65 < scores["language.probability"] <= 1


def test_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    language_model._model.cache_clear()
    assert detect("Hello, how are you doing today?")[0] == "en"


def test_of_a_long_text_three_parts_are_looked_at() -> None:
    assert sample("abcdefghij", 10) == "abcdefghij"
    assert sample("abcdefghijklmnopqrstuvwxyz", 7) == "abc\nmn\nyz"
    assert detect("天" * 1000 + "x" * 10**6)[0] == "zh"  # 334 characters, each as good as three letters, to 666


def step_says(settings: LanguageConfig, declared: str) -> tuple[Document, list[str], Tally]:
    document, tally = Document("Bonjour tout le monde", "source", "file", 0, language=declared), Tally()
    return document, list(language_step(settings)(document, tally)), tally


def test_a_declared_language_is_believed() -> None:
    document, refused, tally = step_says(LanguageConfig(), "de")
    assert (document.language, document.scores, refused, tally.counts) == ("de", {}, [], {})


def test_an_undeclared_language_is_told() -> None:
    document, refused, tally = step_says(LanguageConfig(), "")
    assert (document.language, refused, tally.counts) == ("fr", [], {"language.fr": 1})
    assert document.scores == {"language.probability": pytest.approx(0.99, abs=0.01)}


def test_a_declared_language_is_compared_where_asked() -> None:
    document, refused, _ = step_says(LanguageConfig(detect="all"), "de")
    assert (document.language, document.scores["language.other"], refused) == ("de", 1, [])
    assert step_says(LanguageConfig(detect="all"), "fr")[0].scores["language.other"] == 0


def test_languages_that_are_not_wanted_are_refused() -> None:
    assert step_says(LanguageConfig(keep=("en", "zh")), "")[1] == ["language.keep"]
    assert step_says(LanguageConfig(keep=("en", "fr")), "")[1] == []
    assert step_says(LanguageConfig(keep=("en", "zh")), "de")[1] == ["language.keep"]


def test_the_model_sees_more_where_it_is_not_sure(monkeypatch):
    seen, said = [], iter([("en", 0.8), ("en", 0.79), ("de", 0.6)])
    monkeypatch.setattr(language, "_by_model", lambda part, _codes: seen.append(len(part)) or next(said))
    assert detect("word " * 600) == ("en", {"language.probability": 0.8})
    assert detect("word " * 600) == ("de", {"language.probability": 0.6})
    assert seen == [252, 252, 1002]  # with line ends between beginning, middle and end
