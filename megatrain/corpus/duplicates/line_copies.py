"""Finds lines, or paragraphs, that an earlier document has or that were there before in the same one (CCNet, arXiv:1911.00359).

The first copy stays. Documents that are removed as a whole do not count, so that no line is lost with all its copies: whoever
runs the passes takes lines last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatrain.corpus.duplicates.exact import gathered, repeated
from megatrain.corpus.duplicates.fingerprints import KIND, Stretch, stretches
from megatrain.corpus.duplicates.key_files import Column, KeyFile, KeyFileError, written
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.representatives import REMOVED

LINES = "lines"
"""Kind of the file that `lines_task` writes: `line` [n], numbers over all units, ascending."""


def lines_task(
    part: int, parts: int, units: Sequence[str | Path], removed: str | Path, settings: DedupConfig, output: str | Path
) -> None:
    """Write which lines of a part were there before. removed: what `merge` has written. Raises OSError and KeyFileError."""
    gone = KeyFile(removed, REMOVED).read("document")
    names, found = ("lines.high", "lines.low", "lines.numbers"), []
    for stretch in stretches(units, settings):
        high, low, numbers = stretch.part(names, part, parts)
        stays = _staying(stretch, gone)[numbers]
        found.append((high[stays], low[stays], numbers[stays] + stretch.line))
    line, _ = repeated(*gathered(found))
    with written(output, LINES) as writer:
        writer.block({"line": line})


def _staying(stretch: Stretch, gone: Column) -> Column:
    """Whether each line's document stays, bool [lines]."""
    low, high = np.searchsorted(gone, [stretch.document, stretch.document + stretch.documents])
    stays = np.ones(stretch.documents, bool)
    stays[gone[low:high] - stretch.document] = False
    counts = stretch.block.column("lines.counts").read()
    if counts.shape != stays.shape or int(counts.sum(dtype=np.int64)) != stretch.lines:
        raise KeyFileError.damaged(stretch.block.file.path, "its lines are not as many as it says")
    return np.repeat(stays, counts)


def lines_of(unit: str | Path, first: int, found: Sequence[str | Path]) -> dict[int, list[int]]:
    """The numbers of the lines to remove from each document of a unit, by row, ascending.

    first: number of the unit's first line in the order of the corpus; found: what the tasks of all parts have written.
    """
    if not found:
        return {}
    file = KeyFile(unit, KIND)
    counts = np.concatenate(
        [np.zeros(0, np.int64), *(block.column("lines.counts").read().astype(np.int64) for block in file.blocks)]
    )
    ends = np.cumsum(counts)
    pieces = []
    for path in found:
        line = KeyFile(path, LINES).blocks[0].column("line")
        where = line.range_of(first, first + int(counts.sum()) - 1)
        pieces.append(line.read(where.start, where.stop) - first)
    lines = np.sort(np.concatenate([np.zeros(0, np.int64), *pieces]))
    rows = np.searchsorted(ends, lines, "right")
    removed: dict[int, list[int]] = {}
    for row, number in zip(rows.tolist(), (lines - (ends - counts)[rows]).tolist(), strict=True):
        removed.setdefault(row, []).append(number)
    return removed
