"""Passages of texts: what a document has in common with an evaluation set, as hashes of 13 words, compared in one loop.

A text is compared in NFKC and lower case, without marks: a word is a run of letters and digits between blanks and marks, and each
Chinese character is a word of its own. A passage begins at every word and is as long as 13 words or 20 Chinese characters are, or any
mixture: a word counts 20, a character 13, and a passage 260 or little more. So the same text has the same passages wherever it stands.

An example that is shorter than a passage is found by its first 8 words, and then compared as a whole. Passages of which not half
are different words with a letter say nothing (rows of numbers, of zeros, one word again and again) and are not looked for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from megatrain.corpus.duplicates.minhash import Codes, Hash64, Where
from megatrain.corpus.letters import HAN, LETTER, MARK, SPACE, classes, code_points, without_piles
from megatrain.corpus.words import MIX, PRIME, SEED, jit, mixed

Short: TypeAlias = npt.NDArray[np.int32]
Flags: TypeAlias = npt.NDArray[np.bool_]
_FOLD = np.uint64(31)


class Lengths(NamedTuple):
    """Counts of a word and a Chinese character; of a passage, at least, and of an example that is shorter."""

    word: int
    character: int
    passage: int
    shortest: int

    @classmethod
    def of(cls, words: int, characters: int, shortest: int) -> Lengths:
        """The counts by which so many words are as long as so many characters."""
        return cls(characters, words, words * characters, min(shortest, words) * characters)


@jit
def _find(
    codes: Codes, table: npt.NDArray[np.uint16], counts: tuple[int, int], hashes: Hash64, sizes: Short, lettered: Flags
) -> int:
    """Fill in the hash of each word, what it counts, and whether it has a letter; their number."""
    word, character = counts
    count, inside, h = 0, False, SEED
    for code in codes:
        of = table[code]
        if of & (SPACE | MARK | HAN):
            if inside:
                hashes[count] = mixed(h)
                count += 1
                inside = False
            if of & HAN:
                hashes[count], sizes[count], lettered[count] = mixed((SEED ^ np.uint64(code)) * PRIME), character, True
                count += 1
        else:
            if not inside:
                h, inside, sizes[count], lettered[count] = SEED, True, word, False
            lettered[count] |= (of & LETTER) != 0
            h = (h ^ np.uint64(code)) * PRIME
    if inside:
        hashes[count] = mixed(h)
        count += 1
    return count


@jit
def _joined(hashes: Hash64, begin: int, end: int) -> np.uint64:
    """Hash of some words that follow each other."""
    h = np.uint64(end - begin)
    for i in range(begin, end):
        h = (h ^ hashes[i]) * MIX
        h ^= h >> _FOLD
    return mixed(h)


@jit
def _says_something(hashes: Hash64, lettered: Flags) -> bool:
    """Whether at least half of some words are different ones with a letter."""
    count = 0
    for i in range(len(hashes)):
        fresh = lettered[i]
        for j in range(i):
            fresh = fresh and hashes[j] != hashes[i]
        count += fresh
    return 2 * count >= len(hashes)


@jit
def _cut(hashes: Hash64, sizes: Short, lettered: Flags, length: int, out: Hash64) -> int:
    """Fill in the hashes of the passages of a length that say something; their number."""
    end, held, count = 0, 0, 0
    for begin in range(len(hashes)):
        while end < len(hashes) and held < length:
            held += sizes[end]
            end += 1
        if held < length:
            break
        if _says_something(hashes[begin:end], lettered[begin:end]):
            out[count] = _joined(hashes, begin, end)
            count += 1
        held -= sizes[begin]
    return count


class Worded(NamedTuple):
    """A text as the hashes of its words [n], what they count, and whether they have a letter."""

    hashes: Hash64
    sizes: Short
    lettered: Flags

    @classmethod
    def of(cls, text: str, lengths: Lengths) -> Worded:
        """The words of a text without lone surrogates."""
        codes = code_points((text if text.isascii() else unicodedata.normalize("NFKC", without_piles(text))).lower())
        hashes, sizes = np.empty(len(codes), np.uint64), np.empty(len(codes), np.int32)
        lettered = np.empty(len(codes), np.bool_)
        count = _find(codes, classes(), (lengths.word, lengths.character), hashes, sizes, lettered)
        return cls(hashes[:count], sizes[:count], lettered[:count])

    def passages(self, length: int) -> Hash64:
        """The hashes of its passages of a length that say something, in order."""
        out = np.empty(len(self.hashes), np.uint64)
        return out[: _cut(self.hashes, self.sizes, self.lettered, length, out)]

    def beginning(self, length: int) -> Hash64:
        """The hash of its first words, so many as have a length [1]."""
        end = int(np.searchsorted(np.cumsum(self.sizes), length)) + 1
        return np.array([_joined(self.hashes, 0, end)], np.uint64)

    @property
    def says_something(self) -> bool:
        """Whether at least half of its words are different ones with a letter."""
        return bool(_says_something(self.hashes, self.lettered))

    @property
    def length(self) -> int:
        """All that its words count."""
        return int(self.sizes.sum(dtype=np.int64))

    @property
    def whole(self) -> int:
        """The hash of all of its words together."""
        return int(_joined(self.hashes, 0, len(self.hashes)))


class Passages(NamedTuple):
    """Passages of evaluation sets, as a hash table: ascending keys [n], with what each belongs to, and where in them a key is."""

    keys: Hash64
    of: Short
    """Number of the set."""
    words: Short
    """Words of the example that begins so; 0: the key is all."""
    whole: Hash64
    """The hash of that example."""
    slots: Short
    """First place in the keys by hash, -1: none; a power of two."""

    @classmethod
    def made(cls, rows: Sequence[tuple[Hash64, int, int, int]]) -> Passages:
        """The table of some keys with the set, words and hash of each group of them."""
        keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, *_ in rows)])
        sizes = [len(row[0]) for row in rows]
        of = np.repeat(np.array([row[1] for row in rows], np.int32), sizes)
        words = np.repeat(np.array([row[2] for row in rows], np.int32), sizes)
        whole = np.repeat(np.array([row[3] for row in rows], np.uint64), sizes)
        order = np.lexsort((whole, words, of, keys))
        keys, of, words, whole = keys[order], of[order], words[order], whole[order]
        fresh = np.ones(len(keys), bool)
        fresh[1:] = (keys[1:] != keys[:-1]) | (of[1:] != of[:-1]) | (words[1:] != words[:-1]) | (whole[1:] != whole[:-1])
        keys, of, words, whole = keys[fresh], of[fresh], words[fresh], whole[fresh]
        slots = np.full(1 << max(2 * len(keys), 1).bit_length(), -1, np.int32)
        _fill(keys, slots)
        return cls(keys, of, words, whole, slots)

    def add_matches(self, text: Worded, length: int, matches: Where) -> int:
        """Add the passages of a text that each set has; how many passages the text has."""
        last = np.full(len(matches), -1)
        return int(_count(text, length, self, matches, last))


@jit
def _slot(keys: Hash64, slots: Short, key: np.uint64) -> int:
    """The slot of a key, or the free one where it would be."""
    mask = np.uint64(len(slots) - 1)
    at = key & mask
    while slots[at] >= 0 and keys[slots[at]] != key:
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@jit
def _fill(keys: Hash64, slots: Short) -> None:
    """Fill in the first place of each key."""
    for i in range(len(keys)):
        if i == 0 or keys[i] != keys[i - 1]:
            slots[_slot(keys, slots, keys[i])] = i


@jit
def _count(text: Worded, length: int, table: Passages, matches: Where, last: Where) -> int:
    """Add to the matches of each set those of the passages of a text; how many passages it has."""
    hashes, keys, of = text.hashes, table.keys, table.of
    end, held = 0, 0
    for begin in range(len(hashes)):
        while end < len(hashes) and held < length:
            held += text.sizes[end]
            end += 1
        if held < length:
            return begin
        key = _joined(hashes, begin, end)
        at = np.int64(table.slots[_slot(keys, table.slots, key)])
        while 0 <= at < len(keys) and keys[at] == key:
            behind = begin + table.words[at]
            whole = behind > begin and behind <= len(hashes) and _joined(hashes, begin, behind) == table.whole[at]
            if (whole or behind == begin) and last[of[at]] != begin:
                matches[of[at]] += 1
                last[of[at]] = begin
            at += 1
        held -= text.sizes[begin]
    return len(hashes)
