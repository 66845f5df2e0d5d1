"""One text as the rules look at it: its letters, words and lines, each found once, when a rule first asks.

A text of any length is looked at in bounded memory: of a longer one than LONGEST, its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np

from megatrain.corpus.letters import SPACE
from megatrain.corpus.rules.affixes import spacy_words
from megatrain.corpus.rules.hashed import Hashes, Letters, hashes_of
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.words import Extents, Text, jit

LONGEST = 1 << 21
"""Letters of a text that rules look at; the rest of a longer one has no say. A book of 300,000 words is shorter."""

LONGEST_ROW = 50_000
"""Letters of a line that are cut into words by jieba at once, since it takes 400 bytes for each; a longer line is cut there too."""

Words = Literal["blanks", "marks", "han", "spacy", "jieba"]
"""A table of words: one of megatrain.corpus.words, those of affixes.py, or the words that jieba finds in Chinese."""
Segmenter = Callable[[str], list[str]]
"""Cuts a text into words, blanks among them, that are the text when joined."""


@jit
def _inside(letters: Letters) -> tuple[int, int]:
    """Where a text begins and ends without the blanks at its ends."""
    begin, end = 0, len(letters)
    while end > 0 and letters[end - 1] & SPACE:
        end -= 1
    while begin < end and letters[begin] & SPACE:
        begin += 1
    return begin, end


class View:
    """A text, as arrays. repeats: working memory, in which nothing of this text stays; segmenter: for the table `jieba`."""

    def __init__(self, text: str, repeats: Repeats, segmenter: Segmenter | None = None) -> None:
        self.text = text[:LONGEST]
        self.repeats = repeats
        self._segmenter = segmenter
        self._words: dict[Words, Extents] = {}
        self._hashes: dict[Words, Hashes] = {}

    def of(self, text: str) -> View:
        """Another text, seen with the same tools."""
        return View(text, self.repeats, self._segmenter)

    @cached_property
    def arrays(self) -> Text:
        """Code points and their classes."""
        return Text.of(self.text)

    @cached_property
    def lines(self) -> Extents:
        """The lines, as str.splitlines has them."""
        return self.arrays.lines()

    @cached_property
    def stripped(self) -> Text:
        """The text without blanks at its ends, as str.strip has it."""
        codes, letters = self.arrays
        begin, end = _inside(letters)
        return Text(codes[begin:end], letters[begin:end])

    def words(self, table: Words) -> Extents:
        """The words of a table."""
        if table not in self._words:
            self._words[table] = self._find(table)
        return self._words[table]

    def _find(self, table: Words) -> Extents:
        if table == "jieba":
            return self._segmented()
        return spacy_words(self.arrays) if table == "spacy" else self.arrays.words(table)

    def hashes(self, table: Words) -> Hashes:
        """The hashes of the words of a table [words]."""
        if table not in self._hashes:
            self._hashes[table] = hashes_of(self.arrays.codes, self.words(table))
        return self._hashes[table]

    def _segmented(self) -> Extents:
        if self._segmenter is None:
            raise ValueError("a view without a segmenter has no words of the table jieba")
        lines = self.text.splitlines(keepends=True)
        rows = (line[at : at + LONGEST_ROW] for line in lines for at in range(0, len(line), LONGEST_ROW))
        parts = [word for row in rows for word in self._segmenter(row)]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        full = np.fromiter((not part.isspace() for part in parts), bool, len(parts))
        return Extents(np.concatenate([[0], ends[:-1]])[: len(parts)][full], ends[full])
