"""An array of a mapped file of which no byte is used before its checksum is verified, a block at a time, when it is first read.

So a model of any size opens at once, and what is never read costs nothing. Once every block has been read, reading is numpy's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

ALIGN = 64
BLOCK_BYTES = 1 << 16
Array = npt.NDArray[Any]


class BinaryError(ValueError):
    """A file that is not a compiled model of this version, or is damaged."""


def padded(nbytes: int) -> int:
    """The next multiple of ALIGN, where the next section begins."""
    return -(-nbytes // ALIGN) * ALIGN


def block_count(nbytes: int) -> int:
    """Number of blocks of an array of so many bytes, padding included or not."""
    return -(-nbytes // BLOCK_BYTES)


def blocks(values: Array) -> Iterator[Any]:
    """The bytes of an array a block at a time, the last one padded with zeros."""
    data = values.view(np.uint8)
    for begin in range(0, data.size, BLOCK_BYTES):
        block = data[begin : begin + BLOCK_BYTES]
        yield block.tobytes().ljust(padded(block.size), b"\0") if block.size % ALIGN else block.data


def checksums(values: Array) -> npt.NDArray[np.uint64]:
    """XXH3-64 of each block of an array."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, blocks(values)), np.uint64, block_count(values.nbytes))


class MappedArray:
    """One array of a mapped model, indexed like a plain one by arrays of places. Raises BinaryError where it is read and damaged."""

    def __init__(
        self,
        names: tuple[Path, str],
        data: Array,
        dtype: str,
        count: int,
        sums: Array,
        wrong: Callable[[Array], npt.NDArray[np.bool_]],
    ) -> None:
        """names: of the file and the section, for errors. data: its bytes with padding. wrong: which of some values no model has."""
        self._names, self._data, self._sums, self._wrong = names, data, sums, wrong
        self._values: Array = data[: count * np.dtype(dtype).itemsize].view(dtype)
        self._each = BLOCK_BYTES // self._values.itemsize
        self._unread = np.ones(sums.size, bool)
        self._left = int(sums.size)
        self.size = count

    def __getitem__(self, at: npt.NDArray[np.integer]) -> Array:
        if self._left:
            asked = np.zeros(self._unread.size, bool)
            asked[at // self._each] = True
            self._verify(np.flatnonzero(asked & self._unread))
        found: Array = self._values[at]
        return found

    def verify(self) -> None:
        """Verify all that has not been read yet."""
        self._verify(np.flatnonzero(self._unread))

    def _verify(self, numbers: npt.NDArray[np.integer]) -> None:
        path, name = self._names
        for block in numbers.tolist():
            data = self._data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if xxhash.xxh3_64_intdigest(data.data) != int(self._sums[block]):
                raise BinaryError(
                    f"{path} is damaged: the checksum of its {name}, {data.size} bytes from {block * BLOCK_BYTES:,} on, is not the one it "
                    "was written with. Compile it again."
                )
            first = block * self._each
            bad = self._wrong(self._values[first : first + self._each])
            if bad.any():
                at = first + int(bad.argmax())
                raise BinaryError(f"{path} is damaged: its {name} has {self._values[at]} at place {at}. Compile it again.")
            self._unread[block] = False
            self._left -= 1
