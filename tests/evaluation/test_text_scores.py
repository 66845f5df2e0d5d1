"""Exact match, token F1, against SQuAD's own script for English."""

import random
import re
import string
from collections import Counter

import pytest

from megatrain.evaluation.text_scores import answer_tokens, exact_match, mostly_without_blanks, normal_form, token_f1


def squad_form(text: str) -> str:
    """normalize_answer of SQuAD's evaluate-v1.1.py, word for word."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(answer: str, reference: str) -> float:
    given, wanted = squad_form(answer).split(), squad_form(reference).split()
    same = sum((Counter(given) & Counter(wanted)).values())
    if not same:
        return float(given == wanted)
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_english_is_as_squads_script() -> None:
    draw = random.Random(1)
    words = [
        "the",
        "a",
        "an",
        "An",
        "cat",
        "Cat's",
        "U.S.",
        "3.5%",
        "$5",
        "x^2",
        "well-known",
        "--",
        "(sat)",
        "\t",
        "naïve",
        "b",
    ]
    for _ in range(1000):
        answer, reference = (" ".join(draw.choices(words, k=draw.randint(1, 7))) for _ in range(2))
        if not squad_form(answer) or not squad_form(reference):
            continue  # articles alone, which are kept: see below
        assert exact_match(answer, [reference]) == float(squad_form(answer) == squad_form(reference))
        assert token_f1(answer, [reference]) == pytest.approx(squad_f1(answer, reference), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("北京，是中国的首都。", list("北京是中国的首都")),
        ("《红楼梦》——“曹雪芹”", list("红楼梦曹雪芹")),
        ("ＧＰＴ－４　和 Qwen3 模型", ["gpt4", "和", "qwen3", *"模型"]),
        ("A级景区 the end", ["a", *"级景区", "the", "end"]),
        ("コーヒー、ﾃｽﾄ１２", [*"コーヒーﾃｽﾄ", "12"]),
        ("cafe\u0301 Café", ["café", "café"]),
        ("時々 〇 々 𠮷野家", list("時々〇々𠮷野家")),
        ("한국어 문장", ["한국어", "문장"]),
        ("\ufeff北\u200b京 co\u00adop", ["北", "京", "coop"]),
        ("🙂👍 ok\ud800", ["🙂👍", "ok\ud800"]),
        ("", []),
        ("  。！ ", []),
    ],
)
def test_tokens_of_mixed_text(text: str, tokens: list[str]) -> None:
    assert answer_tokens(text) == tokens


def test_blanks_beside_characters_do_not_count() -> None:
    assert exact_match("北京 大学", ["北京大学"]) == 1.0
    assert exact_match("New York", ["NewYork"]) == 0.0


def test_an_answer_that_is_an_article_is_not_the_empty_one() -> None:
    assert normal_form("A") == "a"
    assert exact_match("", ["A"]) == 0.0
    assert exact_match("A.", ["(a)"]) == 1.0
    assert exact_match("the", ["a"]) == 0.0
    assert normal_form("the cat") == "cat"


def test_bags_and_the_best_reference() -> None:
    assert token_f1("no no", ["no"]) == pytest.approx(2 / 3, abs=1e-12)  # sets would give 1
    assert token_f1("中国北京", ["上海", "北京市", "中国"]) == pytest.approx(2 * 2 / 6, abs=1e-12)
    assert token_f1("", ["", "x"]) == 1.0
    assert token_f1("", ["x"]) == 0.0
    assert token_f1("x", ["。"]) == 0.0


@pytest.mark.parametrize("references", [[], "text"])
def test_references_are_needed(references: list[str]) -> None:
    with pytest.raises(ValueError, match="Give a list of at least one text"):
        exact_match("x", references)
    with pytest.raises(ValueError, match="Give a list of at least one text"):
        token_f1("x", references)


def test_mostly_without_blanks() -> None:
    assert [mostly_without_blanks(text) for text in ("猫坐着", "Tokyo (东京)", "GPT模型是好的模型", "かな", "", "123。")] == [
        *(True, False, True, True, False, False)
    ]
