"""safetensors files, read and written in blocks, with a checksum for each block.

The format is that of the safetensors library (https://github.com/huggingface/safetensors), which can read these files: eight bytes
of header length, a JSON header, the data. The library writes and reads whole tensors; a checkpoint has to hash every block of 64 MiB
as it is written, and to read and verify only the blocks that a rank needs of a file of many gigabytes. Blocks are read with `pread`: a
file that is cut, or a disk that fails, is an error with its name, where a map would end the process (SIGBUS). Elements that are cast,
or of files without checksums, are read through a map.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import xxhash

from megatrain.checkpoint.together import DamagedCheckpointError
from megatrain.files import HEAD_BYTES, brief, head_of, pointer
from megatrain.untrusted import parse_json

BLOCK_BYTES = 64 * 2**20
"""Files are hashed in blocks of this many bytes, so that a reader can verify only what it reads."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's name of each dtype."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 2**24
"""Bytes, looked at before anything is parsed: room for 100,000 tensors, and a fraction of a second. The format allows 10^8."""
_MOST_BRACKETS = 2**19
"""Most opening brackets of a header, of which a tensor has three: small objects take fifty times the memory of their text."""
_LONGEST_NAME, _MOST_DIMENSIONS = 1000, 64
_PIECE_BYTES = 2**18
"""Bytes that are copied and hashed at a time: they fit in a core's own cache."""
_HASHERS = 2
"""Number of blocks verified at the same time, each in a thread."""


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of the tensor's first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def header_of(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry], int]:
    """The header of a file of tensors (name, dtype, shape), the entry of each, and the size of the whole file in bytes.

    Wide dtypes come first, so that every tensor is aligned. Raises ValueError for more tensors than a reader takes.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + prod(shape) * dtype.itemsize
        rows[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"{len(ordered)} tensors of one file take a header of {len(text)} bytes; {LONGEST_HEADER} can be read")
    data = 8 + len(text)
    entries = {name: Entry(dtype, shape, data + rows[name]["data_offsets"][0]) for name, dtype, shape in ordered}
    return len(text).to_bytes(8, "little") + text, entries, data + end


def hash_block(data: Any) -> str:
    """XXH3-128 checksum of a block, as 32 hex digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


class Move(NamedTuple):
    """A range of bytes to copy from a file into memory. Ranges of one file must not overlap."""

    start: int
    """Offset in the file."""
    nbytes: int
    target: int
    """Address in memory."""


class TensorFile:
    """A safetensors file, kept open. Raises DamagedCheckpointError, which names the file, for anything wrong with it."""

    def __init__(self, path: Path, size: int | None = None, blocks: Sequence[str] = (), block_bytes: int = BLOCK_BYTES) -> None:
        """size, blocks: the file's expected size in bytes and the checksum of each block, where known.

        Verifies no checksum, not even the header's: entries are checked against the file's size, and then used to find the blocks to
        verify.
        """
        self.path, self.blocks, self.block_bytes = path, blocks, block_bytes
        self.size = check_plain(path, size)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
        weakref.finalize(self, os.close, self._file)
        self._map: mmap.mmap | None = None
        """Made for the first view: it has an open file of its own."""
        self._verified: set[int] = set()
        length = int.from_bytes(self._bytes(0, 8), "little")
        if self.size < 8 or length > min(self.size - 8, LONGEST_HEADER):
            claims = f"its header claims {length} bytes, of the file's {self.size}; {LONGEST_HEADER} at most are read"
            raise DamagedCheckpointError(f"{path}: {pointer(bytes(self._bytes(0, HEAD_BYTES))) or claims}")
        self.header_bytes = 8 + length
        try:
            self.entries = _entries(self._bytes(8, length), 8 + length, self.size)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{path}: its header cannot be used: {brief(error)}") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.entries = {}  # the map is freed with its last tensor

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of a tensor, not verified; a copy if it is not aligned."""
        entry = self.entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.start % entry.dtype.itemsize:  # unaligned, as files of other programs may be
            return torch.frombuffer(self._bytes(entry.start, entry.nbytes), dtype=entry.dtype).view(entry.shape)
        size = os.fstat(self._file).st_size
        if size < self.size:  # what lies behind its end is no memory
            raise self._cut(size)
        if self._map is None:
            self._map = mmap.mmap(self._file, self.size, access=mmap.ACCESS_COPY)  # never written; torch wants it writable
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=prod(entry.shape), offset=entry.start)
        return flat.view(entry.shape)

    def verify(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Verify the checksums of the blocks that contain these byte ranges, each block once."""
        _go_through([(self, self.blocks_of(ranges) - self._verified, [])])

    def verify_all(self) -> None:
        """Verify the checksum of every block."""
        self.verify([(0, self.size)])

    def blocks_of(self, ranges: Iterable[tuple[int, int]]) -> set[int]:
        """Numbers of the blocks that contain these byte ranges."""
        return {i for start, end in ranges for i in range(start // self.block_bytes, -(-end // self.block_bytes))}

    def hasher(self, moves: Sequence[Move]) -> Callable[[int], str]:
        """A function that hashes a block and copies its bytes that `moves` ask for, piece by piece, so that a piece is read into cache
        once.
        """

        def one(index: int) -> str:
            start, end = index * self.block_bytes, min((index + 1) * self.block_bytes, self.size)
            digest, at = xxhash.xxh3_128(), start
            between = memoryview(bytearray(_PIECE_BYTES))

            def read(until: int, room: Callable[[int, int], memoryview]) -> None:
                nonlocal at
                while at < until:
                    piece = room(at, min(_PIECE_BYTES, until - at))
                    self._read(at, piece)
                    digest.update(piece)
                    at += len(piece)

            for first, nbytes, target in moves:
                read(min(first, end), lambda _, count: between[:count])
                read(min(first + nbytes, end), partial(_memory, target - first))
            read(end, lambda _, count: between[:count])
            return digest.hexdigest()

        return one

    def _bytes(self, begin: int, count: int) -> bytearray:
        """Bytes from `begin` on, as many as the file had when it was opened."""
        found = bytearray(max(0, min(count, self.size - begin)))
        self._read(begin, memoryview(found))
        return found

    def _read(self, begin: int, room: memoryview) -> None:
        done = 0
        try:
            while done < len(room):
                got = os.preadv(self._file, [room[done:]], begin + done)
                if not got:
                    raise self._cut(os.fstat(self._file).st_size)
                done += got
        except OSError as error:
            raise DamagedCheckpointError(f"{self.path} cannot be read at byte {begin + done}: {error.strerror}") from error

    def _cut(self, size: int) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self.path} was cut short while it was being read: it has {size} bytes, and had {self.size}"
        )

    def compare(self, index: int, have: str) -> None:
        """Raise DamagedCheckpointError unless `have` is the checksum of block `index`."""
        if have != self.blocks[index]:
            start, end = index * self.block_bytes, min((index + 1) * self.block_bytes, self.size)
            raise DamagedCheckpointError(
                f"{self.path} is damaged between bytes {start} and {end}: its XXH3-128 is {have}, "
                f"and the manifest says {self.blocks[index]}"
            )
        self._verified.add(index)


def move(moves: Sequence[tuple[TensorFile, Sequence[Move]]]) -> None:
    """Copy byte ranges of files into memory and verify the checksums of their blocks in the same pass.

    Raises DamagedCheckpointError, after which the contents of the memory are undefined.
    """
    _go_through([(file, file.blocks_of((m.start, m.start + m.nbytes) for m in of), sorted(of)) for file, of in moves])


def _go_through(work: Sequence[tuple[TensorFile, set[int], Sequence[Move]]]) -> None:
    """Hash blocks of files, copy byte ranges out of them, and compare checksums; _HASHERS blocks at a time."""
    tasks: list[tuple[TensorFile, int, Callable[[int], str]]] = []
    for file, blocks, moves in work:
        hasher = file.hasher(moves)
        tasks += [(file, index, hasher) for index in sorted(blocks)]
    with ThreadPoolExecutor(_HASHERS) as pool:
        found = list(pool.map(lambda task: task[2](task[1]), tasks))
    for (file, index, _), have in zip(tasks, found, strict=True):
        file.compare(index, have)


def _memory(base: int, at: int, count: int) -> memoryview:
    """The bytes in memory at address base + at [count]."""
    return memoryview((ctypes.c_char * count).from_address(base + at)).cast("B")


def check_plain(file: Path, size: int | None = None) -> int:
    """The size of a file in bytes. Raises DamagedCheckpointError unless it is a plain file (no link) of the expected size."""
    try:
        found = file.lstat()
    except OSError as error:
        raise DamagedCheckpointError(f"{file} is missing: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpointError(f"{file} is a link or no plain file; a checkpoint holds its files itself")
    if size is not None and found.st_size != size:
        why = pointer(head_of(file)) or f"it has {found.st_size} bytes, and the manifest says {size}"
        raise DamagedCheckpointError(f"{file}: {why}")
    return found.st_size


def _entries(text: bytearray, data: int, size: int) -> dict[str, Entry]:
    """Name -> entry of the tensors of a header. Raises ValueError, TypeError or KeyError where it contradicts itself or the file's size.

    As the format wants it, the tensors' bytes are the data: none is of two tensors, or of none.
    """
    rows = parse_json(text.decode(), _MOST_BRACKETS)
    more = rows.pop("__metadata__", {})
    if not all(type(value) is str for value in more.values()):
        raise ValueError("its __metadata__ is not all text")
    entries: dict[str, Entry] = {}
    for name, row in rows.items():
        start, end = row["data_offsets"]
        shape = tuple(row["shape"])
        if len(name) > _LONGEST_NAME or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has a name of {len(name)} characters and {len(shape)} dimensions: too many")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (start, end, *shape)):
            raise ValueError(f"{name!r} has sizes that are no sizes")
        if prod(n for n in shape if n) >= 2**63:  # of no elements where one is 0, but strides count the others
            raise ValueError(f"{name!r} has the absurd shape {list(shape)}")
        entry = Entry(DTYPES[row["dtype"]], shape, data + start)
        if end - start != entry.nbytes or data + end > size:
            raise ValueError(f"{name!r} claims bytes {start} to {end} for the shape {list(shape)} in a file of {size}")
        entries[name] = entry
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != at:
            what = (
                "overlaps the tensor before it" if entry.start < at else f"leaves {entry.start - at} bytes before it to nobody"
            )
            raise ValueError(f"{name!r}, which begins at byte {entry.start - data} of the data, {what}")
        at += entry.nbytes
    if at != size:
        raise ValueError(f"the last {size - at} bytes of the file are of no tensor")
    return entries
