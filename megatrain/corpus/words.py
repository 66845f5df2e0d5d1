"""Words and lines of a text as positions, and their hashes: loops over code points, compiled by numba.

What counts as a word decides what a rule says, so a rule names its table:

    blanks     between blanks, as str.split: "it's 5km." is 2 words
    marks      the same, and each mark by itself, as most tokenizers of words: "it ' s 5km ." is 5
    han        the same, and each Chinese character by itself: for Chinese, which has no blanks

Functions take code points and the classes of their letters (letters.py), both [n], and fill arrays that the caller has made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatrain.corpus.letters import BREAK, HAN, MARK, SPACE, classes, code_points
from megatrain.extras import numba

Table = Literal["blanks", "marks", "han"]
ALONE: dict[Table, np.uint16] = {"blanks": np.uint16(0), "marks": MARK, "han": np.uint16(MARK | HAN)}
"""Classes of letters that are words by themselves."""

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """A function compiled; the code is kept beside the source, or where NUMBA_CACHE_DIR says, or else in ~/.cache. Where none of these can
    be written, each process compiles anew. Raises ImportError without numba.
    """
    compiled: F
    try:
        compiled = numba().njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba finds no folder for the code
        compiled = numba().njit(nogil=True, error_model="numpy")(function)
    return compiled


PRIME, SEED, MIX = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325), np.uint64(0x9E3779B97F4A7C15)
HIGH = np.uint64(32)


@jit
def mixed(h: np.uint64) -> np.uint64:
    """A hash all of whose bits depend on all of h's."""
    h = (h ^ (h >> HIGH)) * MIX
    h = (h ^ (h >> np.uint64(29))) * MIX
    return h ^ (h >> HIGH)


@jit
def hash_of(codes: npt.NDArray[np.uint32], begin: int, end: int) -> np.uint64:
    """64-bit hash of some code points (FNV-1a over whole code points, mixed)."""
    h = SEED
    for i in range(begin, end):
        h = (h ^ np.uint64(codes[i])) * PRIME
    return mixed(h)


@jit
def find_words(
    letters: npt.NDArray[np.uint16], alone: np.uint16, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> int:
    """Fill in where words begin and end; their number. alone: classes of letters that are words by themselves."""
    count, inside = 0, False
    for i in range(len(letters)):
        of = letters[i]
        if of & SPACE:
            inside = False
        elif of & alone:
            starts[count], ends[count] = i, i + 1
            count += 1
            inside = False
        elif inside:
            ends[count - 1] = i + 1
        else:
            starts[count], ends[count] = i, i + 1
            count += 1
            inside = True
    return count


@jit
def find_lines(
    codes: npt.NDArray[np.uint32], letters: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> int:
    """Fill in where lines begin and end, as str.splitlines has them; their number."""
    count, begin, n = 0, 0, len(codes)
    i = 0
    while i < n:
        if letters[i] & BREAK:
            starts[count], ends[count] = begin, i
            count += 1
            if codes[i] == 13 and i + 1 < n and codes[i + 1] == 10:
                i += 1
            begin = i + 1
        i += 1
    if begin < n:
        starts[count], ends[count] = begin, n
        count += 1
    return count


@jit
def find_parts(codes: npt.NDArray[np.uint32], feeds: int, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> int:
    """Fill in what lies between runs of at least so many line feeds, as re.split(r"\n{feeds,}"); their number, at least 1."""
    count, begin, i, n = 0, 0, 0, len(codes)
    while i < n:
        if codes[i] != 10:
            i += 1
            continue
        end = i
        while i < n and codes[i] == 10:
            i += 1
        if i - end >= feeds:
            starts[count], ends[count] = begin, end
            count += 1
            begin = i
    starts[count], ends[count] = begin, n
    return count + 1


class Extents(NamedTuple):
    """Places of parts of a text: that of the first letter of each and the one behind its last [n] each."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class Text(NamedTuple):
    """A text as arrays."""

    codes: npt.NDArray[np.uint32]
    """Code points [n]."""
    letters: npt.NDArray[np.uint16]
    """Classes of the code points [n]."""

    @classmethod
    def of(cls, text: str) -> Text:
        """The arrays of a text without lone surrogates."""
        codes = code_points(text)
        return cls(codes, classes()[codes])

    def words(self, table: Table) -> Extents:
        """The words of a table."""
        starts, ends = np.empty(len(self.codes), np.int64), np.empty(len(self.codes), np.int64)
        count = find_words(self.letters, ALONE[table], starts, ends)
        return Extents(starts[:count], ends[:count])

    def lines(self) -> Extents:
        """The lines, without their ends."""
        starts, ends = np.empty(len(self.codes), np.int64), np.empty(len(self.codes), np.int64)
        count = find_lines(self.codes, self.letters, starts, ends)
        return Extents(starts[:count], ends[:count])

    def between_feeds(self) -> Extents:
        """The lines between line feeds alone, as str.split("\n"): empty ones too."""
        feeds = np.flatnonzero(self.codes == 10)
        return Extents(np.concatenate([[0], feeds + 1]), np.concatenate([feeds, [len(self.codes)]]))
