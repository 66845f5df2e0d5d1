"""Finds documents, or lines, that are the same as an earlier one, by 128-bit hash: partition, sort, scan.

A task takes the hashes of one part, by their first bits, of all units; the parts are as many as memory demands, and the result
is the same for any number of them. Two different texts have the same hash with a probability of 2^-128: among 10^12, one pair
in 10^14 corpora.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatrain.corpus.duplicates.fingerprints import stretches
from megatrain.corpus.duplicates.key_files import Column, written
from megatrain.corpus.duplicates.parameters import DedupConfig

COPIES = "copies"
"""Kind of the file that `exact_task` writes: `document` [n], ascending, and `first`, the one that each is a copy of."""


def repeated(high: Column, low: Column, numbers: Column) -> tuple[Column, Column]:
    """(numbers of those whose 128-bit hash a lower number has too, ascending; the lowest that has it)."""
    order = np.argsort(high, kind="stable")
    one, other = high[order], low[order]
    same = one[1:] == one[:-1]
    if (same & (other[1:] != other[:-1])).any():  # hashes that agree in their first half alone
        order = np.lexsort((low, high))
        one, other = high[order], low[order]
        same = (one[1:] == one[:-1]) & (other[1:] == other[:-1])
    among = np.flatnonzero((np.concatenate([[False], same]) | np.concatenate([same, [False]]))[: len(high)])
    if not len(among):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], ~same])[among])
    found = numbers[order[among]]
    first = np.repeat(np.minimum.reduceat(found, starts), np.diff(starts, append=len(found)))
    later = np.flatnonzero(found != first)
    later = later[np.argsort(found[later])]
    return found[later], first[later]


def exact_task(part: int, parts: int, units: Sequence[str | Path], settings: DedupConfig, output: str | Path) -> None:
    """Write which documents of a part are copies. Raises OSError and KeyFileError."""
    names, found = ("exact.high", "exact.low", "exact.rows"), []
    for stretch in stretches(units, settings):
        high, low, rows = stretch.part(names, part, parts)
        found.append((high, low, rows + stretch.document))
    document, first = repeated(*gathered(found))
    with written(output, COPIES) as writer:
        writer.block({"document": document, "first": first})


def gathered(found: list[tuple[Column, Column, Column]]) -> tuple[Column, Column, Column]:
    """The rows of all blocks as one table."""
    high, low, numbers = zip(*found, strict=True) if found else ((), (), ())
    none, nothing = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return np.concatenate([none, *high]), np.concatenate([none, *low]), np.concatenate([nothing, *numbers])
