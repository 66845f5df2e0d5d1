"""Repetition of parts and of n-grams of words."""

import numpy as np

from megatrain.corpus.rules.repetition import GRAMS, Repeats


def hashes(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], np.uint64)


def grams(text: str, counter: Repeats) -> dict[str, float]:
    """The letters in the n-grams of words of one letter each."""
    return dict(zip(GRAMS, counter.grams(hashes(text), np.ones(len(text), np.int64)).tolist(), strict=True))


def test_the_most_frequent_of_n_grams_counts_with_the_blanks_between_its_words() -> None:
    found = grams("abxabyabz", Repeats())
    assert (found["top_2"], found["top_3"], found["top_4"]) == (3 * 3, 1 * 5, 1 * 7)


def test_repeated_n_grams_do_not_overlap() -> None:
    assert grams("abcdeabcdeabcde", Repeats())["again_5"] == 10
    assert grams("aaaaaaaaaaaa", Repeats())["again_5"] == 10  # the second begins one word after the first
    assert grams("abcdefghij", Repeats()) == {"top_2": 3, "top_3": 5, "top_4": 7, **{f"again_{n}": 0 for n in range(5, 11)}}


def test_lines_that_were_there_before() -> None:
    assert Repeats().again(hashes("abacaa"), np.array([1, 2, 3, 4, 5, 6])) == (3, 3 + 5 + 6)


def test_what_is_said_of_a_text_hangs_on_no_other() -> None:
    counter, fresh = Repeats(), Repeats()
    for length in (5, 4000, 7, 20_000, 3):  # grows in between
        text = "abcabd" * length
        assert grams(text, counter) == grams(text, fresh)
        fresh = Repeats()
