"""Positions of a sequence's tokens: from left to right, or those of GLM, where part A is seen by all and part B fills its blanks.

    text ... [gMASK] ... | <sop> answer ...     part A ends before the first <sop>; each segment of part B begins with one
    dim 1    0 1 2 ...   | m m m m              m: place of the blank that the segment fills
    dim 2    0 0 0 ...   | 1 2 3 4              place within the segment

With one-dimensional positions (GLM-130B) a segment that fills a [gMASK] counts on instead of staying at m.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatrain.inference.glm_positions import Marks


class TextPlaces(Protocol):
    """Positions of the tokens of one sequence, prompt and answer."""

    @property
    def prefix(self) -> int:
        """Number of first tokens that all tokens see, earlier ones too."""

    def positions(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions in the text, positions within a blank) of tokens start .. end - 1, int64 each."""

    def root(self, tokens: tuple[int, ...]) -> Hashable:
        """A value on which keys and values depend beside the tokens up to them, the same for a whole text."""

    def stamp(self, start: int, end: int) -> Hashable:
        """A value on which those of tokens start .. end - 1 depend beside `root` and the tokens up to them."""


@dataclass(frozen=True)
class LeftToRight:
    """Each token sees those before it, and its position is its place."""

    prefix: int = 0

    def positions(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """TextPlaces, and zeros."""
        return np.arange(start, end), np.zeros(end - start, np.int64)

    def root(self, _tokens: tuple[int, ...]) -> Hashable:
        """Nothing."""
        return None

    def stamp(self, _start: int, _end: int) -> Hashable:
        """Nothing."""
        return None


LEFT_TO_RIGHT = LeftToRight()


@dataclass(frozen=True)
class Segment:
    """A run of part B, from its <sop> up to the next segment."""

    start: int
    """Place of its <sop> in the sequence."""
    blank: int
    """Place of the blank that it fills."""
    counts_on: bool = False
    """Whether its positions go on with the places of its tokens, instead of staying at the blank's."""


@dataclass(frozen=True)
class BlankPlaces:
    """GLM's positions: part A, then segments that fill its blanks (arXiv:2103.10360, section 2.2)."""

    prefix: int
    """Number of tokens in part A."""
    segments: tuple[Segment, ...]

    def positions(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of part A have their places and 0; those of a segment those of its blank, and the place in it from 1."""
        places = np.arange(start, end)
        first, inside = places.copy(), np.zeros(end - start, np.int64)
        for segment in self.segments:
            within = places >= segment.start
            inside[within] = places[within] - segment.start + 1
            first[within] = places[within] if segment.counts_on else segment.blank
        return first, inside

    def root(self, tokens: tuple[int, ...]) -> Hashable:
        """All of part A, whose tokens see each other."""
        return tokens[: self.prefix]

    def stamp(self, start: int, end: int) -> Hashable:
        """The positions."""
        return tuple(x.tobytes() for x in self.positions(start, end))


def closed(tokens: Sequence[int], marks: Marks) -> list[int]:
    """A text to be answered, with the [gMASK] and <sop> that end a prompt of ChatGLM-6B, as far as they are not there (its own tokenizer
    puts them behind every text)."""
    if marks.sop in tokens:
        return list(tokens)
    blank = [] if marks.gmask in tokens or marks.mask in tokens else [marks.gmask]
    return [*tokens, *blank, marks.sop]


def places_after(tokens: Sequence[int], marks: Marks, two_dimensional: bool) -> TextPlaces:
    """Positions of a prompt that ends in <sop> and of the answer to it; from left to right where it has none (ChatGLM-6B).

    The answer fills the first [gMASK] before <sop>, or else the first [MASK].
    """
    if marks.sop not in tokens:
        return LEFT_TO_RIGHT
    sop = list(tokens).index(marks.sop)
    blanks = [list(tokens).index(mark) for mark in (marks.gmask, marks.mask) if mark in tokens]
    blank = min(blanks[0], max(sop - 1, 0)) if blanks else max(sop - 1, 0)
    counts_on = not two_dimensional and marks.gmask in tokens
    return BlankPlaces(sop, (Segment(sop, blank, counts_on),))
