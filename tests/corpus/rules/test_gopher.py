"""Gopher's signals: known values, and equality with what is written plainly."""

import pytest
import reference_rules as reference
from hypothesis import given, settings
from rule_texts import texts

from megatrain.corpus.rules import gopher
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.view import View, Words

ENGLISH, CHINESE = "the be to of and that have with", "的 年 在 月 是 和 日 了 於 · 為 有 被 人 中 为 他 與 後 也 而 由"


def view(text: str) -> View:
    return View(text, Repeats())


def test_the_signals_of_a_short_text() -> None:
    text = "The cat sat...\n- of #1 and 5\n• that & that…"
    assert gopher.quality(view(text), "blanks") == {
        "words": 9,  # -, •, & are marks alone
        "mean_length": (3 + 3 + 6 + 2 + 2 + 3 + 1 + 4 + 5) / 9,
        "hashes": 1 / 12,
        "ellipses": 2 / 12,
        "letters": 7 / 12,
    }
    assert gopher.lines(view(text), "blanks") == {"bullets": 2 / 3, "cut": 2 / 3}
    assert gopher.stop_words("en", view(text), "blanks") == {"words": 3}  # "The" is another word than "the"


@pytest.mark.parametrize("text", ["", " \n", "\n\n\n"])
def test_an_empty_text_has_signals(text: str) -> None:
    assert set(gopher.quality(view(text), "blanks").values()) == {0}
    assert set(gopher.grams(view(text), "blanks").values()) == {0}
    assert set(gopher.parts(view(text), "blanks").values()) == {0}


@pytest.mark.parametrize("table", ["blanks", "marks", "han"])
def test_the_signals_are_those_written_plainly(table: Words) -> None:
    counter = Repeats()

    @settings(max_examples=60, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        one, words = View(text, counter), reference.words(text, table)
        assert gopher.quality(one, table) == reference.quality(text, words)
        assert gopher.lines(one, table) == reference.lines(text)
        assert gopher.stop_words("en", one, table) == reference.stop_words(words, ENGLISH)
        assert gopher.stop_words("zh", one, table) == reference.stop_words(words, CHINESE)
        assert gopher.parts(one, table) == reference.parts(text)
        assert gopher.grams(one, table) == reference.grams(text, words)

    check()
