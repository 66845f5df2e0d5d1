"""Rules that act on lines: C4's (arXiv:1910.10683, section 2.2), MAP-NEO's, WuDao's. A line that breaks one goes; the document stays.

Signals of a line, without the blanks at its ends:

    citations    how often `[1]`, `[edit]` or `[citation needed]` is in it: these marks go, the line stays
    long_word    letters of its longest word
    line_end     1 where it ends in a mark that ends a sentence (and not in `...`, for C4), else 0
    line_words   its words
    line_han     Chinese characters in it
    javascript   how often it says so
    policy       how often it speaks of terms and cookies

and those of a document, counted in the lines that are left when their turn comes:

    lorem_ipsum, curly_bracket   how often it has them
    sentences                    how many there are, in the lines that stay

A text of any length is looked at in pieces, cut between lines, so memory is bounded. Of a line longer than LONGEST, the beginning and the
end are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megatrain.corpus.letters import HAN, MARK, SPACE
from megatrain.corpus.rules.hashed import Codes, Flags, Letters, Where
from megatrain.corpus.rules.rulebook import MEETS, TextRule
from megatrain.corpus.rules.view import LONGEST, View
from megatrain.corpus.words import Text, jit

CITATIONS = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
PHRASES = {
    "lorem_ipsum": ("lorem ipsum",),
    "javascript": ("javascript",),
    "policy": ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
}
BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""The end of a line, as str.splitlines has it."""
TAIL = 1000
"""Letters at the end of a longer line than LONGEST that are looked at, with its beginning."""
ORDER = ("long_word", "line_end", "line_words", "line_han", "lorem_ipsum", "javascript", "curly_bracket", "policy")
"""The turns of the rules, as in C4's own program."""
BOUNDS = tuple(MEETS)
POINT, CURLY = np.uint32(ord(".")), np.uint32(ord("{"))
STOPS = np.array([ord(mark) for mark in ".!?"], np.uint32)
CLOSERS = np.array([ord(mark) for mark in "\"')]’”"], np.uint32)
FINAL = {
    "c4": np.array([ord(mark) for mark in ".?!\"'"], np.uint32),
    "zh": np.array([ord(mark) for mark in ".?!…。！？"], np.uint32),
}
"""Marks in which a line may end."""


@jit
def _among(code: np.uint32, marks: Codes) -> bool:
    """Whether a code point is one of a few."""
    found = False
    for mark in marks:
        found |= code == mark
    return found


@jit
def _sentences(codes: Codes, letters: Letters, begin: int, end: int) -> int:
    """Sentences of a line: one more than the places where marks that end one, and closing ones, are followed by a blank."""
    count, i = min(end - begin, 1), begin
    while i < end:
        if _among(codes[i], STOPS):
            while i < end and _among(codes[i], STOPS):
                i += 1
            while i < end and _among(codes[i], CLOSERS):
                i += 1
            count += i < end and bool(letters[i] & SPACE)
        else:
            i += 1
    return count


@jit
def _measure(
    codes: Codes, letters: Letters, starts: Where, ends: Where, alone: np.uint16, final: Codes, c4: bool, out: Where
) -> None:
    """Fill in each line's begin, end, longest word, words, mark at its end, curly brackets, Chinese characters, sentences [8, lines].

    alone: classes of letters that are words by themselves; c4: words of marks alone count, and `...` is no end.
    """
    for line in range(len(starts)):
        begin, end = starts[line], ends[line]
        while begin < end and letters[begin] & SPACE:
            begin += 1
        while end > begin and letters[end - 1] & SPACE:
            end -= 1
        longest, words, size, counts, curly, han = 0, 0, 0, c4, 0, 0
        for i in range(begin, end):
            curly += codes[i] == CURLY
            han += bool(letters[i] & HAN)
            single = bool(letters[i] & alone)
            if single or letters[i] & SPACE:
                words += size > 0 and counts
                size, counts = 0, c4
            if not letters[i] & SPACE:
                size += 1
                counts = counts or not letters[i] & MARK
                longest = max(longest, size)
            if single:
                words += counts
                size, counts = 0, c4
        words += size > 0 and counts
        dots = end - begin >= 3 and codes[end - 1] == POINT and codes[end - 2] == POINT and codes[end - 3] == POINT
        ended = end > begin and _among(codes[end - 1], final) and not (c4 and dots)
        out[0, line], out[1, line], out[2, line], out[3, line], out[4, line] = begin, end, longest, words, ended
        out[5, line], out[6, line], out[7, line] = curly, han, _sentences(codes, letters, begin, end)


def pieces(text: str, size: int = LONGEST) -> Iterator[str]:
    """A text in pieces of whole lines, of at most so many letters; a longer line is a piece of its own."""
    begin = 0
    while begin < len(text):
        end = begin + size
        if end < len(text):
            lines = text[begin:end].splitlines(keepends=True)
            if len(lines) > 1:
                end -= len(lines[-1])
            else:
                found = BREAK.search(text, end - 1)
                end = found.end() if found else len(text)
        yield text[begin:end]
        begin = end


@jit
def _sum(values: Where, alive: Flags) -> int:
    """The sum over the lines that are left."""
    total = 0
    for line in range(len(alive)):
        total += values[line] if alive[line] else 0
    return total


@jit
def _take(values: Where, bound: int, threshold: float, alive: Flags) -> int:
    """Take out of the lines that are left those that do not meet a bound, by its place in BOUNDS; their number."""
    taken = 0
    for line in range(len(alive)):
        value = values[line]
        holds = (
            value >= threshold
            if bound == 0
            else value <= threshold
            if bound == 1
            else value > threshold
            if bound == 2
            else value < threshold
        )
        taken += alive[line] and not holds
        alive[line] = alive[line] and holds
    return taken


def _found(low: str, phrases: Sequence[str], starts: Where) -> Where | None:
    """How often some phrases are in each line of a text in small letters [lines]; None where none of them is."""
    at = []
    for phrase in phrases:
        found = low.find(phrase)
        while found >= 0:
            at.append(found)
            found = low.find(phrase, found + len(phrase))
    return np.bincount(np.searchsorted(starts, at, "right") - 1, minlength=len(starts)) if at else None


class Edited(NamedTuple):
    """A text whose lines have been judged."""

    text: str
    """The lines that stay, without the blanks at their ends; where no rule of lines was asked for, the text as it was."""
    removed: Mapping[str, int]
    """Lines, or citations, that each rule took, by its name."""
    signals: Mapping[str, float]
    """By name: of a rule of lines the share of lines that it took; of the document, counts in the lines left."""


class LineEditor:
    """Takes the lines away that break rules. rules: of one set; those of lines among them are followed."""

    def __init__(self, rules: Sequence[TextRule]) -> None:
        self._c4, self._final = rules[0].of == "c4", FINAL["c4" if rules[0].of == "c4" else "zh"]
        self._alone = np.uint16(0) if self._c4 else MARK | HAN
        self._rules = {rule.signal.partition(".")[2]: rule for rule in rules if rule.acts == "line"}

    def __call__(self, text: str, view: View | None = None) -> Edited:
        """The lines that stay, and what was found. view: of the same text, for what was found of it before."""
        kept: list[str] = []
        removed = dict.fromkeys(self._rules, 0)
        left = dict.fromkeys(("lorem_ipsum", "curly_bracket", "sentences"), 0)
        lines = 0
        for part in pieces(text):
            lines += self._edit(part, kept, removed, left, view)
        signals = {name: number / max(lines, 1) for name, number in removed.items()}
        names = {self._rules[name].name: number for name, number in removed.items() if number}
        signals |= {name: float(count) for name, count in left.items() if name not in signals}
        return Edited("\n".join(kept).strip() if self._rules else text, names, signals)

    def _edit(self, part: str, kept: list[str], removed: dict[str, int], left: dict[str, int], view: View | None) -> int:
        """Add what stays of a piece, and the counts; its lines."""
        if "citations" in self._rules and "[" in part:
            part, citations = CITATIONS.subn("", part)
            removed["citations"] += citations
        seen = part if len(part) <= LONGEST else part[: LONGEST - TAIL] + part[-TAIL:]
        known = view is not None and view.text == seen
        arrays = view.arrays if view is not None and known else Text.of(seen)
        starts, ends = view.lines if view is not None and known else arrays.lines()
        out = np.empty((8, len(starts)), np.int64)
        _measure(arrays.codes, arrays.letters, starts, ends, self._alone, self._final, self._c4, out)
        begin, end, long_word, words, ended, curly, han, sentences = out
        signals = {"long_word": long_word, "line_words": words, "line_end": ended, "curly_bracket": curly, "line_han": han}
        low = seen.replace("İ", "ı").lower()  # the one letter whose small form is two
        alive = np.ones(len(starts), bool)
        for name in ORDER:
            rule = self._rules.get(name)
            if rule is None and name not in left:
                continue
            values = _found(low, PHRASES[name], starts) if name in PHRASES else signals[name]
            if rule is None:
                left[name] += _sum(values, alive) if values is not None else 0
            elif values is not None or not rule.holds(0):
                values = np.zeros(len(starts), np.int64) if values is None else values
                removed[name] += _take(values, BOUNDS.index(rule.bound), rule.threshold, alive)
        left["sentences"] += _sum(sentences, alive)
        if seen is part:
            kept += [part[a:b] for a, b in zip(begin[alive].tolist(), end[alive].tolist(), strict=True)]
        elif alive.all():
            kept.append(part.strip())
        return len(starts)
