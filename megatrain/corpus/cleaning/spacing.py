"""Blanks within lines, at their ends and between paragraphs; and which lines of a text may be code, whose blanks say something."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from megatrain.corpus.cleaning.characters import unusual

OTHER = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
"""Blanks of Unicode but the plain one: no-break, of a width, ideographic."""
INDENTED_BY_OTHER = re.compile(
    "^[ \t]*[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000][ \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]*", re.MULTILINE
)
UNTIDY = re.compile("  |\t| \n|\n\n\n")
EMPTY_LINES = re.compile("\n\n\n+")
INDENTED = ("    ", "\t")
"""How a line of code begins in Markdown and reStructuredText."""
FENCE = re.compile(" {0,3}(`{3,})[^`]*")


def fenced_lines(text: str, lines: Sequence[str]) -> set[int]:
    """Numbers of the lines of a text between fences of Markdown, and of the fences; one that is not closed is none."""
    found: set[int] = set()
    opened, ticks = -1, ""
    for number in [number for number, line in enumerate(lines) if "```" in line] if "```" in text else ():
        fence = FENCE.fullmatch(lines[number])
        if fence is None:
            continue
        if opened < 0:
            opened, ticks = number, fence[1]
        elif set(lines[number].strip(" ")) == {"`"} and len(fence[1]) >= len(ticks):
            found.update(range(opened, number + 1))
            opened = -1
    return found


def code_lines(text: str, lines: Sequence[str]) -> list[bool]:
    """Whether each line of a text may be code: it is indented by four blanks or a tab, or lies between fences of Markdown."""
    fenced = fenced_lines(text, lines)
    return [number in fenced or (line.startswith(INDENTED) and not line.isspace()) for number, line in enumerate(lines)]


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
    fenced = fenced_lines(text, lines)
    if " \n" in text or "\t\n" in text or text[-1:] in " \t":
        lines = [line.rstrip(" \t") for line in lines]
    for number in [number for number, line in enumerate(lines) if "  " in line or "\t" in line]:
        if not lines[number].startswith(INDENTED) and number not in fenced:
            lines[number] = _tidy(lines[number])
    tidied = "\n".join(lines).strip("\n")
    if "\n\n\n" in tidied:
        tidied = _with_few_empty_lines(lines, fenced) if fenced else EMPTY_LINES.sub("\n\n", tidied)
    counts["blanks"] += tidied != text
    return tidied


def _with_few_empty_lines(lines: Sequence[str], fenced: Collection[int]) -> str:
    """Lines with one empty line for several, but between fences."""
    kept: list[str] = []
    for number, line in enumerate(lines):
        if line or (kept and kept[-1]) or number in fenced:
            kept.append(line)
    return "\n".join(kept).strip("\n")


def _tidy(line: str) -> str:
    """A line of prose with one blank for several, and none beside tabs."""
    body = line.lstrip(" ")
    indent = line[: len(line) - len(body)]
    if "\t" in body:
        body = "\t".join([cell.strip(" ") for cell in body.split("\t")])
    while "  " in body:
        body = body.replace("  ", " ")
    return indent + body
