"""Scripts of letters and which tell the language by themselves; simplified, traditional and Japanese forms of Chinese characters."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatrain.corpus.letters import HAN_BLOCKS
from megatrain.corpus.words import jit

BLOCKS = (
    ("Latin", "41-5a 61-7a c0-24f 1e00-1eff ff21-ff3a ff41-ff5a"),
    ("Greek", "370-3ff 1f00-1fff"),
    ("Cyrillic", "400-52f 1c80-1c8f 2de0-2dff a640-a69f"),
    ("Armenian", "530-58f"),
    ("Hebrew", "590-5ff"),
    ("Arabic", "600-6ff 750-77f 8a0-8ff fb50-fdff fe70-feff"),
    ("Devanagari", "900-97f"),
    ("Bengali", "980-9ff"),
    ("Gurmukhi", "a00-a7f"),
    ("Gujarati", "a80-aff"),
    ("Tamil", "b80-bff"),
    ("Telugu", "c00-c7f"),
    ("Kannada", "c80-cff"),
    ("Malayalam", "d00-d7f"),
    ("Sinhala", "d80-dff"),
    ("Thai", "e00-e7f"),
    ("Lao", "e80-eff"),
    ("Tibetan", "f00-fff"),
    ("Burmese", "1000-109f"),
    ("Georgian", "10a0-10ff 1c90-1cbf"),
    ("Hangul", "1100-11ff 3130-318f ac00-d7af"),
    ("Khmer", "1780-17ff"),
    ("Kana", "3041-30ff 31f0-31ff ff66-ff9f"),
    ("Han", " ".join(f"{begin:x}-{end - 1:x}" for begin, end in HAN_BLOCKS)),
)
"""Code points of each script, in hexadecimal (Unicode's Blocks.txt); a later one wins."""
NAMES = ("other", *(name for name, _ in BLOCKS))
ALONE = {
    **{"Greek": "el", "Armenian": "hy", "Hebrew": "he", "Gurmukhi": "pa", "Gujarati": "gu", "Tamil": "ta", "Telugu": "te"},
    **{"Kannada": "kn", "Malayalam": "ml", "Sinhala": "si", "Thai": "th", "Lao": "lo", "Tibetan": "bo", "Burmese": "my"},
    **{"Georgian": "ka", "Hangul": "ko", "Khmer": "km"},
}
"""Scripts that one language has, as good as alone."""
DENSE = {"Han": 3.0, "Kana": 3.0, "Hangul": 3.0}
"""Letters of an alphabet that one of these says as much as, about."""

SIMPLIFIED, TRADITIONAL, JAPANESE, CHINESE = (np.uint8(1 << bit) for bit in range(4))


@cache
def _script_of() -> npt.NDArray[np.uint8]:
    """The script by code point, as its place in NAMES [0x32400]; all that follow have none."""
    found = np.zeros(0x32400, np.uint8)
    for number, (_, blocks) in enumerate(BLOCKS, 1):
        for block in blocks.split():
            first, _, last = block.partition("-")
            found[int(first, 16) : int(last, 16) + 1] = number
    found.flags.writeable = False
    return found


def _has(encoding: str, letter: str) -> bytes:
    """A letter in an encoding; empty where it has none."""
    return letter.encode(encoding, "ignore")


@cache
def _form_of() -> npt.NDArray[np.uint8]:
    """The forms of the Chinese characters 4E00..9FFF, as bits [0x5200].

    Simplified: in GB 2312 and not in Big5. Traditional: among the 5,401 frequent ones of Big5 and not in GB 2312. Japanese: in JIS X 0208
    alone. Chinese: in GB 2312 or those of Big5, and not in JIS X 0208.
    """
    found = np.zeros(0x5200, np.uint8)
    for at in range(len(found)):
        letter = chr(0x4E00 + at)
        simplified, big, japanese = _has("gb2312", letter), _has("big5", letter), _has("shift_jis", letter)
        frequent = b"" < big < b"\xc6\xa1"
        found[at] |= SIMPLIFIED * (bool(simplified) and not big) | TRADITIONAL * (frequent and not simplified)
        found[at] |= JAPANESE * (bool(japanese) and not simplified and not big)
        found[at] |= CHINESE * ((bool(simplified) or frequent) and not japanese)
    found.flags.writeable = False
    return found


@jit
def _count(codes: npt.NDArray[np.uint32], script_of: npt.NDArray[np.uint8], found: npt.NDArray[np.int64]) -> None:
    """Fill in how many code points each script has [scripts]."""
    for code in codes:
        if code < len(script_of):
            found[script_of[code]] += 1


def counts(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """How many letters each script has among some code points [len(NAMES)]; marks, digits and blanks are no letters of any."""
    found = np.zeros(len(NAMES), np.int64)
    _count(codes, _script_of(), found)
    return found


class Forms(NamedTuple):
    """How many Chinese characters of a text have a form that is one thing alone."""

    simplified: int
    traditional: int
    japanese: int
    chinese: int


def forms(codes: npt.NDArray[np.uint32]) -> Forms:
    """The forms of the Chinese characters among some code points."""
    found = _form_of()[codes[(codes >= 0x4E00) & (codes < 0xA000)] - np.uint32(0x4E00)]
    return Forms(*(int(np.count_nonzero(found & bit)) for bit in (SIMPLIFIED, TRADITIONAL, JAPANESE, CHINESE)))
