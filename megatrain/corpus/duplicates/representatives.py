"""Decides which documents stay: each removed one is a copy of, or near, one that stays, its *representative*.

Documents are looked at in order; one is removed if it is near an earlier one that stays, and its representative is the first of
these. So A stays, B, near A, goes, and C, near B but not A, stays: chains do not swallow what is not alike (with transitive
closure, 859,092 documents became 2: marin#6854). It is the lexicographically first independent set of the graph of pairs, hence
the same for any number of parts.

Memory: 10 bytes for each document, a window of pairs, and signatures of those documents of large groups that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.corpus.duplicates.exact import COPIES
from megatrain.corpus.duplicates.key_files import Column, KeyFile, KeyFileError, written
from megatrain.corpus.duplicates.minhash import HASHES, Hash32, Where, agreeing
from megatrain.corpus.duplicates.near import PAIRS, least_agreeing, take_signatures
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.places import UnitStarts
from megatrain.corpus.words import jit

REMOVED = "removed"
"""Kind of the file that `merge` writes: `document` [n], ascending, its `representative`, the numbers in which they `agree`, and
`exact`, 1 for a copy.
"""
_WINDOW, _PAIR, _MEMBER = 1 << 26, 60, 600
"""Bytes that are held at a time, about, and those of a pair, and of a document of a large group."""
MOST_KEPT = 1000
"""Documents of a large group that stay and with which the others are compared."""


class _Kept:
    """Documents of large groups that stay: a linked list for each group, of signatures in a pool."""

    def __init__(self, groups: int) -> None:
        self.first, self.last, self.size = np.full(groups, -1), np.full(groups, -1), np.zeros(groups, np.int64)
        self.following, self.place = np.empty(0, np.int64), np.empty(0, np.int64)
        self.signed, self.document = np.empty((0, HASHES), np.uint32), np.empty(0, np.int64)
        self.used = np.zeros(2, np.int64)
        """Links, signatures."""

    def reserve(self, links: int, signatures: int) -> None:
        """Make room for more."""
        links, signatures = links + int(self.used[0]), signatures + int(self.used[1])
        if links > len(self.place):
            self.following, self.place = _longer(self.following, links), _longer(self.place, links)
        if signatures > len(self.document):
            self.signed, self.document = _longer(self.signed, signatures), _longer(self.document, signatures)


def _longer(column: Column, least: int) -> Column:
    longer = np.empty((max(least, 2 * len(column)), *column.shape[1:]), column.dtype)
    longer[: len(column)] = column
    return longer


def merge(
    places: str | Path,
    units: Sequence[str | Path],
    exact: Sequence[str | Path],
    near: Sequence[str | Path],
    settings: DedupConfig,
    output: str | Path,
) -> None:
    """Write which documents are removed, from what the tasks of all parts (and bands) have written. Raises OSError and
    KeyFileError.
    """
    total = int(UnitStarts.read(places).documents[-1])
    instead, agree, is_exact = np.full(total, -1, np.int64), np.zeros(total, np.uint8), np.zeros(total, bool)
    for path in exact:
        file = KeyFile(path, COPIES)
        document, first = _checked(file, total, "document", "first")
        instead[document], agree[document], is_exact[document] = first, HASHES, True
    copies = np.flatnonzero(is_exact)
    if near:
        _near(units, near, (instead, agree), settings)
    of = instead[copies]
    gone = instead[of] >= 0  # what it is a copy of is near another one
    instead[copies[gone]], agree[copies[gone]] = instead[of[gone]], agree[of[gone]]
    document = np.flatnonzero(instead >= 0)
    with written(output, REMOVED) as writer:
        writer.block(
            {
                "document": document,
                "representative": instead[document],
                "agree": agree[document],
                "exact": is_exact[document].astype(np.uint8),
            }
        )


def _checked(file: KeyFile, total: int, *names: str) -> list[Column]:
    """Columns of numbers of documents. Raises KeyFileError where one is too large, or they are of different lengths."""
    columns = [file.read(name) for name in names]
    if any(len(column) and (column.max() >= total or column.min() < 0) for column in columns):
        raise KeyFileError.damaged(file.path, f"{' or '.join(names)} is beyond the {total:,} documents")
    if len({len(column) for column in columns}) > 1:
        raise KeyFileError.damaged(file.path, f"{' and '.join(names)} are not equally long")
    return columns


def _near(units: Sequence[str | Path], near: Sequence[str | Path], state: tuple[Column, Column], settings: DedupConfig) -> None:
    """Fill in which documents are near one that stays, and which, and in how many numbers they agree."""
    groups = np.cumsum([0, *(int(KeyFile(path, PAIRS).about["groups"]) for path in near)])
    kept, least = _Kept(int(groups[-1])), least_agreeing(settings)
    for low, high in _windows(near, len(state[0])):
        document, other, agree = _rows(near, low, high, ("document", "other", "agree"))
        member, group = _rows(near, low, high, ("member", "group"), groups)
        order, by_member = np.lexsort((other, document)), np.lexsort((group, member))
        which, place = np.unique(member[by_member], return_inverse=True)
        signed = take_signatures(units, settings, which) if len(which) else np.empty((0, HASHES), np.uint32)
        kept.reserve(len(member), len(which))
        _decide(
            (document[order], other[order], agree[order]),
            (member[by_member], group[by_member], place, signed),
            state,
            (kept.first, kept.last, kept.size, kept.following, kept.place, kept.signed, kept.document, kept.used),
            (least, MOST_KEPT),
        )


def _windows(near: Sequence[str | Path], total: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents that take about so much memory at the most (more only of few documents), and cover all pairs."""
    grid = np.unique(np.linspace(0, total, 4097).astype(np.int64))
    counts = np.zeros(len(grid) - 1, np.int64)
    for path in near:
        file = KeyFile(path, PAIRS)
        document, _ = _checked(file, total, "document", "other")
        (member,) = _checked(file, total, "member")
        counts += _PAIR * np.diff(np.searchsorted(document, grid)) + _MEMBER * np.diff(np.searchsorted(member, grid))
    low, held = 0, 0
    for cell, count in enumerate(counts.tolist()):
        if held and held + count > _WINDOW:
            yield low, int(grid[cell])
            low, held = int(grid[cell]), 0
        held += count
    if held:
        yield low, total


def _rows(near: Sequence[str | Path], low: int, high: int, names: Sequence[str], groups: Column | None = None) -> list[Column]:
    """The rows of all files whose document, the first column, lies in a range. groups: each file's first group, added to the
    last column.
    """
    found = []
    for number, path in enumerate(near):
        (block,) = KeyFile(path, PAIRS).blocks
        where = block.column(names[0]).range_of(low, high - 1)
        columns = [block.column(name).read(where.start, where.stop) for name in names]
        if groups is not None:
            columns[-1] = columns[-1] + groups[number]
        found.append(columns)
    return [np.concatenate(pieces) for pieces in zip(*found, strict=True)]


@jit
def _decide(
    pairs: tuple[Where, Where, Column],
    members: tuple[Where, Where, Where, Hash32],
    state: tuple[Where, Column],
    kept: tuple[Where, Where, Where, Where, Where, Hash32, Where, Where],
    limits: tuple[int, int],
) -> None:
    """Decide for the documents of a window, in order."""
    document, other, agrees = pairs
    member, group, place, signed = members
    instead, agree = state
    first, last, size, following, at, pool, pooled, used = kept
    least, most = limits
    pair, seat = 0, 0
    while pair < len(document) or seat < len(member):
        is_pair = seat == len(member) or (pair < len(document) and document[pair] < member[seat])
        now = document[pair] if is_pair else member[seat]
        best, best_agree = np.int64(-1), np.int64(0)
        while pair < len(document) and document[pair] == now:
            one, found = other[pair], np.int64(agrees[pair])
            while instead[one] >= 0 and found == HASHES:  # the same signature: it is near whatever that one is near
                one, found = instead[one], np.int64(agree[one])
            if instead[one] < 0 and (best < 0 or one < best):
                best, best_agree = one, found
            pair += 1
        begin = seat
        while seat < len(member) and member[seat] == now:
            kin, found = _first_near(signed[place[seat]], first[group[seat]], following, at, pool, least)
            if kin >= 0 and (best < 0 or pooled[kin] < best):
                best, best_agree = pooled[kin], found
            seat += 1
        if instead[now] >= 0:
            continue  # a copy
        if best >= 0:
            instead[now], agree[now] = best, best_agree
        elif seat > begin:
            pool[used[1]], pooled[used[1]] = signed[place[begin]], now
            for i in range(begin, seat):
                if size[group[i]] < most:
                    _append(group[i], used[1], first, last, size, following, at, used)
            used[1] += 1


@jit
def _first_near(
    signature: npt.NDArray[np.uint32], link: int, following: Where, at: Where, pool: Hash32, least: int
) -> tuple[int, int]:
    """(place in the pool of the first signature of a list that is near one, or -1; numbers in which they agree)."""
    while link >= 0:
        found = np.int64(agreeing(signature, pool[at[link]]))
        if found >= least:
            return at[link], found
        link = following[link]
    return np.int64(-1), np.int64(0)


@jit
def _append(
    group: int, signature: int, first: Where, last: Where, size: Where, following: Where, at: Where, used: Where
) -> None:
    """Add a signature to those of a group that stay."""
    link = used[0]
    at[link], following[link] = signature, -1
    if last[group] >= 0:
        following[last[group]] = link
    else:
        first[group] = link
    last[group] = link
    size[group] += 1
    used[0] += 1
