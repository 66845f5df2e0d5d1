"""Normal forms and parts of texts: those that plain Python finds."""

import re
import time
import unicodedata

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.duplicates.normal import hash_texts, parts_of, without

TEXTS = st.text(st.sampled_from("aB ẞİΣ12٣.,#-\t\n\n\r\u3000\u200b\x00汉。🙂é\u0301$"), max_size=40)
PINNED = [[10429626074918392959, 604359539688741625]]
"""xxh3-128 of `chapter 00 the end`."""


def normal(text: str) -> str:
    kept = (letter for letter in text.lower() if letter.isspace() or unicodedata.category(letter)[0] not in "PSC")
    return " ".join("".join("0" if letter.isdecimal() else letter for letter in kept).split())


def hashed(text: str) -> list[int]:
    digest = xxhash.xxh3_128_intdigest(text.encode())
    return [digest >> 64, digest % (1 << 64)]


@settings(max_examples=120, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.integers(0, 4))
def test_parts_are_those_of_plain_python(texts, letters):
    for part, cut in (("lines", r"\n"), ("paragraphs", r"\n{2,}"), (None, r"(?!)")):
        found = parts_of(texts, part, letters)
        forms = [[normal(piece) for piece in re.split(cut, text)] for text in texts]
        assert found.counts.tolist() == [len(of) for of in forms]
        expected = [(i, form) for i, form in enumerate(form for of in forms for form in of) if len(form) >= letters]
        assert found.numbers.tolist() == [number for number, _ in expected]
        assert found.hashes.tolist() == [hashed(form) for _, form in expected]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Chapter 12: The End!\t(2nd ed.)", "chapter 00 the end 0nd ed"),
        ("“第１２章”　结束。", "第00章 结束"),
        ("a\u200bb\x00c", "abc"),
    ],
)
def test_the_normal_form(text, form):
    assert normal(text) == form
    assert parts_of([text], "lines", 0).hashes.tolist() == [hashed(form)]


def test_hashes_are_the_same_for_ever():
    assert parts_of(["Chapter 12. The end"], "lines", 0).hashes.tolist() == PINNED
    assert hash_texts(["chapter 00 the end"]).tolist() == PINNED


@pytest.mark.parametrize(
    ("part", "text", "removed", "left"),
    [
        ("lines", "a\nb\n\nc\n", [1], "a\n\nc\n"),
        ("lines", "a\nb", [0, 1], ""),
        ("lines", "a\nb", [], "a\nb"),
        ("paragraphs", "a\nb\n\nc\n\n\nd", [1], "a\nb\n\nd"),
        ("paragraphs", "a\n\nb\n\n\n\nc", [2], "a\n\nb"),
        ("paragraphs", "a\n\nb", [0, 1], ""),
        ("paragraphs", "a\n\nb\n\n", [], "a\n\nb\n\n"),
    ],
)
def test_what_is_left(part, text, removed, left):
    assert without(text, part, removed) == left


@pytest.mark.parametrize(("part", "end"), [("lines", "\n"), ("paragraphs", "\n\n")])
def test_many_parts_go_in_a_time_that_grows_with_their_number(part, end):
    """A quarter of a million lines, half of them removed: asked of a list, an hour."""
    begin = time.process_time()
    assert without(end.join(["a", "b"] * 125_000), part, list(range(0, 250_000, 2))) == end.join(["b"] * 125_000)
    assert time.process_time() - begin < 20
