"""Files of columns of numbers, written once, block by block, and read in ranges: what the passes over a corpus hand to each
other.

    megatrain keys 1\\n | column | column | ... | footer (JSON) | its length (8 bytes) | its xxh3-64 (8 bytes)

    footer    {"kind": "fingerprints", "about": {...}, "blocks": [{"exact.rows": ["<u4", [1651], 64], ...}, ...]}   dtype, shape, offset

A block has as many rows as whoever writes it can hold in memory; a reader takes the blocks of all files, in order, for one long
table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import dumps
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.files import OneLine, brief, doing, opened_plain, whole
from megatrain.untrusted import parse_json

MAGIC = b"megatrain keys 1\n"
_TAIL, _ALIGNED, _LONGEST = 16, 64, 1 << 28
_TAKEN, _SEARCHED = 1024, 512
"""Rows that are read at a time where some of them are wanted, and where the last steps of a search are taken together."""
_DTYPES = ("<u8", "<i8", "<u4", "<u2", "|u1")
Column: TypeAlias = npt.NDArray[Any]


class KeyFileError(OneLine, ValueError):
    """A file of columns that is damaged, or was made with other settings; the message names it and says what to do."""

    @classmethod
    def damaged(cls, path: Path, why: object) -> KeyFileError:
        """The error for a file that cannot be what a pass has written."""
        return cls(f"{path} is damaged: {brief(why)}. Remove it and run the same command again, which makes it anew.")


class KeyWriter:
    """Writes the blocks of one file."""

    def __init__(self, file: BinaryIO, kind: str) -> None:
        self._file, self._kind = file, kind
        self._at = file.write(MAGIC)
        self._blocks: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        """Said of the file as a whole in the footer; may be filled in until its end."""

    def block(self, columns: Mapping[str, Column]) -> None:
        """Append columns, by name."""
        entries = {}
        for name, column in columns.items():
            self._at += self._file.write(bytes(-self._at % _ALIGNED))
            little = np.ascontiguousarray(column, column.dtype.newbyteorder("<"))
            entries[name] = [little.dtype.str, list(little.shape), self._at]
            self._at += self._file.write(little.data.cast("B") if little.size else b"")
        self._blocks.append(entries)

    def end(self) -> None:
        """Write the footer."""
        footer = dumps({"kind": self._kind, "about": self.about, "blocks": self._blocks}).encode()
        self._file.write(footer + len(footer).to_bytes(8, "little") + xxhash.xxh3_64_digest(footer))


@contextmanager
def written(path: str | Path, kind: str) -> Iterator[KeyWriter]:
    """A writer of a file, which appears when all of it is on the disk. Raises OSError as `files.whole` does."""
    with whole(path) as file:
        writer = KeyWriter(file, kind)
        yield writer
        writer.end()


class StoredColumn:
    """A column of a file, or some rows of one, read where it is asked for."""

    def __init__(self, path: Path, dtype: str, shape: Sequence[int], offset: int) -> None:
        self.path, self.dtype, self.shape, self._offset = path, np.dtype(dtype), tuple(shape), offset
        self._width = prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def end(self) -> int:
        """Number of the byte behind the column in its file."""
        return self._offset + len(self) * self._width

    def part(self, row: int) -> StoredColumn:
        """One row of a column that is a table, as a column of its own."""
        return StoredColumn(self.path, self.dtype.str, self.shape[1:], self._offset + row * self._width)

    def read(self, begin: int = 0, end: int | None = None) -> Column:
        """Rows `begin` to `end` - 1 of the column, by default to its last."""
        with opened_plain(self.path) as file:
            return self._read(file, begin, len(self) if end is None else end)

    def take(self, rows: npt.NDArray[np.int64]) -> Column:
        """The rows of the column with these numbers, which ascend."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        pieces = np.searchsorted(rows, range(0, len(self) + _TAKEN, _TAKEN)).tolist()
        with opened_plain(self.path) as file:
            for begin, end in itertools.pairwise(pieces):
                if begin < end:
                    first = int(rows[begin])
                    found[begin:end] = self._read(file, first, int(rows[end - 1]) + 1)[rows[begin:end] - first]
        return found

    def range_of(self, low: int, high: int) -> slice:
        """Where the values from `low` to `high` lie, both included, in ascending ones."""
        with opened_plain(self.path) as file:
            return slice(self._place(file, low, "left"), self._place(file, high, "right"))

    def _place(self, file: BinaryIO, value: int, side: Literal["left", "right"]) -> int:
        """Number of the row before which a value belongs in an ascending column, found by bisection."""
        low, high = 0, len(self)
        while high - low > _SEARCHED:
            middle = (low + high) // 2
            found = int(self._read(file, middle, middle + 1)[0])
            if found < value or (side == "right" and found == value):
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self._read(file, low, high), self.dtype.type(value), side))

    def _read(self, file: BinaryIO, begin: int, end: int) -> Column:
        found = np.empty((end - begin, *self.shape[1:]), self.dtype)
        if found.size:
            file.seek(self._offset + begin * self._width)
            if (got := file.readinto(found.data.cast("B"))) != found.nbytes:  # type: ignore[attr-defined]
                raise KeyFileError.damaged(self.path, f"of {found.nbytes:,} bytes of a column, {got:,} are there")
        return found


class KeyFile:
    """A file of columns. Raises OSError, and KeyFileError for one that is damaged or of another kind.

    Nothing of it is mapped: a file that is cut while it is read is an error, and its pages are no memory of the task.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path = Path(path)
        with doing("reading", path), opened_plain(self.path) as file:
            size = file.seek(0, 2)
            try:
                footer = _footer(file, size)
                self.about: dict[str, Any] = dict(footer["about"])
                """Said of the file as a whole by its writer."""
                self.blocks = [
                    KeyBlock(self, {name: self._column(size, *entry) for name, entry in block.items()})
                    for block in footer["blocks"]
                ]
                found = footer["kind"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise KeyFileError.damaged(self.path, error) from None
        if found != kind:
            raise KeyFileError(
                f"{self.path} holds {brief(found)}, where {kind} are wanted. Give the files of the pass that makes {kind}."
            )

    def _column(self, size: int, dtype: str, shape: list[int], offset: int) -> StoredColumn:
        """A column that the footer names. Raises ValueError if it does not lie in the file."""
        if dtype not in _DTYPES or not shape or not all(type(one) is int and 0 <= one <= size for one in [*shape, offset]):
            raise ValueError(f"its footer has a column {[dtype, shape, offset]}")
        column = StoredColumn(self.path, dtype, shape, offset)
        if column.end > size:
            raise ValueError(f"a column {[dtype, shape, offset]} does not lie in its {size:,} bytes")
        return column

    def read(self, name: str) -> Column:
        """A column, with the rows of all blocks behind one another."""
        return np.concatenate([block.column(name).read() for block in self.blocks])


class KeyBlock(NamedTuple):
    """Some rows of a file."""

    file: KeyFile
    columns: dict[str, StoredColumn]

    def column(self, name: str) -> StoredColumn:
        """A column. Raises KeyFileError if there is none."""
        if name not in self.columns:
            raise KeyFileError.damaged(self.file.path, f"it has no column {name}")
        return self.columns[name]


def _footer(file: BinaryIO, size: int) -> Any:
    """The footer of a file of so many bytes. Raises ValueError."""
    if size < len(MAGIC) + _TAIL:
        raise ValueError(f"it has {size:,} bytes")
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC.decode().strip()!r}")
    file.seek(size - _TAIL)
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[:8], "little")
    begin = size - _TAIL - length
    if length > _LONGEST or begin < len(MAGIC):
        raise ValueError(f"its last 16 bytes ask for a footer of {length:,} bytes, and it has {size:,}")
    file.seek(begin)
    text = file.read(length)
    if xxhash.xxh3_64_digest(text) != tail[8:]:
        raise ValueError("its footer has another hash than it says")
    return parse_json(text)


def hashes_of(part: int, parts: int) -> tuple[int, int]:
    """The least and the greatest 64-bit hash of a part, so that parts, 0 to parts - 1, hold about as many each."""
    return -(-(part << 64) // parts), -(-(part + 1 << 64) // parts) - 1
