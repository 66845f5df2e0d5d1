"""MinHash signatures (Broder 1997): how alike two documents are, from 120 numbers each.

A document is the set of its shingles: every 5 words that follow each other in `text.lower()`. A word is a run of letters
between blanks, and each Chinese character is a word by itself, so that Chinese, which has no blanks, is compared by 5
characters; a text with fewer words is one shingle, and one without words has no signature. Case is folded as text-dedup,
data-juicer and datatrove do; marks and digits stay as they are, so that two tables, or two programs, differ.

Each of 120 fixed functions h_k(x) = (a_k x + b_k) mod 2^64 >> 32 takes its least value over the hashes of the shingles; the
share of equal values of two documents estimates the Jaccard similarity J of their sets, with a standard deviation of
sqrt(J (1 - J) / 120): 0.037 at 0.8. Documents whose values agree in a whole *band* of 6 are compared; with 20 bands, two of J = 0.8 are
with a probability of 0.998.

The functions are fixed for ever: signatures of other days and machines can be compared.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from megatrain.corpus.letters import HAN, SPACE, classes
from megatrain.corpus.words import MIX, PRIME, SEED, jit, mixed

HASHES = 120
"""Numbers of a signature."""
Hash64: TypeAlias = npt.NDArray[np.uint64]
Hash32: TypeAlias = npt.NDArray[np.uint32]
Codes: TypeAlias = npt.NDArray[np.uint32]
Where: TypeAlias = npt.NDArray[np.int64]
_MOST, _HALF, _FOLD = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(32), np.uint64(31)


class JoinedTexts(NamedTuple):
    """Some texts as one array, so that short ones cost no call each."""

    codes: Codes
    """Code points of all texts, one text behind the other."""
    bounds: Where
    """First code point of each text, and the number of all [texts + 1]."""

    @classmethod
    def of(cls, texts: list[str]) -> JoinedTexts:
        """The arrays of texts without lone surrogates."""
        bounds = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=bounds[1:])
        return cls(np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32), bounds)


@cache
def functions() -> tuple[Hash64, Hash64]:
    """(a, b) [HASHES]: splitmix64 (Steele et al. 2014) from seed 1, a odd."""
    found, state = [], 1
    for _ in range(2 * HASHES):
        state = (state + 0x9E3779B97F4A7C15) % (1 << 64)
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
        found.append(z ^ (z >> 31))
    return np.array(found[::2], np.uint64) | np.uint64(1), np.array(found[1::2], np.uint64)


@jit
def _shingle(recent: Hash64, end: int, words: int) -> np.uint64:
    """Hash of the last words before `end`, whose hashes lie in a ring."""
    h = np.uint64(words)
    for i in range(end - words, end):
        h = (h ^ recent[i % len(recent)]) * MIX
        h ^= h >> _FOLD
    return mixed(h)


@jit
def _lower(least: Hash64, x: np.uint64, a: Hash64, b: Hash64) -> None:
    """Take in one shingle."""
    for k in range(len(a)):
        least[k] = min(least[k], a[k] * x + b[k])


@jit
def _sign(
    codes: Codes, table: npt.NDArray[np.uint16], bounds: Where, words: int, a: Hash64, b: Hash64, out: Hash32, found: Where
) -> None:
    """Fill in the signature of each text [texts, HASHES], and its number of words [texts]."""
    least, recent = np.empty(len(a), np.uint64), np.empty(words, np.uint64)
    for text in range(len(found)):
        least[:] = _MOST
        count, inside, h = 0, False, SEED
        end = bounds[text + 1]
        for i in range(bounds[text], end + 1):
            of = SPACE if i == end else table[codes[i]]
            if inside and of & (SPACE | HAN):
                inside = False
                recent[count % words] = mixed(h)
                count += 1
                if count >= words:
                    _lower(least, _shingle(recent, count, words), a, b)
            if of & HAN:
                recent[count % words] = mixed((SEED ^ np.uint64(codes[i])) * PRIME)
                count += 1
                if count >= words:
                    _lower(least, _shingle(recent, count, words), a, b)
            elif not of & SPACE:
                h = ((h if inside else SEED) ^ np.uint64(codes[i])) * PRIME
                inside = True
        if 0 < count < words:
            _lower(least, _shingle(recent, count, count), a, b)
        found[text] = count
        for k in range(len(a)):
            out[text, k] = np.uint32(least[k] >> _HALF)


def signatures(texts: list[str], words: int = 5) -> tuple[Hash32, Where]:
    """(uint32 [texts, HASHES], how many words each has [texts]); the signature of a text without words says nothing."""
    batch = JoinedTexts.of([text.lower() for text in texts])
    out, found = np.empty((len(texts), HASHES), np.uint32), np.empty(len(texts), np.int64)
    _sign(batch.codes, classes(), batch.bounds, words, *functions(), out, found)
    return out, found


def keys_of(part: Hash32) -> Hash64:
    """A 64-bit hash of each row of some columns of signatures [texts, n] -> [texts]."""
    h = np.full(len(part), np.uint64(part.shape[1]))
    for k in range(part.shape[1]):
        h = (h ^ part[:, k]) * MIX
        h ^= h >> _FOLD
    h = (h ^ (h >> _HALF)) * MIX
    return h ^ (h >> np.uint64(29))


def band_keys(signed: Hash32, bands: int, rows: int) -> Hash64:
    """A hash of each band of signatures [texts, HASHES] -> [bands, texts]."""
    return np.stack([keys_of(signed[:, band * rows : (band + 1) * rows]) for band in range(bands)])


@jit
def agreeing(one: Hash32, other: Hash32) -> int:
    """In how many numbers two signatures agree."""
    count = 0
    for k in range(len(one)):
        count += one[k] == other[k]
    return count
