"""Signs of a model in use, read from its answers: refusals, repetition, the script of a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

LOOKED_AT = 200
"""Characters of an answer in which a refusal begins."""
_CANNOT = "can(?:not|'t|’t)|(?:am|'m) (?:unable|not able) to|(?:will not|won't)"
_HELP = "help|assist|provide|answer|create|comply|discuss|share"
REFUSALS = re.compile(
    rf"\bI(?:'|’)?m sorry,? but\b|\bI apologi[sz]e,? but\b|\bI must decline\b|\bas an AI\b|\bI (?:{_CANNOT}) (?:{_HELP})\b"
    r"|抱歉|对不起|无法(?:提供|回答|帮助|协助|满足)|不能(?:提供|回答|帮助|协助)(?:你|您|这|该|任何|此)|作为(?:一个)?(?:人工智能|AI)|拒绝回答",
    re.IGNORECASE,
)
"""Words with which models refuse, in English and Chinese; a heuristic, of use for how often, not for which."""
REPEATED = 4
"""Tokens in a row whose repetition is counted."""

_SCRIPTS = (
    ("han", re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")),
    ("kana", re.compile("[\u3040-\u30ff]")),
    ("hangul", re.compile("[\uac00-\ud7af\u1100-\u11ff]")),
    ("cyrillic", re.compile("[\u0400-\u04ff]")),
    ("arabic", re.compile("[\u0600-\u06ff]")),
    ("devanagari", re.compile("[\u0900-\u097f]")),
    ("latin", re.compile("[A-Za-z\u00c0-\u024f]")),
)
SCRIPTS = (*(name for name, _ in _SCRIPTS), "other")


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do."""
    return REFUSALS.search(text[:LOOKED_AT]) is not None


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's runs of 4 tokens that stood before: 0 where none, near 1 where it goes round in circles."""
    runs = [tuple(tokens[at : at + REPEATED]) for at in range(len(tokens) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def script(text: str) -> str:
    """The script of most letters of a text, one of SCRIPTS; some kana among Han characters are Japanese."""
    counts = Counter({name: len(pattern.findall(text)) for name, pattern in _SCRIPTS})
    if not counts.total():
        return "other"
    if counts["han"] and counts["kana"] * 10 >= counts["han"]:
        return "kana"
    return counts.most_common(1)[0][0]
