"""Repetition inside a text: parts that were there before, and n-grams of words (Gopher, arXiv:2112.11446, table A1).

    lines, line_letters              share of lines, of letters, in lines that were there before (between line feeds)
    paragraphs, paragraph_letters    likewise; between empty lines
    top_2 .. top_4                   share of letters in the most frequent n-gram: as often as it is there, blanks between words counted
    again_5 .. again_10              share of letters in n-grams of words that were there before, each letter once

Parts and n-grams are compared by 64-bit hashes of their letters and words, so "ab c" is another than "a bc".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatrain.corpus.rules.hashed import Hashes, Numbers, Slots, Where
from megatrain.corpus.words import jit, mixed

PARTS = ("lines", "line_letters", "paragraphs", "paragraph_letters")
GRAMS = (*(f"top_{n}" for n in (2, 3, 4)), *(f"again_{n}" for n in range(5, 11)))
BASE = np.uint64(0x9E3779B97F4A7C15)


@jit
def _slot(keys: Hashes, used: Slots, mark: int, key: np.uint64) -> int:
    """The place of a key in a hash table whose size is a power of two, its own or the free one that it would take."""
    mask = np.uint64(len(keys) - 1)
    at = key & mask
    while used[at] == mark and keys[at] != key:
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@jit
def _again(hashes: Hashes, sizes: Where, keys: Hashes, used: Slots, mark: int) -> tuple[int, int]:
    """(how many parts were there before, their letters)."""
    parts, length = 0, 0
    for i in range(len(hashes)):
        at = _slot(keys, used, mark, hashes[i])
        if used[at] == mark:
            parts += 1
            length += sizes[i]
        else:
            used[at], keys[at] = mark, hashes[i]
    return parts, length


@jit
def _grams(
    hashes: Hashes, sizes: Where, keys: Hashes, used: Slots, counts: Slots, first: Slots, mark: int, out: Numbers
) -> None:
    """Fill in GRAMS, in letters; takes nine marks. The hash of n words follows from that of the n before it (Karp and Rabin)."""
    words, power = len(hashes), BASE
    for n in range(2, 11):
        rolling = np.uint64(0)
        for i in range(min(n - 1, words)):
            rolling = rolling * BASE + hashes[i]
        best, best_at, length, i, after = 0, 0, 0, 0, 0
        while i + n <= words:
            rolling = rolling * BASE + hashes[i + n - 1]
            key = mixed(rolling)
            rolling -= hashes[i] * power
            at = _slot(keys, used, mark, key)
            known = used[at] == mark
            if n < 5:
                if not known:
                    used[at], keys[at], counts[at], first[at] = mark, key, 0, i
                counts[at] += 1
                if counts[at] > best or (counts[at] == best and first[at] < best_at):
                    best, best_at = counts[at], first[at]
            elif i >= after:
                if known:
                    for j in range(i, i + n):
                        length += sizes[j]
                    after = i + n
                else:
                    used[at], keys[at] = mark, key
            i += 1
        for j in range(best_at, best_at + n):
            length += sizes[j] if best else 0
        out[n - 2] = best * (length + n - 1) if n < 5 else length
        mark += 1
        power *= BASE
        if n > 4 and length == 0:
            break


@jit
def _often(hashes: Hashes, n: int, keys: Hashes, used: Slots, first: Slots, mark: int, times: Where) -> int:
    """Fill in how often each different n-gram is there, in the order of their first; their number."""
    rolling, power, count = np.uint64(0), np.uint64(1), 0
    for _ in range(n - 1):
        power *= BASE
    for i in range(len(hashes)):
        rolling = rolling * BASE + hashes[i]
        if i >= n - 1:
            key = mixed(rolling)
            at = _slot(keys, used, mark, key)
            if used[at] != mark:
                used[at], keys[at], first[at], times[count] = mark, key, count, 0
                count += 1
            times[first[at]] += 1
            rolling -= hashes[i - n + 1] * power
    return count


class Scratch(NamedTuple):
    """Part of the working memory, a power of two of places; what is there under another mark is nothing."""

    keys: Hashes
    used: Slots
    counts: Slots
    first: Slots


class Repeats:
    """Working memory of the repetition signals, which grows with the longest text. What it says of a text depends on that text alone."""

    def __init__(self) -> None:
        self._mark = 0
        self._make(1 << 12)

    def _make(self, size: int) -> None:
        self._keys, self._used = np.empty(size, np.uint64), np.zeros(size, np.int32)
        self._counts, self._first = np.empty(size, np.int32), np.empty(size, np.int32)

    def _room(self, parts: int, marks: int) -> tuple[Scratch, int]:
        """(room for so many parts and little more, which stays in the processor's memory; the first of so many marks that it has not)."""
        size = 1 << max(4, 2 * parts - 1).bit_length()
        if size > len(self._keys) or self._mark > 1 << 30:
            self._mark = 0
            self._make(max(len(self._keys), size))
        self._mark += marks
        return Scratch(self._keys[:size], self._used[:size], self._counts[:size], self._first[:size]), self._mark - marks + 1

    def again(self, hashes: Hashes, sizes: Where) -> tuple[int, int]:
        """(how many parts were there before, their letters)."""
        table, mark = self._room(len(hashes), 1)
        parts, length = _again(hashes, sizes, table.keys, table.used, mark)
        return int(parts), int(length)

    def grams(self, hashes: Hashes, sizes: Where) -> Numbers:
        """Letters of top_2 .. top_4 and again_5 .. again_10 [9]."""
        (table, mark), out = self._room(len(hashes), len(GRAMS)), np.zeros(len(GRAMS))
        _grams(hashes, sizes, *table, mark, out)
        return out

    def often(self, hashes: Hashes, n: int) -> Where:
        """How often each different n-gram is there [different ones]."""
        (table, mark), times = self._room(len(hashes), 1), np.empty(len(hashes), np.int64)
        return times[: _often(hashes, n, table.keys, table.used, table.first, mark, times)]
