"""Values of the columns of parquet files as JSON has them, whatever their type.

    text, binary                      text, with U+FFFD for what is no UTF-8
    numbers, truth values, null       themselves
    dates, times                      ISO 8601, to the last digit; those of a time zone in UTC (2026-01-02T03:04:05.000000006Z)
    durations                         ISO 8601, in seconds (PT1.500S)
    decimals, all others              their text
    structures, maps, lists           objects, lists of {"key", "value"}, lists

Not by `to_pylist` where Python has no such value: it refuses nanoseconds, years beyond 9999 and text that is no UTF-8, or gives what
another package has for them, where that is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
"""Digits of a second, by unit."""


def texts_of(column: Any, arrow: Any) -> list[bytes | str]:
    """The texts of a column in bytes, since a file may hold in it what is no UTF-8; of values that are no text, their type."""
    kinds, column = arrow.types, _unpacked(column, arrow)
    if _is_text(column.type, kinds):
        return [value if isinstance(value, bytes) else "NoneType" for value in _bytes_of(column, arrow)]
    names = ((kinds.is_integer, "int"), (kinds.is_floating, "float"), (kinds.is_boolean, "bool"))
    name = next((name for is_kind, name in names if is_kind(column.type)), str(column.type))
    return ["NoneType" if null else name for null in column.is_null().to_pylist()]


def values_of(column: Any, arrow: Any) -> list[Any]:
    """The values of a column."""
    kinds, column = arrow.types, _unpacked(column, arrow)
    kind = column.type
    if _is_text(kind, kinds):
        return [None if value is None else value.decode(errors="replace") for value in _bytes_of(column, arrow)]
    if kinds.is_temporal(kind):
        return list(_times_of(column, arrow))
    if kinds.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        rows = zip(*(values_of(part, arrow) for part in column.flatten()), strict=True) if names else iter([()] * len(column))
        return [
            dict(zip(names, row, strict=True)) if is_there else None
            for row, is_there in zip(rows, column.is_valid().to_pylist(), strict=True)
        ]
    if kinds.is_nested(kind):
        lists = (value.values for value in column)
        return [None if values is None else values_of(values, arrow) for values in lists]
    return [value if value is None or isinstance(value, (bool, int, float)) else str(value) for value in column.to_pylist()]


def _unpacked(column: Any, arrow: Any) -> Any:
    """A column without what stands around its values: a dictionary, a type of the user's."""
    while (is_packed := arrow.types.is_dictionary(column.type)) or isinstance(column.type, arrow.BaseExtensionType):
        column = column.dictionary_decode() if is_packed else column.storage
    return column


def _is_text(kind: Any, kinds: Any) -> bool:
    strings = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    binaries = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in (*strings, *binaries))


def _bytes_of(column: Any, arrow: Any) -> list[bytes | None]:
    values: list[bytes | None] = column.cast(arrow.large_binary()).to_pylist()
    return values


def _times_of(column: Any, arrow: Any) -> Iterator[str | None]:
    kind, kinds = column.type, arrow.types
    if kinds.is_duration(kind):
        return (
            None if count is None else _duration(count, _DIGITS[kind.unit]) for count in column.cast(arrow.int64()).to_pylist()
        )
    if not kinds.is_timestamp(kind):
        return (value for value in column.cast(arrow.string()).to_pylist())
    end = "" if kind.tz is None else "Z"
    times = column.cast(arrow.timestamp(kind.unit)).cast(arrow.string()).to_pylist()
    return (value if value is None or value.startswith("<") else value.replace(" ", "T") + end for value in times)


def _duration(count: int, digits: int) -> str:
    """A number of units as ISO 8601 has it."""
    seconds, rest = divmod(abs(count), 10**digits)
    return f"{'-' if count < 0 else ''}PT{seconds}{f'.{rest:0{digits}}' if digits else ''}S"
