"""FineWeb's signals of lines, and mC4's."""

import pytest
import reference_rules as reference
from hypothesis import given, settings
from rule_texts import texts

from megatrain.corpus.rules import fineweb
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.view import View, Words

ENDINGS = set(".!?。！？．｡؟।")
"""Those of the marks which end sentences that the random texts have, and some."""


def view(text: str) -> View:
    return View(text, Repeats())


def test_the_signals_of_a_few_lines() -> None:
    text = "It ends.\n\n \nIt does not\nIt ends.\n" + "x" * 31 + "？\n"
    assert fineweb.fineweb(view(text), "blanks") == {
        "ended": 3 / 4,
        "short": 3 / 4,
        "same_letters": 8 / (8 + 1 + 11 + 8 + 32),
        "feeds": 6 / 8,
    }
    assert fineweb.mc4(view("a" * 300 + "\n" + "b" * 200 + "\nccc\n" + "d" * 250), "blanks") == {"third_line": 200}


@pytest.mark.parametrize("text", ["", "\n", " \n\t"])
def test_an_empty_text_has_signals(text: str) -> None:
    assert fineweb.fineweb(view(text), "blanks") == {"ended": 0, "short": 0, "same_letters": 0, "feeds": text.count("\n")}
    assert fineweb.mc4(view(text), "blanks") == {"third_line": 0}


@pytest.mark.parametrize("table", ["blanks", "han"])
def test_the_signals_are_those_written_plainly(table: Words) -> None:
    repeats = Repeats()

    @settings(max_examples=60, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        one = View(text, repeats)
        assert fineweb.fineweb(one, table) == reference.fineweb(text, reference.words(text, table), ENDINGS)
        assert fineweb.mc4(one, table) == reference.mc4(text)

    check()
