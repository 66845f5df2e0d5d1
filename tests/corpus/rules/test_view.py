"""A text as the rules look at it."""

import re

import numpy as np
import pytest

from megatrain.corpus.rules.hashed import hashes_of, hashes_of_words
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.view import LONGEST, LONGEST_ROW, View


def test_of_a_long_text_the_beginning_is_looked_at() -> None:
    assert len(View("a" * (LONGEST + 1), Repeats()).arrays.codes) == LONGEST == 2_097_152


def test_a_word_has_the_same_hash_wherever_it_stands() -> None:
    view = View("的 the 𠀀 ab", Repeats())
    assert hashes_of(view.arrays.codes, view.words("blanks")).tolist() == hashes_of_words(("的", "the", "𠀀", "ab")).tolist()
    assert len(np.unique(hashes_of_words(("a b", "ab", "a", "b", "ba")))) == 5


def test_the_words_of_a_segmenter_are_those_with_letters() -> None:
    words = View("我们 在\n这里", Repeats(), lambda row: re.findall("我们|这里|.|\n", row)).words("jieba")
    assert list(zip(words.starts.tolist(), words.ends.tolist(), strict=True)) == [(0, 2), (3, 4), (5, 7)]
    with pytest.raises(ValueError, match="without a segmenter"):
        View("我们", Repeats()).words("jieba")


def test_a_segmenter_is_given_a_line_at_a_time_and_no_long_ones() -> None:
    rows: list[str] = []

    def cut(row: str) -> list[str]:
        rows.append(row)
        return [row]

    words = View("天\r\n" + "地" * (LONGEST_ROW + 1), Repeats(), cut).words("jieba")
    assert list(map(len, rows)) == [3, LONGEST_ROW, 1]
    assert words.ends.tolist() == [3, LONGEST_ROW + 3, LONGEST_ROW + 4]
