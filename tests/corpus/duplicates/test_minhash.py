"""Signatures: the least values of fixed functions over the hashes of shingles, the same for ever."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.duplicates.minhash import HASHES, agreeing, band_keys, functions, keys_of, signatures
from megatrain.corpus.letters import HAN, classes

U64 = (1 << 64) - 1
TEXTS = st.text(st.sampled_from("abAİΣ 1.,\t\n汉字。あ🙂é"), max_size=40)
PINNED_FUNCTIONS = (10451216379200822465, 13757245211066428519, 8537996257872043787, 10685640174368234718)
PINNED_SIGNATURES = [[92251883, 412284755, 963539969], [264456810, 150398944, 409289480], [485867058, 1399906985, 273674604]]
PINNED_BANDS = [
    [17198339236823225676, 9275673172184815773, 10533285456939303149],
    [9988044227124787034, 4192463213815849118, 2070094485070072868],
]
PINNED_WHOLE = [16197893307310122175, 13762515687354257101, 6205785463828555551]


def words_of(text: str) -> list[str]:
    spaced = "".join(f" {letter} " if classes()[ord(letter)] & HAN else letter for letter in text.lower())
    return spaced.split()


def shingles(text: str, words: int = 5) -> set[tuple[str, ...]]:
    of = words_of(text)
    return {tuple(of[i : i + words]) for i in range(max(len(of) - words + 1, 1))} if of else set()


def mixed(h: int) -> int:
    h = (h ^ (h >> 32)) * 0x9E3779B97F4A7C15 & U64
    h = (h ^ (h >> 29)) * 0x9E3779B97F4A7C15 & U64
    return h ^ (h >> 32)


def hash_of_word(word: str) -> int:
    h = 0xCBF29CE484222325
    for letter in word:
        h = (h ^ ord(letter)) * 0x100000001B3 & U64
    return mixed(h)


def hash_of_shingle(words: tuple[str, ...]) -> int:
    h = len(words)
    for word in words:
        h = (h ^ hash_of_word(word)) * 0x9E3779B97F4A7C15 & U64
        h ^= h >> 31
    return mixed(h)


def signature_by_hand(text: str, words: int) -> list[int]:
    a, b = (column.tolist() for column in functions())
    found = [hash_of_shingle(shingle) for shingle in shingles(text, words)]
    return [min((a[k] * x + b[k] & U64 for x in found), default=U64) >> 32 for k in range(HASHES)]


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 5))
def test_signatures_are_those_of_plain_python(texts, words):
    signed, found = signatures(texts, words)
    assert found.tolist() == [len(words_of(text)) for text in texts]
    for text, row in zip(texts, signed.tolist(), strict=True):
        assert row == signature_by_hand(text, words)


def test_signatures_are_the_same_for_ever():
    a, b = functions()
    assert (int(a[0]), int(b[0]), int(a[119]), int(b[119])) == PINNED_FUNCTIONS
    signed, words = signatures(["The quick brown fox jumps over the lazy dog.", "敏捷的棕色狐狸跳过了懒狗。", "short"])
    assert words.tolist() == [9, 13, 1]
    assert signed[:, [0, 1, 119]].tolist() == PINNED_SIGNATURES
    assert band_keys(signed, 20, 6)[[0, 19]].tolist() == PINNED_BANDS
    assert keys_of(signed).tolist() == PINNED_WHOLE


def test_what_a_shingle_is():
    one, other, short, cased = signatures(["a b c d e f", "b c d e f", "b c d e", "B C\n\nD  E F"])[0]
    assert agreeing(other, cased) == HASHES  # case and the kind of blanks do not count
    assert 0 < agreeing(one, other) < HASHES  # one shingle of two
    assert agreeing(other, short) == 0  # four words are one shingle, another one
    marked, digits = signatures(["b c d e f.", "b c d e 7"])[0]
    assert agreeing(other, marked) == agreeing(other, digits) == 0


def test_agreement_estimates_the_jaccard_similarity():
    draw = random.Random(7)
    texts = []
    for number in range(200):
        words = [f"w{draw.randrange(5000)}" for _ in range(300)]
        edited = [f"x{i}" if draw.random() < number / 4000 else word for i, word in enumerate(words)]
        texts += [" ".join(words), " ".join(edited)]
    signed, _ = signatures(texts)
    errors = []
    for one, other in zip(range(0, 400, 2), range(1, 400, 2), strict=True):
        a, b = shingles(texts[one]), shingles(texts[other])
        errors.append(agreeing(signed[one], signed[other]) / HASHES - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.046  # sqrt(J (1 - J) / 120) at its largest


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_a_text_without_words_has_none(text):
    assert signatures([text])[1].tolist() == [0]


def test_the_reference_splits_as_python_does():
    assert words_of("It's 汉字, OK.") == ["it's", "汉", "字", ",", "ok."]
    assert re.findall(r"\S+", "it's ok.") == words_of("it's ok.")
