"""Blanks, empty lines, and which lines may be code."""

from collections import Counter

import pytest

from megatrain.corpus.cleaning.spacing import code_lines, with_few_blanks, with_plain_blanks

CASES = {
    "two  blanks.   End  \n": "two blanks. End",
    "\n\n a\n\n\n\nb\n \n": " a\n\nb",
    "a \t b\t\tc": "a\tb\t\tc",  # tabs part the cells of a table
    "- one\n  - two   words": "- one\n  - two words",
    "see:\n\n    x  =  1  \n\n\n    y = 2\n\ttab  code": "see:\n\n    x  =  1\n\n    y = 2\n\ttab  code",
    "```\na  b\n\n\n\nc\n```\nd  e": "```\na  b\n\n\n\nc\n```\nd e",
    "```\na  b": "```\na b",  # a fence that is not closed is none
    "plain\ntext": "plain\ntext",
    "": "",
    " \t \n \n": "",
}


@pytest.mark.parametrize("text", CASES, ids=ascii)
def test_few_blanks(text):
    counts = Counter()
    once = with_few_blanks(text, counts)
    assert once == CASES[text]
    assert counts["blanks"] == (once != text)
    assert with_few_blanks(once, Counter()) == once


def test_other_blanks():
    assert with_plain_blanks("\u3000\u3000中文\xa0字\n \xa0 a\n    x\u2009=\u20091", Counter()) == "中文 字\na\n    x = 1"
    assert with_plain_blanks("é  ", Counter()) == "é  "


def test_code_lines():
    text = "a\n    b\n     \n````py\n```\nc\n`````\n``` x\nd\n\t\n\te"
    assert code_lines(text, text.split("\n")) == [False, True, False, True, True, True, True, False, False, False, True]


def test_time_is_linear_on_hostile_text():
    for text in (
        " " * 200_000 + "x",
        "a" + " \t" * 100_000,
        "```\n" * 50_000,
        "\n" * 200_000,
        "a  " * 70_000,
        "    \n" * 40_000,
    ):
        assert len(with_few_blanks(text, Counter())) <= len(text)  # the test's limit of time holds what is quadratic
