"""Rows of units, as comparisons know documents, said as the file and place that a reader of the report can look up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from megatrain.corpus.shards import documents_of

_ROW = re.compile(r"row ([\d,]+) of unit (\d+)")
Row = tuple[int, int]
"""Unit and row."""


def row_told(unit: int, row: int) -> str:
    """A row in words, which `told_by_place` finds in a text."""
    return f"row {row} of unit {unit}"


def places_of(texts: Iterable[str], shard: Callable[[int], Path]) -> dict[Row, str]:
    """The place (`file:at`) of every row that the texts tell of. shard: a unit's documents; each is read once, up to its last such row."""
    rows: dict[int, set[int]] = {}
    for text in texts:
        for unit, row in map(_row, _ROW.finditer(text)):
            rows.setdefault(unit, set()).add(row)
    places: dict[Row, str] = {}
    for unit, wanted in sorted(rows.items()):
        for row, document in zip(range(max(wanted) + 1), documents_of(shard(unit)), strict=False):
            if row in wanted:
                places[unit, row] = document.name
    return places


def told_by_place(text: str, places: dict[Row, str]) -> str:
    """A text with places where it told of rows."""
    return _ROW.sub(lambda found: places.get(_row(found), found[0]), text)


def _row(found: re.Match[str]) -> Row:
    return int(found[2]), int(found[1].replace(",", ""))
