"""Files of columns of numbers, written once, block by block, and read in ranges: what the passes over a corpus hand to each
other.

    megatrain keys 1\\n | column | column | ... | footer (JSON) | its length (8 bytes) | its xxh3-64 (8 bytes)

    footer    {"kind": "fingerprints", "about": {...}, "blocks": [{"exact.rows": ["<u4", [1651], 64], ...}, ...]}   dtype, shape, offset

A block has as many rows as whoever writes it can hold in memory; a reader takes the blocks of all files, in order, for one long
table.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import dumps
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.files import OneLine, brief, opened_plain, whole
from megatrain.untrusted import parse_json

MAGIC = b"megatrain keys 1\n"
_TAIL, _ALIGNED, _LONGEST = 16, 64, 1 << 28
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


class StoredColumn(NamedTuple):
    """Where a column lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + prod(self.shape) * np.dtype(self.dtype).itemsize


class KeyFile:
    """A file of columns, mapped. Raises OSError, and KeyFileError for one that is damaged or of another kind."""

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path = Path(path)
        with opened_plain(self.path) as file:
            if file.seek(0, 2) < len(MAGIC) + _TAIL:
                raise KeyFileError.damaged(self.path, f"it has {file.tell()} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            footer = self._footer()
            self.about: dict[str, Any] = footer["about"]
            """Said of the file as a whole by its writer."""
            self._blocks = [{name: self._entry(*entry) for name, entry in block.items()} for block in footer["blocks"]]
            found = footer["kind"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KeyFileError.damaged(self.path, error) from None
        if found != kind:
            raise KeyFileError(
                f"{self.path} holds {brief(found)}, where {kind} are wanted. Give the files of the pass that makes {kind}."
            )

    def _footer(self) -> Any:
        """The footer. Raises ValueError."""
        if self._map[: len(MAGIC)] != MAGIC:
            raise ValueError(f"it does not begin with {MAGIC.decode().strip()!r}")
        size = len(self._map)
        length = int.from_bytes(self._map[size - _TAIL : size - _TAIL + 8], "little")
        begin = size - _TAIL - length
        if length > _LONGEST or begin < len(MAGIC):
            raise ValueError(f"its last 16 bytes ask for a footer of {length:,} bytes, and it has {size:,}")
        text = self._map[begin : begin + length]
        if xxhash.xxh3_64_digest(text) != self._map[size - 8 :]:
            raise ValueError("its footer has another hash than it says")
        return parse_json(text)

    @property
    def blocks(self) -> list[KeyBlock]:
        """Its blocks, in order."""
        return [KeyBlock(self, entries) for entries in self._blocks]

    def column(self, name: str) -> Column:
        """A column over all blocks: an array over the file where it has one block, else a copy."""
        columns = [block.column(name) for block in self.blocks]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    def view(self, entry: StoredColumn) -> Column:
        """A column as an array over the file."""
        return np.frombuffer(self._map, entry.dtype, prod(entry.shape), entry.offset).reshape(entry.shape)

    def _entry(self, dtype: str, shape: list[int], offset: int) -> StoredColumn:
        """A column that the footer names. Raises ValueError if it does not lie in the file."""
        sizes = [*shape, offset]
        if dtype not in _DTYPES or not all(type(size) is int and 0 <= size <= len(self._map) for size in sizes):
            raise ValueError(f"its footer has a column {[dtype, shape, offset]}")
        entry = StoredColumn(dtype, tuple(shape), offset)
        if entry.end > len(self._map):
            raise ValueError(f"a column {list(entry)} does not lie in its {len(self._map):,} bytes")
        return entry


class KeyBlock(NamedTuple):
    """Some rows of a file."""

    file: KeyFile
    entries: dict[str, StoredColumn]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def rows(self, name: str) -> int:
        """The length of a column, without reading it."""
        return self._entry(name).shape[0]

    def column(self, name: str) -> Column:
        """A column, as an array over the file."""
        return self.file.view(self._entry(name))

    def _entry(self, name: str) -> StoredColumn:
        if name not in self.entries:
            raise KeyFileError.damaged(self.file.path, f"it has no column {name}")
        return self.entries[name]


def split_at(part: int, parts: int) -> tuple[int, int]:
    """The least and the greatest 64-bit hash of a part, so that parts, 0 to parts - 1, hold about as many each."""
    return -(-(part << 64) // parts), -(-(part + 1 << 64) // parts) - 1


def range_of(hashes: npt.NDArray[np.uint64], part: int, parts: int) -> slice:
    """Where a part of ascending hashes lies [n]."""
    low, high = split_at(part, parts)
    return slice(int(np.searchsorted(hashes, np.uint64(low), "left")), int(np.searchsorted(hashes, np.uint64(high), "right")))
