"""Finds every distinct n-gram of a text with its counts, in suffix order: sorted by the last word, then the one before, up to the first.

Word positions are divided by their last word into parts that fit in memory. n-grams that share a suffix are in one part, so a part can
count its own completely. Within a part, order k follows from order k - 1:

    key of a position = (number of its (k-1)-gram) << 32 | word k - 1 places before it          one sort makes the k-grams of a part

The number of the k-gram at each position is also written, in the order of positions. The prefix of the k-gram that ends at p is the
(k-1)-gram that ends at p - 1: so contexts are found without comparing words (`tables.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.ngram.column import Column
from megatrain.ngram.text import BEGIN, END

NONE = np.uint32(0xFFFFFFFF)
"""Stands for: no n-gram of this order ends here, as it would begin before its sentence."""
SCAN = 1 << 20
"""Number of word positions processed at a time."""
SAMPLE, SAMPLED = 1 << 16, 1 << 22
"""Positions in a stretch, and in all stretches, of the sample that counts the words before common words."""
ANY = 1 << 32
"""Larger than any word number."""

Ids = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PositionRange:
    """Positions whose word is in first_word .. end_word - 1 and whose previous word is in first_before .. end_before - 1."""

    number: int
    first_word: int
    end_word: int
    first_before: int = 0
    end_before: int = ANY


def parts_of(counts: Counts, size: int, ids: Column | None = None) -> list[PositionRange]:
    """Parts of about `size` positions, by ranges of words; positions of a more frequent word are divided by the word before."""
    found: list[PositionRange] = []
    ends = np.cumsum(counts)
    first, before = 0, 0
    common = np.flatnonzero(counts > size)
    cuts = _cuts(ids, common, counts, size) if ids is not None and common.size else {}
    while first < counts.size:
        end = max(int(np.searchsorted(ends, before + size, side="right")), first + 1)
        edges = [0, *cuts.get(first, []), ANY]
        found += [PositionRange(len(found) + n, first, end, *pair) for n, pair in enumerate(pairwise(edges))]
        first, before = end, int(ends[end - 1])
    return found


def _cuts(ids: Column, words: npt.NDArray[np.int64], counts: Counts, size: int) -> dict[int, list[int]]:
    """For each of `words`: numbers of previous words at which to cut its positions into pieces of about `size`, from a sample."""
    seen: dict[int, list[Ids]] = {int(word): [] for word in words}
    total = len(ids)
    step = max(SAMPLE, total // (SAMPLED // SAMPLE))
    for first in range(0, total, step):
        block = ids.read(first, min(first + SAMPLE, total))
        at = np.flatnonzero(np.isin(block[1:], words)) + 1
        before, here = _before(block[at - 1]), block[at]
        for word in np.unique(here).tolist():
            seen[word].append(before[here == word])
    cuts: dict[int, list[int]] = {}
    for word, stretches in seen.items():
        pieces = -(-int(counts[word]) // size)
        ordered = np.sort(np.concatenate([*stretches, np.zeros(0, np.uint32)]))
        marks = ordered[(np.arange(1, pieces) * ordered.size) // pieces] if ordered.size else ordered
        cuts[word] = sorted({int(mark) + 1 for mark in marks})
    return cuts


def _before(words: Ids) -> Ids:
    """Previous words as n-grams have them: BEGIN in place of the END of the sentence before."""
    return np.where(words == END, np.uint32(BEGIN), words)


def part_at(parts: list[PositionRange], size: int) -> Callable[[Ids, Ids], npt.NDArray[np.uint16]]:
    """A function (words, words before them) -> the number of each position's part. size: of the vocabulary."""
    home = np.zeros(size, np.uint16)
    several: dict[int, list[PositionRange]] = {}
    for part in reversed(parts):
        home[part.first_word : part.end_word] = part.number
        if (part.first_before, part.end_before) != (0, ANY):
            several.setdefault(part.first_word, []).insert(0, part)

    def find(words: Ids, before: Ids) -> npt.NDArray[np.uint16]:
        found = home[words]
        for word, of in several.items():
            mine = np.flatnonzero(words == word)
            edges = np.array([part.end_before for part in of[:-1]], np.int64)
            found[mine] = of[0].number + np.searchsorted(edges, _before(before[mine]), side="right")
        return found

    return find


@dataclass(frozen=True)
class PartFiles:
    """The files of a part, for orders k = 2 .. N; n-grams are numbered within the part."""

    folder: Path
    part: PositionRange

    def column(self, order: int, name: str) -> Column:
        """A column by name: for each n-gram in suffix order its `first` word, number of its `suffix` (a word for order 2), `raw` and
        `adjusted` count; and `at`: for each of the part's positions the number of the n-gram that ends there, or NONE."""
        return Column(self.folder / f"{self.part.number}.{order}.{name}", np.uint32)


@dataclass(frozen=True)
class PartCounts:
    """The counts of a part's n-grams."""

    sizes: list[int]
    """Number of n-grams of orders 2 .. N."""
    unigram_raw: Counts
    """[words of the part] occurrences of each word."""
    unigram_children: Counts
    """[words of the part] number of distinct words before each, <s> included."""
    counts_of_counts: Counts
    """[N - 1, 5] for orders 2 .. N: number of n-grams with adjusted counts 0 (always none), 1, 2, 3, 4."""
    last: list[tuple[int, int, int]]
    """(first word, raw, adjusted) of the last n-gram of each order 2 .. N; (0, 0, 0) if there is none."""


def part_positions(ids: Column, part: PositionRange, order: int) -> Iterator[tuple[Ids, list[Ids]]]:
    """For each stretch of the text: [n] the part's words, and for j = 1 .. order - 1 the words j places before them.

    BEGIN stands for the start of the sentence, and NONE for places before that.
    """
    total, back = len(ids), order - 1
    for first in range(0, total, SCAN):
        block = ids.read(max(first - back, 0), min(first + SCAN, total))
        if first < back:
            block = np.concatenate([np.full(back - first, END, np.uint32), block])
        mine = block[back:]
        at = np.flatnonzero((mine >= part.first_word) & (mine < part.end_word)) + back
        if order > 1 and (part.first_before, part.end_before) != (0, ANY):
            first_word_before = _before(block[at - 1])
            at = at[(first_word_before >= part.first_before) & (first_word_before < part.end_before)]
        before: list[Ids] = []
        over = np.zeros(at.size, bool)
        for j in range(1, order):
            words = block[at - j]
            ends = words == END
            words = np.where(over, NONE, np.where(ends, np.uint32(BEGIN), words))
            over |= ends
            before.append(words)
        yield block[at], before


def count_part(ids: Column, part: PositionRange, order: int, folder: Path) -> PartCounts:
    """Find the n-grams of a part and write its files; returns its counts."""
    files = PartFiles(folder, part)
    stretches = list(part_positions(ids, part, order))
    words = np.concatenate([stretch[0] for stretch in stretches])
    before = [np.concatenate([stretch[1][j] for stretch in stretches]) for j in range(order - 1)]
    del stretches
    width = part.end_word - part.first_word
    raw = np.bincount(words - np.uint32(part.first_word), minlength=width)
    children = np.zeros(width, np.int64)
    counts_of_counts = np.zeros((max(order - 1, 0), 5), np.int64)
    sizes: list[int] = []
    last: list[tuple[int, int, int]] = []
    numbers = words - np.uint32(part.first_word)
    held: tuple[Ids, Ids] | None = None  # first words and raw counts of the previous order
    where = np.arange(words.size)
    for k in range(2, order + 1):
        longer = before[k - 2][where] != NONE
        where, numbers = where[longer], numbers[longer]
        keys, numbers = _ranked(numbers.astype(np.uint64) << np.uint64(32) | before[k - 2][where])
        starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
        firsts, suffixes = (
            (keys[starts] & np.uint64(0xFFFFFFFF)).astype(np.uint32),
            (keys[starts] >> np.uint64(32)).astype(np.uint32),
        )
        counts = np.diff(starts, append=keys.size).astype(np.uint32)
        at = np.full(words.size, NONE, np.uint32)
        at[where] = numbers
        extended = np.bincount(suffixes, minlength=sizes[-1] if sizes else width)
        if held is None:
            children = extended
        else:
            _finish(files, k - 1, held, extended, counts_of_counts, last)
        base = np.uint32(part.first_word if k == 2 else 0)
        for name, values in (("at", at), ("first", firsts), ("suffix", suffixes + base), ("raw", counts)):
            files.column(k, name).append(values)
        held = firsts, counts
        sizes.append(firsts.size)
    if held is not None:
        _finish(files, order, held, None, counts_of_counts, last)
    return PartCounts(sizes, raw, children, counts_of_counts, last)


def _ranked(keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], Ids]:
    """Keys in order, and for each key the number of distinct smaller ones."""
    order = np.argsort(keys)
    ordered = keys[order]
    rank = np.zeros(keys.size, np.uint32)
    if keys.size:
        rank[1:] = np.cumsum(ordered[1:] != ordered[:-1], dtype=np.uint32)
    numbers = np.empty_like(rank)
    numbers[order] = rank
    return ordered, numbers


def _finish(
    files: PartFiles,
    order: int,
    held: tuple[Ids, Ids],
    extended: Counts | None,
    counts_of_counts: Counts,
    last: list[tuple[int, int, int]],
) -> None:
    """Write the adjusted counts of an order: distinct words before each n-gram, or its own count where no word can stand before it."""
    firsts, raw = held
    adjusted = raw if extended is None else np.where(firsts == BEGIN, raw, extended.astype(np.uint32))
    files.column(order, "adjusted").append(adjusted)
    counts_of_counts[order - 2] = np.bincount(np.minimum(adjusted, 5), minlength=6)[:5]
    last.append((int(firsts[-1]), int(raw[-1]), int(adjusted[-1])) if firsts.size else (0, 0, 0))
