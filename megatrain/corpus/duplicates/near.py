"""Finds documents that are nearly the same: those of one band of their signatures, verified by all 120 numbers.

A task takes one part of one band: documents with the same key are a group. Of those with the same signature all but the first
are its copies, and nothing more is asked of them. Of the rest, a small group is compared pair by pair; a large one would take
quadratic time, so it is written down as it is, and `merge` compares each of its documents with those of the group that stay,
which are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatrain.corpus.duplicates.fingerprints import stretches
from megatrain.corpus.duplicates.key_files import Column, written
from megatrain.corpus.duplicates.minhash import HASHES, Hash32, Where, agreeing
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.words import jit

PAIRS = "pairs"
"""Kind of the file that `near_task` writes: `document` [n], ascending, `other`, an earlier one, and `agree`, numbers in which
they agree; `member` [m], ascending, and its `group`: documents of large groups.
"""
SMALL = 32
"""Documents of a group that are compared pair by pair."""
_BATCH = 1 << 17
"""Documents whose signatures are held at a time: 63 MB."""


class Pairs(NamedTuple):
    """Documents that are near an earlier one [n] each."""

    document: Column
    other: Column
    agree: Column


def least_agreeing(settings: DedupConfig) -> int:
    """In how many numbers two documents have to agree."""
    return ceil(round(settings.agreement * HASHES, 6))


def near_task(band: int, part: int, parts: int, units: Sequence[str | Path], settings: DedupConfig, output: str | Path) -> None:
    """Write which documents of a part of a band are near each other. Raises OSError and KeyFileError."""
    documents, starts = _groups(band, part, parts, units, settings)
    whole = _take(units, settings, documents, "near.whole")
    documents, starts, copies = _without_copies(documents, starts, whole)
    sizes = np.diff(starts, append=len(documents))
    large = sizes > SMALL
    small = np.repeat(~large, sizes)
    found = [copies] if band == 0 else []  # they are in one group in every band
    for some, begins in _batches(documents[small], sizes[~large]):
        found.append(_pairs(units, settings, some, begins))
    document, other, agree = (np.concatenate(columns) for columns in zip(Pairs(*_NONE), *found, strict=True))
    order = np.lexsort((other, document))
    member, group = documents[~small], np.repeat(np.arange(large.sum()), sizes[large])
    by_member = np.argsort(member, kind="stable")
    with written(output, PAIRS) as writer:
        writer.about = {"groups": int(large.sum())}
        pairs = {"document": document[order], "other": other[order], "agree": agree[order]}
        writer.block({**pairs, "member": member[by_member], "group": group[by_member]})


_NONE = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8))


def _groups(band: int, part: int, parts: int, units: Sequence[str | Path], settings: DedupConfig) -> tuple[Column, Column]:
    """(documents that share a key with another one, group by group, ascending within; where each group begins)."""
    keys, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for stretch in stretches(units, settings):
        key, rows = stretch.part(("near.keys", "near.rows"), part, parts, band)
        keys.append(key)
        documents.append(rows + stretch.document)
    key, document = np.concatenate(keys), np.concatenate(documents)
    order = np.argsort(key, kind="stable")
    return _runs(key[order], document[order])


def _runs(key: Column, document: Column) -> tuple[Column, Column]:
    """Documents of runs of two and more equal keys, and where the runs begin."""
    same = key[1:] == key[:-1]
    among = np.flatnonzero((np.concatenate([[False], same]) | np.concatenate([same, [False]]))[: len(key)])
    return document[among], np.flatnonzero(np.concatenate([[True], ~same])[among])


def _without_copies(documents: Column, starts: Column, whole: Column) -> tuple[Column, Column, Pairs]:
    """(documents, starts) of the first ones with each signature, in groups of two and more; the pairs of the others."""
    group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(documents)))
    order = np.lexsort((documents, whole, group))
    group, whole, sorted_documents = group[order], whole[order], documents[order]
    fresh = np.concatenate([[True], (group[1:] != group[:-1]) | (whole[1:] != whole[:-1])])[: len(documents)]
    first = sorted_documents[fresh]
    of = np.repeat(first, np.diff(np.flatnonzero(fresh), append=len(documents)))
    copies = Pairs(sorted_documents[~fresh], of[~fresh], np.full((~fresh).sum(), HASHES, np.uint8))
    group = group[fresh]
    order = np.lexsort((first, group))
    return *_runs(group[order], first[order]), copies


def _take(units: Sequence[str | Path], settings: DedupConfig, documents: Column, name: str) -> Column:
    """The rows of a column for some documents, in any order."""
    which, back = np.unique(documents, return_inverse=True)
    found = []
    for stretch in stretches(units, settings):
        low, high = np.searchsorted(which, [stretch.document, stretch.document + stretch.documents])
        column = stretch.block.column(name)
        found.append(column.take(which[low:high] - stretch.document))
    return np.concatenate(found)[back] if found else np.zeros(0, np.uint64)


def take_signatures(units: Sequence[str | Path], settings: DedupConfig, documents: Column) -> Hash32:
    """The signatures of some documents [n, HASHES]."""
    return _take(units, settings, documents, "near.signatures")


def _batches(documents: Column, sizes: Column) -> Iterator[tuple[Column, Column]]:
    """Groups, some at a time: their documents, and where each begins and the last one ends."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, begin + _BATCH, "right")), first + 1)
        bounds = np.concatenate([[0], ends[first:last] - begin])
        yield documents[begin : begin + int(bounds[-1])], bounds
        first = last


def _pairs(units: Sequence[str | Path], settings: DedupConfig, documents: Column, bounds: Where) -> Pairs:
    """The pairs of documents of some groups that agree enough."""
    sizes = np.diff(bounds)
    most = int((sizes * (sizes - 1) // 2).sum())
    later, earlier, agree = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.uint8)
    signed = take_signatures(units, settings, documents)
    count = _compare(signed, bounds, least_agreeing(settings), later, earlier, agree)
    return Pairs(documents[later[:count]], documents[earlier[:count]], agree[:count])


@jit
def _compare(signed: Hash32, bounds: Where, least: int, later: Where, earlier: Where, agree: Column) -> int:
    """Fill in the pairs of each group that agree enough, by position; their number."""
    count = 0
    for group in range(len(bounds) - 1):
        for i in range(bounds[group], bounds[group + 1]):
            for j in range(bounds[group], i):
                found = agreeing(signed[i], signed[j])
                if found >= least:
                    later[count], earlier[count], agree[count] = i, j, found
                    count += 1
    return count
