"""Passages: the same as plain Python finds, wherever a text stands."""

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.duplicates.passages import Lengths, Passages, Worded
from megatrain.corpus.letters import HAN, classes

LENGTHS = Lengths.of(words=3, characters=5, shortest=2)
TEXTS = st.text(st.sampled_from("abAb 1 ,.\n汉字文ａ"), max_size=30)
PINNED = (3, [574365869655210070], 5550146748339348447)


def words_of(text: str) -> list[str]:
    spaced = ""
    for letter in unicodedata.normalize("NFKC", text).lower():
        if classes()[ord(letter)] & HAN:
            spaced += f" {letter} "
        else:
            spaced += " " if letter.isspace() or unicodedata.category(letter)[0] in "PSC" else letter
    return spaced.split()


def passages_of(text: str, length: int) -> list[tuple[str, ...]]:
    words, found = words_of(text), []
    for begin in range(len(words)):
        held, end = 0, begin
        while end < len(words) and held < length:
            held += 3 if classes()[ord(words[end][0])] & HAN else 5
            end += 1
        if held < length:
            break
        found.append(tuple(words[begin:end]))
    return found


def says_something(passage: tuple[str, ...]) -> bool:
    return 2 * len({word for word in passage if any(letter.isalpha() for letter in word)}) >= len(passage)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_passages_are_those_of_plain_python(one, other):
    for length in (10, 15):
        mine, theirs = (Worded.of(text, LENGTHS).passages(length) for text in (one, other))
        by_hand, others = (list(filter(says_something, passages_of(text, length))) for text in (one, other))
        assert len(mine) == len(by_hand)
        for i, passage in enumerate(by_hand):
            assert [bool(key == mine[i]) for key in theirs] == [passage == another for another in others]


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=5), TEXTS)
def test_counts_are_those_of_plain_python(sets, text):
    table = Passages.made([(Worded.of(one, LENGTHS).passages(15), number, 0, 0) for number, one in enumerate(sets)])
    matches = np.zeros(len(sets), np.int64)
    of_text = passages_of(text, 15)
    assert table.add_matches(Worded.of(text, LENGTHS), 15, matches) == len(of_text)
    found = [[passage for passage in of_text if says_something(passage)] for one in sets]
    assert matches.tolist() == [
        sum(passage in passages_of(one, 15) for passage in of_one) for one, of_one in zip(sets, found, strict=True)
    ]


def test_hashes_are_the_same_for_ever():
    lengths = Lengths.of(13, 20, 8)
    assert lengths == (20, 13, 260, 160)
    text = Worded.of("It's a passage of THIRTEEN words, which is as long as 20 characters: 汉字。", lengths)
    assert text.length == 14 * 20 + 2 * 13
    assert (len(text.passages(260)), text.passages(260)[:1].tolist(), text.whole) == PINNED


def test_a_passage_is_thirteen_words_or_twenty_characters():
    lengths = Lengths.of(13, 20, 8)
    for text in (" ".join("abcdefghijklm"), "一二三四五六七八九十百千万天地人日月山水"):
        worded = Worded.of(text, lengths)
        assert len(worded.passages(lengths.passage)) == 1
        assert len(Worded.of(text[:-1], lengths).passages(lengths.passage)) == 0
