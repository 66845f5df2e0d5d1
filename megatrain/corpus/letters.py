"""Classes of characters, so that rules over text are loops over integers: a table from code point to bits, made once for a process.

    codes = code_points("Ab 。")                   # uint32: 65, 98, 32, 12290
    classes()[codes] & LETTER                      # what Python's str.isalpha says of each

Text with lone surrogates has none: whoever reads text replaces or refuses them.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

SPACE, BREAK, LETTER, DIGIT, MARK, UPPER, HAN, ENDING, NUMBER = (np.uint16(1 << bit) for bit in range(9))
"""Bits: str.isspace; where str.splitlines cuts; isalpha; isdecimal; neither a letter, a number nor a blank; isupper; a Chinese character;
an end of a sentence (Unicode's Sentence_Terminal); isnumeric, as digits and ½.
"""
ASSIGNED = 0x33480
"""All characters that a rule asks for lie below; those above (private use, tags) have no class."""
HAN_BLOCKS = (
    (0x3005, 0x3008),
    (0x3021, 0x302A),
    (0x3038, 0x303C),
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0x16FE2, 0x16FF2),
    (0x20000, 0x323B0),
)
"""Code points of the script Han (Unicode's Scripts.txt), with the iteration mark and 〇; begin and end."""
ENDINGS = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d5 1803 1809 1944-1945 "
    "1aa8-1aab 1b4e-1b4f 1b5a-1b5b 1b5e-1b5f 1b7d-1b7f 1c3b-1c3c 1c7e-1c7f 2024 203c-203d 2047-2049 2cf9-2cfb 2e2e 2e3c 2e53-2e54 3002 "
    "a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe12 fe15-fe16 fe52 fe56-fe57 ff01 ff0e ff1f "
    "ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c "
    "112a9 113d4-113d5 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 "
    "11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16d6e-16d6f 16e98 1bc9f 1da88"
)
"""Unicode 16's Sentence_Terminal (PropList.txt), in hexadecimal."""


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text [n]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@cache
def classes() -> npt.NDArray[np.uint16]:
    """Bits by code point, uint16 [0x110000]; takes a third of a second the first time."""
    found = np.zeros(0x110000, np.uint16)
    letters = [chr(code) for code in range(ASSIGNED)]
    lines = np.array([len(f"a{letter}a".splitlines()) == 2 for letter in letters[:0x2030]])
    found[: len(lines)] |= BREAK * lines
    for bit, of in (
        (SPACE, str.isspace),
        (LETTER, str.isalpha),
        (DIGIT, str.isdecimal),
        (UPPER, str.isupper),
        (NUMBER, str.isnumeric),
    ):
        found[:ASSIGNED] |= bit * np.fromiter(map(of, letters), bool, ASSIGNED)
    marks = np.fromiter((unicodedata.category(letter)[0] in "PSC" for letter in letters), bool, ASSIGNED)
    found[:ASSIGNED] |= MARK * (marks & (found[:ASSIGNED] & SPACE == 0))
    for begin, end in HAN_BLOCKS:
        found[begin:end] |= HAN
    for part in ENDINGS.split():
        first, _, last = part.partition("-")
        found[int(first, 16) : int(last or first, 16) + 1] |= ENDING
    found.flags.writeable = False
    return found


MOST_MARKS = 30
"""Combining marks in a row that any script has need of (UAX #15, 13, stream-safe text); Unicode forms take quadratic time in more."""


@cache
def _piles() -> re.Pattern[str]:
    """Finds more combining marks in a row than MOST_MARKS."""
    combining = [chr(code) for code in range(0x300, sys.maxunicode + 1) if unicodedata.combining(chr(code))]
    return re.compile(f"[{''.join(combining)}]{{{MOST_MARKS + 1},}}")


@cache
def _combining() -> re.Pattern[str]:
    return re.compile(_piles().pattern.partition("{")[0])


def without_piles(text: str) -> str:
    """A text with at most MOST_MARKS combining marks in a row: the first ones."""
    if text.isascii() or _combining().search(text[:: MOST_MARKS + 1]) is None:  # more would meet one of every so many letters
        return text
    return _piles().sub(lambda pile: pile[0][:MOST_MARKS], text)
