"""Tails of paragraphs behind the last end of a sentence."""

from collections import Counter

import pytest

from megatrain.corpus.cleaning.tails import without_tails

CASES = {
    "It rained. Read mo": "It rained.",
    "He said “Go!” and": "He said “Go!”",
    "他走了。然後\n他说：“走。”然后（完": "他走了。\n他说：“走。”",
    "Wait... what\nReally?! Then": "Wait...\nReally?!",
    "A heading\n\n标题\nIt ended.": "A heading\n\n标题\nIt ended.",
    "He paid 3.5 million to Dr. A. B. Smith of the U.S. for file.txt, e.g. x.com/a?b=c, No. 5": None,
    "It ended.\n\n    code. x = 1\n```\nx. y\n```": None,
    "": None,
}


@pytest.mark.parametrize("text", CASES)
def test_tails(text):
    counts = Counter()
    once = without_tails(text, counts)
    assert once == (text if CASES[text] is None else CASES[text])
    assert (counts["tails"] > 0) == (once != text)
    assert without_tails(once, Counter()) == once


def test_time_is_linear_on_hostile_text():
    for piece in (".", "!", "a.", "“.", "。x", ".”"):
        without_tails(piece * 20_000, Counter())
        without_tails(piece * 20_000 + "x", Counter())
