"""Reads labels that several raters gave to the same items, from .jsonl, .csv and .tsv files.

    a row a label      item, rater, label
    a column a rater   item, and a column each (`raters`, or all that begin with `label_`)
    a file a rater     item, label: what copies of the report's sheet.jsonl become

An empty label, null and NaN are missing ones.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain.corpus.report.agreement import MISSING, Codes, Floats, Level
from megatrain.files import OneLine, brief, not_utf8, opened

MOST = 256
"""Different labels of a set: a table of all pairs of them is made."""
WIDE = "label_"
"""How the names of columns begin that are raters' without being named."""


class LabelError(OneLine, ValueError):
    """Labels that cannot be read or compared; the message names file, line and remedy."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns, and what the labels are."""

    item: str = "item"
    rater: str = "rater"
    label: str = "label"
    raters: tuple[str, ...] = ()
    """Columns of a rater each."""
    level: Level = "nominal"
    order: tuple[str, ...] = ()
    """The labels from lowest to highest, where they are no numbers."""


@dataclass(frozen=True)
class Labelled:
    """Labels of items by raters, as an array."""

    items: tuple[str, ...]
    raters: tuple[str, ...]
    labels: tuple[str, ...]
    """In order: of their values, or of the alphabet."""
    values: Floats
    """[k] the labels as numbers; where they are no numbers, their places in that order."""
    codes: Codes
    """[items, raters] index of the label, MISSING for none."""


class LabelRow(NamedTuple):
    """One row of a file."""

    path: Path
    line: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """File and line, as messages name them."""
        return f"{self.path}:{self.line}"


class GivenLabel(NamedTuple):
    """One label."""

    item: str
    rater: str
    label: str
    where: str


def read_labels(paths: Sequence[str | Path], columns: Columns = Columns()) -> Labelled:
    """The labels of all files. Raises LabelError unless two raters share two items, or OSError."""
    rows = [row for path in paths for row in _rows(Path(path))]
    if not rows:
        raise LabelError(f"{', '.join(map(str, paths))}: there is no row with a label")
    given = [label for label in _labels(rows, columns) if label.label]
    cells: dict[tuple[str, str], GivenLabel] = {}
    for label in given:
        before = cells.setdefault((label.item, label.rater), label)
        if before.label != label.label:
            raise LabelError(
                f"{label.where}: rater {label.rater!r} gives item {label.item!r} the label {brief(label.label)!r}, and gave it "
                f"{brief(before.label)!r} at {before.where}. Keep one of the rows, or name the second rating as another rater."
            )
    items = tuple(dict.fromkeys(label.item for label in given))
    raters = tuple(sorted({label.rater for label in given}))
    _require_overlap(cells, items, raters)
    labels, values = _in_order(given, columns)
    code = {label: number for number, label in enumerate(labels)}
    codes = np.full((len(items), len(raters)), MISSING, np.int64)
    row_of, column_of = ({name: n for n, name in enumerate(names)} for names in (items, raters))
    for (item, rater), label in cells.items():
        codes[row_of[item], column_of[rater]] = code[label.label]
    return Labelled(items, raters, labels, values, codes)


def _require_overlap(cells: Iterable[tuple[str, str]], items: Sequence[str], raters: Sequence[str]) -> None:
    """Raise LabelError unless two raters share two items."""
    if len(raters) < 2:
        who = f"all labels are of one rater, {raters[0]!r}" if raters else "no row has a label"
        raise LabelError(
            f"{who}, and agreement is between two. Give a second rater's file as well, or name the columns: --raters ann,bob"
        )
    often: dict[str, int] = {}
    for item, _ in cells:
        often[item] = often.get(item, 0) + 1
    shared = sum(number > 1 for number in often.values())
    if shared < 2:
        raise LabelError(
            f"{shared} of {len(items):,} items {'has' if shared == 1 else 'have'} labels of two raters, and agreement takes 2 or "
            f"more. Are items named alike? The first are {', '.join(map(repr, map(brief, items[:3])))}."
        )


def _labels(rows: Sequence[LabelRow], columns: Columns) -> Iterator[GivenLabel]:
    """Every label of the rows, by the way that the columns show."""
    known = list(dict.fromkeys(name for row in rows for name in row.values))
    _require(rows, known, (columns.item, "--item"), *((name, "--raters") for name in columns.raters))
    raters = columns.raters or tuple(name for name in known if name.startswith(WIDE))
    files = {row.path for row in rows}
    if columns.raters or (columns.rater not in known and raters and (len(files) == 1 or columns.label not in known)):
        for row in rows:
            item = _item(row, columns.item)
            for name in raters:
                yield GivenLabel(item, name.removeprefix(WIDE), _text(row, name, columns), row.where)
    elif columns.rater in known or len(files) > 1:
        _require(rows, known, (columns.label, "--label"))
        named = columns.rater in known
        stems = {path: path.stem for path in files}
        names = stems if len(set(stems.values())) == len(files) else {path: str(path) for path in files}
        for row in rows:
            rater = _text(row, columns.rater) if named else names[row.path]
            if not rater:
                raise LabelError(f"{row.where}: the column {columns.rater!r} is empty: whose label is it?")
            yield GivenLabel(_item(row, columns.item), rater, _text(row, columns.label, columns), row.where)
    else:
        raise LabelError(
            f"{rows[0].path}: who gave which label? Its columns are {_listed(known)}. Name those of a rater each (--raters ann,bob), "
            f"or the one that says who (--rater COLUMN), or give a file a rater."
        )


def _require(rows: Sequence[LabelRow], known: Sequence[str], *wanted: tuple[str, str]) -> None:
    """Raise LabelError for a column that no row has."""
    for name, option in wanted:
        if name not in known:
            raise LabelError(f"{rows[0].path}: there is no column {name!r}; there are {_listed(known)}. Name one by {option}.")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(brief(name) for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown


def _item(row: LabelRow, column: str) -> str:
    item = _text(row, column)
    if not item:
        raise LabelError(f"{row.where}: the column {column!r} is empty: which item is it?")
    return item


def _text(row: LabelRow, column: str, columns: Columns | None = None) -> str:
    """A value as text, "" for none; of a label that counts as a number (`columns`) the shortest text of it."""
    value = row.values.get(column)
    if isinstance(value, dict | list):
        raise LabelError(f"{row.where}: {column!r} is {'an object' if isinstance(value, dict) else 'a list'}, not one label")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value).strip()
    numeric = isinstance(value, float) or (columns is not None and columns.level != "nominal" and not columns.order)
    number = _number(text) if numeric else None
    return text if number is None else repr(number).removesuffix(".0")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _in_order(given: Sequence[GivenLabel], columns: Columns) -> tuple[tuple[str, ...], Floats]:
    """The labels in order, and their values. Raises LabelError for a label without a value where one is needed."""
    first: dict[str, str] = {}
    for label in given:
        first.setdefault(label.label, label.where)
    if len(first) > MOST:
        raise LabelError(
            f"there are {len(first):,} different labels, such as {', '.join(map(repr, map(brief, list(first)[:3])))}, and {MOST:,} can be "
            "compared. Is it the right column (--label)? Round numbers to fewer."
        )
    if columns.order:
        strangers = [label for label in first if label not in columns.order]
        if strangers or len(set(columns.order)) < len(columns.order):
            what = f"{first[strangers[0]]}: the label {brief(strangers[0])!r} is not" if strangers else "a label is there twice"
            raise LabelError(f"{what} in --order {','.join(columns.order)}. Give every label once, from lowest to highest.")
        if columns.level == "interval":
            raise LabelError("--order gives no distances, which the level interval takes. Use --level ordinal.")
        return columns.order, np.arange(len(columns.order), dtype=np.float64)
    values = {label: _number(label) for label in first}
    numbers = {label: value for label, value in values.items() if value is not None}
    if len(numbers) == len(values):
        labels = tuple(sorted(numbers, key=lambda label: (numbers[label], label)))
        return labels, np.array([numbers[label] for label in labels])
    if columns.level == "nominal":
        return tuple(sorted(first)), np.arange(len(first), dtype=np.float64)
    text = next(label for label, value in values.items() if value is None)
    raise LabelError(
        f"{first[text]}: the label {brief(text)!r} is no number, which the level {columns.level} takes. Use --level nominal, or give "
        "the labels from lowest to highest with --level ordinal: --order bad,fair,good"
    )


def _rows(path: Path) -> Iterator[LabelRow]:
    """The rows of a file; its name says of which kind it is. Raises LabelError."""
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv", ".tsv"):
        raise LabelError(f"{path}: what kind of file is this? Names of labelled sets end in .jsonl, .csv or .tsv.")
    with opened(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabelError(not_utf8(data[:4096], str(path), error, f"line {line}")) from None
    yield from _json_rows(path, text) if kind == ".jsonl" else _table_rows(path, text, "," if kind == ".csv" else "\t")


def _json_rows(path: Path, text: str) -> Iterator[LabelRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LabelError(f"{path}:{number}: this is no JSON: {brief(error)}") from None
            if not isinstance(values, dict):
                raise LabelError(f'{path}:{number}: a line must be an object, such as {{"item": "7", "label": "good"}}')
            yield LabelRow(path, number, values)


def _table_rows(path: Path, text: str, separator: str) -> Iterator[LabelRow]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        if len(set(head)) < len(head):
            twice = next(name for name in head if head.count(name) > 1)
            raise LabelError(f"{path}:1: two columns are named {twice!r}. Give each its own name.")
        for values in reader:
            if len(values) > len(head):
                raise LabelError(
                    f"{path}:{reader.line_num}: {len(values)} values for {len(head)} columns ({_listed(head)}). Put a value that "
                    "contains the separator between double quotes."
                )
            if values:
                yield LabelRow(path, reader.line_num, dict(zip(head, values, strict=False)))
    except csv.Error as error:
        raise LabelError(f"{path}:{reader.line_num}: {brief(error)}") from None
