"""Documents judged by rules."""

import sys
import tempfile
from pathlib import Path

import pytest

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.rules import judge
from megatrain.corpus.rules.judge import rules_step


def judged(text: str, names: list[str], thresholds: dict[str, float | str | bool] | None = None) -> tuple[list[str], Document]:
    document = Document(text, "source", "file", 0)
    return list(rules_step(names, thresholds or {})(document, Tally())), document


def test_every_rule_that_a_document_breaks_is_named_and_every_signal_is_kept() -> None:
    broken, document = judged("# # #\n" * 40, ["gopher"])
    assert broken == [
        *("gopher.words.least", "gopher.mean_length.least", "gopher.hashes", "gopher.letters", "gopher.stop_words"),
        *("gopher.lines", "gopher.line_letters", "gopher.top_2", "gopher.top_3", "gopher.top_4"),
        *(f"gopher.again_{n}" for n in range(5, 11)),
    ]
    assert document.scores["gopher.words"] == 0
    assert document.scores["gopher.lines"] == 39 / 40
    assert document.scores["gopher.hashes"] == 1


def test_only_the_signals_asked_for_are_found() -> None:
    broken, document = judged("a b c", ["gopher.words.least"])
    assert broken == ["gopher.words.least"]
    assert document.scores == {"gopher.words": 3}


def test_a_threshold_decides() -> None:
    assert judged("a b c", ["gopher.words.least"], {"gopher.words.least": 3})[0] == []
    assert judged("a b c", ["gopher.words"], {"gopher.words": "off"})[0] == []


LINES = "The first of these lines is good and it stays.\nHome | About | Contact\n" * 3


def test_rules_of_sets_named_later_see_the_lines_that_are_left() -> None:
    document = Document(LINES, "source", "file", 0)
    tally = Tally()
    broken = rules_step(["fineweb.ended_lines", "c4", "mc4", "gopher.lines"], {})(document, tally)
    assert document.text == "\n".join(["The first of these lines is good and it stays."] * 3)
    assert broken == ["c4.sentences", "mc4.third_line", "gopher.lines"]
    assert document.scores["fineweb.ended_lines"] == 1 / 2  # named earlier: of all lines
    assert document.scores["gopher.lines"] == 2 / 3
    assert document.scores["c4.line_end"] == 1 / 2
    assert tally.counts == {"lines.c4.line_end": 3}


def test_lines_are_only_told_of_where_texts_are_not_edited() -> None:
    document = Document(LINES, "source", "file", 0)
    tally = Tally()
    assert rules_step(["c4", "gopher.lines"], {}, edits=False)(document, tally) == ["c4.sentences", "gopher.lines"]
    assert document.text == LINES
    assert document.scores["gopher.lines"] == 2 / 3
    assert tally.counts == {"lines.c4.line_end": 3}


def test_a_probability_that_was_not_found_breaks_no_rule() -> None:
    step = rules_step(["fineweb2_zh.probability"], {})
    document = Document("字", "source", "file", 0)
    assert step(document, Tally()) == []
    document.scores["language.probability"] = 0.69
    assert step(document, Tally()) == ["fineweb2_zh.probability"]


def test_words_are_those_that_jieba_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    judge._segmenter.cache_clear()
    broken, document = judged("我们 今天，去公园玩。\n" * 2, ["map_neo.mean_length", "gopher.words.least"])
    assert broken == ["gopher.words.least"]
    assert document.scores == {"map_neo.mean_length": 8 / 5, "gopher.words": 4}  # 我们 今天 去 公园 玩
    assert list(tmp_path.iterdir()) == []


def test_jieba_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    judge._segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r"the table of words jieba needs jieba: pip install 'megatrain\[chinese\]'"):
        rules_step(["gopher"], {}, "jieba")
