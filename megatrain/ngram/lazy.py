"""An array in a file that comes into memory a block at a time, when it is first read, and only if its checksum is right.

So a model of any size opens at once, and what is never read costs nothing. Once every block has been read, reading is numpy's alone. A map
of the file would be as fast, but a file that is cut under it ends the process (SIGBUS), and one that is overwritten is used unverified.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.files import OneLine

ALIGN = 64
BLOCK_BYTES = 1 << 16
Array = npt.NDArray[Any]


class BinaryError(OneLine, ValueError):
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


class ModelFile:
    """A file that stays open. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size
        """Bytes of the file, as it was opened."""

    def read(self, begin: int, data: Array) -> None:
        """Read the bytes from `begin` on into `data` [n] of uint8. Raises BinaryError where the file has become shorter; OSError."""
        done = 0
        while done < data.size and (got := os.preadv(self._file, [data[done:].data], begin + done)):
            done += got
        if done < data.size:
            raise BinaryError(
                f"{self.path} was cut short while it was in use: it has {os.fstat(self._file).st_size:,} bytes, and had {self.size:,}. "
                "Compile it again, under a name of its own, or with `mv`, which leaves those alone that have the old one open."
            )


class LazyArray:
    """One array of a model's file, indexed like a plain one by arrays of places. Raises BinaryError where it is read and damaged."""

    def __init__(
        self,
        file: ModelFile,
        section: str,
        begin: int,
        dtype: str,
        count: int,
        sums: Array,
        wrong: Callable[[Array], npt.NDArray[np.bool_]],
    ) -> None:
        """section: its name, for errors. begin: its first byte in the file. wrong: which of some values no model has."""
        self._file, self._section, self._begin, self._sums, self._wrong = file, section, begin, sums, wrong
        nbytes = count * np.dtype(dtype).itemsize
        self._data = _room(padded(nbytes))
        self._values: Array = self._data[:nbytes].view(dtype)
        self._each = BLOCK_BYTES // self._values.itemsize
        """Values of a block, a power of 2."""
        self._unread = np.ones(sums.size, bool)
        self._left = int(sums.size)
        self.size = count

    def __getitem__(self, at: npt.NDArray[np.integer]) -> Array:
        if self._left:
            asked = np.zeros(self._unread.size, bool)
            asked[at >> (self._each.bit_length() - 1)] = True  # `at` may be of a type too small for a division by it
            self._verify(np.flatnonzero(asked & self._unread))
        found: Array = self._values[at]
        return found

    def verify(self) -> None:
        """Verify all that has not been read yet."""
        self._verify(np.flatnonzero(self._unread))

    def _verify(self, numbers: npt.NDArray[np.integer]) -> None:
        path, name = self._file.path, self._section
        for block in numbers.tolist():
            data = self._data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            self._file.read(self._begin + block * BLOCK_BYTES, data)
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


def _room(nbytes: int) -> Array:
    """Zeros, of which the system gives memory to the pages that are written, small ones: a few blocks of a large model take little.

    Raises OSError where there is never so much.
    """
    if not nbytes:
        return np.empty(0, np.uint8)
    room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a system that has no huge pages
            room.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(room, np.uint8)
