"""Classes of characters say what Python's own methods say of them."""

import sys
import time
import unicodedata

import numpy as np

from megatrain.corpus.letters import (
    ASSIGNED,
    BREAK,
    DIGIT,
    ENDING,
    HAN,
    LETTER,
    MARK,
    SPACE,
    UPPER,
    classes,
    code_points,
    without_piles,
)


def test_code_points():
    assert code_points("Ab 。🙂").tolist() == [65, 98, 32, 12290, 0x1F642]
    assert code_points("").tolist() == []


def test_every_character_has_the_classes_that_python_gives_it():
    found = classes()
    for bit, of in ((SPACE, str.isspace), (LETTER, str.isalpha), (DIGIT, str.isdecimal), (UPPER, str.isupper)):
        wrong = [code for code in range(sys.maxunicode + 1) if bool(found[code] & bit) != of(chr(code)) and code < ASSIGNED]
        assert wrong == []
        assert not any(of(chr(code)) for code in range(ASSIGNED, sys.maxunicode + 1))
    assert [chr(code) for code in np.flatnonzero(found & BREAK)] == list("\n\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029")


def test_marks_han_and_endings():
    def has(bit: np.uint16, text: str) -> list[bool]:
        return (classes()[code_points(text)] & bit > 0).tolist()

    assert has(MARK, ".,#—。「+$a1 \n　") == [True] * 8 + [False] * 5
    assert has(HAN, "汉〇々㐀𠀀ａあ。가") == [True] * 5 + [False] * 4
    assert has(ENDING, ".?!。？！…，:a") == [True] * 6 + [False] * 4
    han = np.flatnonzero(classes() & HAN)
    names = [unicodedata.name(chr(code), "") for code in han if code < 0x20000]
    assert sum(name.startswith("CJK") for name in names) > 28_000


def test_a_pile_of_marks_is_cut_at_thirty():
    for text in ("", "abc", "汉字", "e\u0301" * 1000, "a" + "\u0301" * 30, "q\u0307\u0323" * 40):
        assert without_piles(text) is text
    assert without_piles("x" * 7 + "a" + "\u0301\u0327" * 20 + "b\u0301") == "x" * 7 + "a" + "\u0301\u0327" * 15 + "b\u0301"
    began = time.process_time()
    assert len(without_piles("a" + "\u0301\u0327" * 1_000_000)) == 31
    assert time.process_time() - began < 2


def test_real_texts_are_left_as_they_are():
    for text in ("Tiê\u0301ng Viê\u0323t", "שָׁלוֹם", "नमस्ते", "ก็ที่นี่"):
        assert without_piles(text) is text
