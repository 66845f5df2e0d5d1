"""The normal form in which lines are compared, after CCNet (Wenzek et al., arXiv:1911.00359), and 128-bit hashes of it.

    "  Chapter 12: The End!\t(2nd ed.)" -> "chapter 00 the end 0nd ed"

Lower case, every decimal digit 0, marks (categories P, S and C of Unicode) taken out, and blanks of any kind and number one
blank: CCNet keeps these as they are, though they are what differs most often.

A *part* of a text is a line (between line feeds) or a paragraph (between runs of two and more). Its hash is xxh3-128 of the
UTF-8 of its normal form, the same for ever.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.corpus.duplicates.minhash import Codes, JoinedTexts, Where
from megatrain.corpus.letters import DIGIT, MARK, SPACE, classes
from megatrain.corpus.words import jit

Part: TypeAlias = Literal["lines", "paragraphs"]
FEEDS: dict[Part, int] = {"lines": 1, "paragraphs": 2}
"""Line feeds that end a part."""
Hash128: TypeAlias = npt.NDArray[np.uint64]
"""Big-endian halves of hashes [n, 2]."""
_BLANK, _ZERO, _FEED = np.uint32(32), np.uint32(48), np.uint32(10)


@jit
def _put(out: npt.NDArray[np.uint8], at: int, code: int) -> int:
    """Write a character in UTF-8; where the next one goes."""
    if code < 0x80:
        out[at] = code
        return at + 1
    if code < 0x800:
        out[at], out[at + 1] = 0xC0 | code >> 6, 0x80 | code & 63
        return at + 2
    if code < 0x10000:
        out[at], out[at + 1], out[at + 2] = 0xE0 | code >> 12, 0x80 | code >> 6 & 63, 0x80 | code & 63
        return at + 3
    out[at], out[at + 1], out[at + 2], out[at + 3] = (
        0xF0 | code >> 18,
        0x80 | code >> 12 & 63,
        0x80 | code >> 6 & 63,
        0x80 | code & 63,
    )
    return at + 4


@jit
def _normal(
    codes: Codes,
    table: npt.NDArray[np.uint16],
    bounds: Where,
    feeds: int,
    out: npt.NDArray[np.uint8],
    ends: Where,
    letters: Where,
    parts: Where,
) -> int:
    """Fill in the normal forms of all parts, one after the other, where each ends, its characters, and the parts of each text;
    their number.

    feeds: 0: every text is one part.
    """
    at, count = 0, 0
    for text in range(len(parts)):
        before, i, end = count, bounds[text], bounds[text + 1]
        while True:
            length, blank = 0, False
            while i < end:
                code = codes[i]
                if code == _FEED and feeds > 0:
                    run = i
                    while run < end and codes[run] == _FEED and (feeds > 1 or run == i):
                        run += 1
                    if run - i >= feeds:
                        break
                of = table[code]
                i += 1
                if of & SPACE:
                    blank = length > 0
                elif not of & MARK:
                    if blank:
                        at, length, blank = _put(out, at, 32), length + 1, False
                    at, length = _put(out, at, 48 if of & DIGIT else np.int64(code)), length + 1
            ends[count], letters[count] = at, length
            count += 1
            if i >= end:
                break
            i = run
        parts[text] = count - before
    return count


class Parts(NamedTuple):
    """The parts of some texts."""

    hashes: Hash128
    """Hashes of those with enough letters."""
    numbers: Where
    """Their numbers among all parts of all texts, ascending."""
    counts: Where
    """How many parts each text has, all counted."""


def parts_of(texts: list[str], part: Part | None, letters: int) -> Parts:
    """The parts of texts whose normal form has so many characters. part: None: a text is one part."""
    batch = JoinedTexts.of([text.lower() for text in texts])
    room = len(batch.codes) + len(texts)
    out, counts = np.empty(4 * room, np.uint8), np.empty(len(texts), np.int64)
    feeds = FEEDS[part] if part else 0
    ends, lengths = (np.empty(room if part else len(texts), np.int64) for _ in range(2))
    found = _normal(batch.codes, classes(), batch.bounds, feeds, out, ends, lengths, counts)
    data = out[: ends[found - 1] if found else 0].tobytes()
    numbers = np.flatnonzero(lengths[:found] >= letters)
    starts = np.concatenate([[0], ends[: found - 1]])[numbers].tolist() if found else []
    hashes = [xxhash.xxh3_128_digest(data[start:end]) for start, end in zip(starts, ends[numbers].tolist(), strict=True)]
    return Parts(as_halves(hashes), numbers, counts)


def hash_texts(texts: list[str]) -> Hash128:
    """Hashes of texts as they are [n, 2]."""
    return as_halves([xxhash.xxh3_128_digest(text.encode()) for text in texts])


def as_halves(digests: list[bytes]) -> Hash128:
    """Digests of 16 bytes as pairs of numbers [n, 2]."""
    return np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)


def without(text: str, part: Part, removed: Collection[int]) -> str:
    """A text without some of its parts, by number; a part goes with the line feeds behind it, the last one with those before."""
    gone = frozenset(removed)
    if part == "lines":
        return "\n".join(line for number, line in enumerate(text.split("\n")) if number not in gone)
    pieces = re.split(r"(\n{2,})", text)
    kept = [number for number in range(0, len(pieces), 2) if number // 2 not in gone]
    return "".join(pieces[number] + (pieces[number + 1] if number != kept[-1] else "") for number in kept)
