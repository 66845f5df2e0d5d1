"""Traditional Chinese letters made simplified ones, by `opencc`; Japanese and Korean texts stay, whose letters only look alike."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

from megatrain.corpus.cleaning.characters import HAN, unusual
from megatrain.extras import need

FOREIGN = re.compile("[\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uac00-\ud7a3]")
"""Kana and Hangul, but for the dot that Chinese has between parts of names."""
SHARE = 0.05
"""A text with so many of them, of its Chinese letters and them, is Japanese or Korean."""


@cache
def _converter() -> Any:
    """Traditional to simplified, words and letters."""
    return need("opencc", "clean.chinese: simplified", "chinese").OpenCC("t2s")


def simplified(text: str, language: str, counts: Counter[str]) -> str:
    """A text with simplified letters; language: its code, "" for unknown."""
    if text.isascii() or language in ("ja", "ko"):
        return text
    rest = unusual(text)
    if HAN.search(rest) is None:
        return text
    foreign = len(FOREIGN.findall(rest))
    if not language and foreign and foreign > SHARE * (foreign + len(HAN.findall(rest))):
        return text
    found: str = _converter().convert(text)
    counts["simplified"] += found != text
    return found
