"""Words and lines as positions: the same as those of Python's own methods on any text."""

import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus import words
from megatrain.corpus.letters import HAN, classes
from megatrain.corpus.words import Extents, Text, find_parts, hash_of

HASHES = [14585125116377331563, 4884131794686829111, 3054765579133728182]
TEXTS = st.text(st.sampled_from("ab A1.,;#…-•\t \n\r\x0b\x85\u2028 汉字。，あ🙂é\u0301"), max_size=60) | st.text(
    st.characters(exclude_categories=("Cs",)), max_size=40
)


def parts(text: str, spans: Extents) -> list[str]:
    return [text[start:end] for start, end in zip(spans.starts, spans.ends, strict=True)]


def alone(letter: str, han: bool) -> bool:
    mark = unicodedata.category(letter)[0] in "PSC" and not letter.isspace() and ord(letter) < 0x33480
    return mark or (han and bool(classes()[ord(letter)] & HAN))


def words_by_hand(text: str, han: bool) -> list[str]:
    spaced = "".join(f" {letter} " if alone(letter, han) else letter for letter in text)
    return spaced.split()


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_words_and_lines_are_those_of_python(text):
    found = Text.of(text)
    assert parts(text, found.words("blanks")) == text.split()
    assert parts(text, found.words("marks")) == words_by_hand(text, han=False)
    assert parts(text, found.words("han")) == words_by_hand(text, han=True)
    assert parts(text, found.lines()) == text.splitlines()
    assert parts(text, found.between_feeds()) == text.split("\n")
    starts, ends = np.empty((2, len(text) + 1), np.int64)
    count = find_parts(found.codes, 2, starts, ends)
    assert parts(text, Extents(starts[:count], ends[:count])) == re.split(r"\n{2,}", text)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("blanks", ["it's", "5km.", "汉字。"]),
        ("marks", ["it", "'", "s", "5km", ".", "汉字", "。"]),
        ("han", ["it", "'", "s", "5km", ".", "汉", "字", "。"]),
    ],
)
def test_what_counts_as_a_word(table, words):
    text = "it's 5km. 汉字。"
    assert parts(text, Text.of(text).words(table)) == words


def test_hashes_are_the_same_for_ever():
    codes = Text.of("a word, 汉").codes
    assert [int(hash_of(codes, 0, n)) for n in (0, 1, 9)] == HASHES
    assert hash_of(codes, 2, 6) == hash_of(np.ascontiguousarray(codes[2:6]), 0, 4)


def test_where_no_code_can_be_kept_it_is_compiled_anew(monkeypatch):
    """As for a user without a home, of an installation that belongs to another one."""
    compiled = []

    def njit(cache=False, **_):
        def compile_one(function):
            if cache:
                raise RuntimeError("cannot cache function 'f': no locator available for file 'words.py'")
            compiled.append(function)
            return function

        return compile_one

    monkeypatch.setattr(words, "numba", lambda: SimpleNamespace(njit=njit))
    assert words.jit(len) is len and compiled == [len]
