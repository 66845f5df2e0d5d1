"""Random numbers for the data: a stream for each key, the same on every machine and with every numpy release.

Number i of a stream is a hash of (key, i) (splitmix64, Steele et al., OOPSLA 2014), so a batch is a function of its keys alone and there is
no state to save. numpy's generators are not used because numpy does not promise the same stream in its next release (NEP 19).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def hash64(value: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def hash64_each(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`hash64` of each value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixed(*key: int) -> int:
    """One number made of several."""
    state = 0
    for part in key:
        state = hash64((state + GOLDEN + part) & MASK)
    return state


def hashes(state: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """[count] numbers first .. first + count - 1 of the stream with this state; no two are equal."""
    return hash64_each(np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(state))


def permutation(count: int, *key: int) -> npt.NDArray[np.int64]:
    """[count] a permutation of 0..count-1, a pure function of `key`: every sorting algorithm orders the hashes alike."""
    return np.argsort(hashes(mixed(*key), 0, count))


class Draws:
    """A stream of random numbers, one after another."""

    def __init__(self, *key: int) -> None:
        self._state, self._used = mixed(*key), 0

    def _hashes(self, count: int) -> npt.NDArray[np.uint64]:
        self._used += count
        return hashes(self._state, self._used - count, count)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """[count] numbers in [0, 1), of 53 bits."""
        return (self._hashes(count) >> np.uint64(11)) * 2.0**-53

    def one(self) -> float:
        """A number in [0, 1)."""
        return float(self.uniform(1)[0])

    def below(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """[count] integers in 0 .. bound - 1."""
        return (self.uniform(count) * bound).astype(np.int64)

    def between(self, least: int, most: int) -> int:
        """An integer in least .. most."""
        return least + int(self.below(most - least + 1, 1)[0])

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """[count] a permutation of 0 .. count - 1."""
        return np.argsort(self._hashes(count))
