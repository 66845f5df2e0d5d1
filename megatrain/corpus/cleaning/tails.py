"""Cuts the tail of a paragraph: what stands behind its last end of a sentence, as in `It rained. Read mo`; English and Chinese.

A paragraph is a line. One without an end of a sentence, such as a heading, stays whole; so do lines that may be code.
"""

from __future__ import annotations

import re
from collections import Counter

from megatrain.corpus.cleaning.spacing import code_lines

CLOSING = r"\"'”’»」』）)\]】》"
NO_END = "".join(
    rf"(?<!\b{word})" for word in ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "vs", "cf", "al", "[Ff]ig", "[Nn]o", "pp")
)
DOT = rf"(?<![^\w{CLOSING}]\w)(?<!^\w)(?<!\.\w){NO_END}\.(?![\w.])"
END = re.compile(rf"(?:[。！？；…]|[!?](?![\w/=&])|{DOT})[。！？；…!?.]*[{CLOSING}]*")
"""Marks that end a sentence, and what closes behind them; not the dot of an initial, an abbreviation, a number or a name of a file."""


def without_tails(text: str, counts: Counter[str]) -> str:
    """A text whose paragraphs end with their last sentence."""
    lines = text.split("\n")
    for number, code in enumerate(code_lines(text, lines)):
        line = lines[number].rstrip()
        if code or not line or line[-1] in "。！？；…!?":
            continue
        end = max((mark.end() for mark in END.finditer(line)), default=0)
        if 0 < end < len(line):
            lines[number] = line[:end]
            counts["tails"] += 1
    return "\n".join(lines)
