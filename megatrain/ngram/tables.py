"""Joins the n-grams of all parts of a text into one table an order: numbers within parts become global, and contexts are found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.ngram.column import Column
from megatrain.ngram.grams import NONE, PartCounts, PartFiles, PositionRange, part_at
from megatrain.ngram.text import BEGIN, END, Corpus

Ids = npt.NDArray[np.uint32]
SCAN = 1 << 20
"""Number of word positions processed at a time."""


@dataclass
class Tables:
    """The n-grams of orders 1 .. order; those of order 1 are the words, in memory."""

    corpus: Corpus
    order: int
    parts: list[PositionRange]
    counts: list[PartCounts]
    folder: Path
    raw: npt.NDArray[np.int64] = field(init=False)
    """[words] occurrences; 0 for <unk> and <s>."""
    adjusted: npt.NDArray[np.int64] = field(init=False)
    """[words] number of distinct words before each; in a model of order 1 occurrences."""

    def __post_init__(self) -> None:
        size = self.corpus.vocabulary.size
        self.raw = np.zeros(size, np.int64)
        children = np.zeros(size, np.int64)
        for part, found in zip(self.parts, self.counts, strict=True):
            self.raw[part.first_word : part.end_word] += found.unigram_raw
            children[part.first_word : part.end_word] += found.unigram_children
        self.adjusted = self.raw if self.order == 1 else children
        self._starts = {k: np.cumsum([0, *(found.sizes[k - 2] for found in self.counts)]) for k in range(2, self.order + 1)}

    def size(self, order: int) -> int:
        """Number of n-grams of an order, pruned ones included."""
        return self.corpus.vocabulary.size if order == 1 else int(self._starts[order][-1])

    def files(self, part: PositionRange) -> PartFiles:
        """The files of a part."""
        return PartFiles(self.folder, part)

    def span(self, order: int, part: PositionRange) -> tuple[int, int]:
        """(first, end): the numbers of a part's n-grams of an order of 2 or more are first .. end - 1."""
        starts = self._starts[order]
        return int(starts[part.number]), int(starts[part.number + 1])

    def whole(self, order: int, name: str) -> Column:
        """A column over all n-grams of an order: uint32 for `prefix`, else float32."""
        return Column(self.folder / f"all.{order}.{name}", np.uint32 if name == "prefix" else np.float32)

    def counts_of_counts(self, order: int) -> list[int]:
        """Number of n-grams with adjusted counts 0, 1, 2, 3, 4, with the one that lmplz counts by its raw count (docs/ngram.md)."""
        if order == 1:
            found = np.bincount(np.minimum(self.adjusted[2:], 5), minlength=6)[:5]
        else:
            found = np.sum([part.counts_of_counts[order - 2] for part in self.counts], 0)
        counts = [int(n) for n in found]
        for k, raw, adjusted in self._last_suffixes():
            if k == order:
                for count, change in ((adjusted, -1), (raw, 1)):
                    if count < 5:
                        counts[count] += change
        return counts

    def _last_suffixes(self) -> Iterator[tuple[int, int, int]]:
        """(order, raw, adjusted) of the suffixes of the last n-gram in suffix order, up to the first suffix that begins with <s>."""
        if self.order == 1 or not self.raw[2:].any():
            return
        word = int(np.flatnonzero(self.raw)[-1])
        yield 1, int(self.raw[word]), int(self.adjusted[word])
        last_part = next(
            found for part, found in zip(self.parts[::-1], self.counts[::-1], strict=True) if found.unigram_raw.any()
        )
        for k in range(2, self.order):
            first, raw, adjusted = last_part.last[k - 2]
            yield k, raw, adjusted
            if first == BEGIN:
                return

    # --- contexts -----------------------------------------------------------------------------------------------------------

    def find_prefixes(self, order: int, held: int) -> None:
        """Write the `prefix` of every n-gram of an order: the number of the (order - 1)-gram that it begins with.

        held: number of values that may be in memory at a time.
        """
        column = self.whole(order, "prefix")
        if order == 2:
            for part in self.parts:
                column.append(self.files(part).column(2, "first").read())
            return
        for low in range(0, self.size(order), held):
            high = min(low + held, self.size(order))
            prefix = np.zeros(high - low, np.uint32)
            before = NONE
            for longer, shorter in zip(self._at(order), self._at(order - 1), strict=True):
                here = (longer >= low) & (longer < high)
                shifted = np.concatenate([[before], shorter[:-1]]).astype(np.uint32)
                prefix[longer[here] - np.uint32(low)] = shifted[here]
                before = shorter[-1]
            column.append(prefix)

    def _at(self, order: int) -> Iterator[Ids]:
        """The number of the n-gram that ends at each position of the text, a stretch at a time; NONE if there is none."""
        part_of = part_at(self.parts, self.corpus.vocabulary.size)
        read = np.zeros(len(self.parts), np.int64)
        before = np.uint32(END)
        for first in range(0, len(self.corpus.ids), SCAN):
            words = self.corpus.ids.read(first, min(first + SCAN, len(self.corpus.ids)))
            of = part_of(words, np.concatenate([[before], words[:-1]]).astype(np.uint32))
            before = words[-1]
            by_part = np.argsort(of, kind="stable")
            values: list[Ids] = []
            for number, count in enumerate(np.bincount(of, minlength=len(self.parts)).tolist()):
                part = self.parts[number]
                mine = self.files(part).column(order, "at").read(int(read[number]), int(read[number]) + count)
                values.append(np.where(mine == NONE, NONE, mine + np.uint32(self.span(order, part)[0])))
                read[number] += count
            result = np.empty(of.size, np.uint32)
            result[by_part] = np.concatenate(values)
            yield result


def kept(raw: npt.NDArray[np.uint32], threshold: int) -> npt.NDArray[np.bool_]:
    """Whether pruning keeps each n-gram: whether it occurs more often than the threshold."""
    return raw > threshold


def pruning(values: Sequence[int], order: int) -> tuple[int, ...]:
    """The threshold of each order; the last given repeats. Raises ValueError for decreasing or negative thresholds, or too many."""
    if len(values) > order:
        raise ValueError(f"--prune has {len(values)} thresholds, and the model's order is {order}. Give at most {order}.")
    padded = (*values, *[values[-1] if values else 0] * (order - len(values)))
    if any(b < a for a, b in pairwise(padded)) or any(value < 0 for value in padded):
        raise ValueError(
            f"--prune {' '.join(map(str, values))}: thresholds must not fall, nor be negative. Use for example --prune 0 0 1."
        )
    return padded
