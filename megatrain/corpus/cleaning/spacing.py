"""Blanks within lines, at their ends and between paragraphs; and which lines of a text may be code, whose blanks say something."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from megatrain.corpus.cleaning.characters import unusual

OTHER = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
"""Blanks of Unicode but the plain one: no-break, of a width, ideographic."""
INDENTED_BY_OTHER = re.compile(
    "^[ \t]*[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000][ \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]*", re.MULTILINE
)
UNTIDY = re.compile("  |\t| \n|\n\n\n")
INDENTED = ("    ", "\t")
"""How a line of code begins in Markdown and reStructuredText."""
FENCE = re.compile(" {0,3}(`{3,})[^`]*")


def code_lines(text: str, lines: Sequence[str]) -> list[bool]:
    """Whether each line of a text may be code: it is indented by four blanks or a tab, or lies between fences of Markdown."""
    if "\n    " in text or "\n\t" in text or text.startswith(INDENTED):
        found = [line.startswith(INDENTED) and not line.isspace() for line in lines]
    else:
        found = [False] * len(lines)
    opened, ticks = -1, ""
    for number, line in enumerate(lines if "```" in text else ()):
        if "```" not in line or (fence := FENCE.fullmatch(line)) is None:
            continue
        if opened < 0:
            opened, ticks = number, fence[1]
        elif set(line.strip(" ")) == {"`"} and len(fence[1]) >= len(ticks):
            found[opened : number + 1] = [True] * (number + 1 - opened)
            opened = -1
    return found


def with_plain_blanks(text: str, counts: Counter[str]) -> str:
    """A text with plain blanks for others, and no lines that begin with others."""
    if text.isascii() or OTHER.search(unusual(text)) is None:
        return text
    counts["other_blanks"] += 1
    return OTHER.sub(" ", INDENTED_BY_OTHER.sub("", text))


def with_few_blanks(text: str, counts: Counter[str]) -> str:
    """A text with no blanks at the ends of lines, one blank between words and one empty line between paragraphs, but in code."""
    if UNTIDY.search(text) is None and text == text.strip():
        return text
    lines = text.split("\n")
    code = code_lines(text, lines)
    lines = [line.rstrip(" \t") for line in lines]
    if "  " in text or "\t" in text:
        lines = [
            line if held or not ("  " in line or "\t" in line) else _tidy(line) for line, held in zip(lines, code, strict=True)
        ]
    tidied = "\n".join(lines).strip("\n")
    if "\n\n\n" in tidied:
        kept: list[str] = []
        for line, held in zip(lines, code, strict=True):
            if line or held or (kept and kept[-1]):
                kept.append(line)
        tidied = "\n".join(kept).strip("\n")
    counts["blanks"] += tidied != text
    return tidied


def _tidy(line: str) -> str:
    """A line of prose with one blank for several, and none beside tabs."""
    body = line.lstrip(" ")
    if "\t" in body:
        body = "\t".join([cell.strip(" ") for cell in body.split("\t")])
    while "  " in body:
        body = body.replace("  ", " ")
    return line[: len(line) - len(line.lstrip(" "))] + body
