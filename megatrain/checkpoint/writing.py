"""Writes files for checkpoints: the caller copies into blocks of a bounded buffer, a thread hashes and writes them.

    training loop     copy block 0 | copy 1 | copy 2 | (trains on) ...
    thread                  hash, write 0 | hash, write 1 | hash, write 2 | fsync | next action

If the buffer holds all that a rank saves, training waits for one copy only; if it is smaller, for the disk as well. The blocks are
those whose checksums are in the manifest. Their memory is kept for the next save.

Blocks are written past the page cache (O_DIRECT), where the file system can: a checkpoint is written once and, if all goes well, never
read, and filling the page cache with it would cost more than the disk does.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatrain.checkpoint.tensor_file import BLOCK_BYTES, Entry, hash_block, header_of
from megatrain.checkpoint.together import CheckpointError
from megatrain.parallel.portion import Elements

PAGE = 4096
"""Writes past the page cache are multiples of this many bytes."""
STAGING_SHARE = 0.25
"""Share of a node's memory for the copies of all its ranks."""
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass
class PlannedFile:
    """A safetensors file to be written: its path, tensors and header."""

    path: Path
    runs: Mapping[str, tuple[Elements, int]]
    """Name -> (elements, their number n): a tensor [n] each."""
    header: bytes = field(init=False)
    entries: dict[str, Entry] = field(init=False)
    size: int = field(init=False)
    """Size of the file in bytes."""
    blocks: list[str] = field(default_factory=list)
    """Checksum of each block, filled in when the block is written."""

    def __post_init__(self) -> None:
        named = [(name, elements.dtype, (count,)) for name, (elements, count) in self.runs.items()]
        self.header, self.entries, self.size = header_of(named)


def staging_bytes(gib: float, local_ranks: int) -> int:
    """Bytes of host memory for a rank's copy of what it saves: `gib` GiB, at most its share of STAGING_SHARE of the node's memory.

    On a GPU machine this memory is pinned: nothing else can use it, and the system cannot page it out.
    """
    node = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # a container's limit (cgroup v2); `max`, which is no integer, without one
        node = min(node, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(min(gib * 2**30, STAGING_SHARE * node / local_ranks))


class Staging:
    """Blocks of host memory, at most `limit` bytes in all, that are lent out and reused."""

    def __init__(self, limit: int, device: torch.device, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes, self._most = block_bytes, max(2, limit // block_bytes)
        self._pinned = device.type == "cuda"
        self._made = 0
        self._free: list[torch.Tensor] = []
        self._given = threading.Condition()

    def take(self, needed: Callable[[], None]) -> torch.Tensor:
        """Lend a block, uint8 [block_bytes]. If all are in use, call `needed` and wait for one."""
        with self._given:
            while not self._free and self._made >= self._most:
                needed()
                self._given.wait()
            if self._free:
                return self._free.pop()
            self._made += 1
        if self._pinned:
            return torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=True)
        pages = mmap.mmap(-1, self.block_bytes)  # begins at a page, as O_DIRECT asks for
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def give(self, block: torch.Tensor) -> None:
        """Return a block."""
        with self._given:
            self._free.append(block)
            self._given.notify()


class Writer:
    """The thread that writes files, one task after the other."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._failure: BaseException | None = None
        self._may_write = threading.Event()
        self.at = Path()
        """The file or directory that was turned to last, which may be one that does not answer."""

    @contextmanager
    def copying(self, *, first: bool) -> Iterator[None]:
        """Context of the `write` calls of one save. first: the thread starts when everything is copied, or the blocks are used up, since it
        would take memory bandwidth from the copy.
        """
        self._pool.submit(int).result()  # blocks that a failed save has left: their errors are not this one's
        self._failure = None
        if first:
            self._may_write.clear()
        else:
            self._may_write.set()
        try:
            yield
        finally:
            self._may_write.set()

    def write(self, file: PlannedFile) -> None:
        """Copy a whole file into blocks for the thread to write; returns when all is copied.

        Raises CheckpointError if the file cannot be made. Later errors are passed to the action of `then`.
        """
        try:
            descriptor = self._open(file)
        except OSError as error:
            raise _cannot_write(file, error) from error
        file.blocks = [""] * -(-file.size // self.staging.block_bytes)
        for index in range(len(file.blocks)):
            block = self.staging.take(self._may_write.set)
            start = index * self.staging.block_bytes
            length = min(self.staging.block_bytes, file.size - start)
            try:
                sums = _fill(block[:length], start, file)
            except BaseException:
                self.staging.give(block)
                self._pool.submit(os.close, descriptor)
                raise
            self._pool.submit(self._write_block, file, descriptor, index, block[:length], sums, block)
        self._pool.submit(self._finish, file, descriptor)

    def then(self, action: Callable[[BaseException | None], None]) -> Future[None]:
        """Run `action` in the thread when all files so far are on the disk. Its argument is the first error in writing them, or None."""
        return self._pool.submit(lambda: action(self._failure))

    def close(self) -> None:
        """End the thread when it has done all its tasks."""
        self._pool.shutdown()

    def _open(self, file: PlannedFile) -> int:
        self.at = file.path
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        if self.staging.block_bytes % PAGE == 0 and _DIRECT:
            with suppress(OSError):
                return os.open(file.path, flags | _DIRECT, 0o666)
            file.path.unlink(missing_ok=True)  # the file system made it before it refused
        return os.open(file.path, flags, 0o666)

    def _write_block(
        self, file: PlannedFile, descriptor: int, index: int, filled: torch.Tensor, sums: list[Sum], block: torch.Tensor
    ) -> None:
        try:
            self._may_write.wait()
            self.at = file.path
            if self._failure is None:
                whole = block.numpy().data
                file.blocks[index] = hash_block(whole[: len(filled)])
                _require_as_copied(whole, sums, file, index * self.staging.block_bytes)
                _write_at(descriptor, whole, len(filled), index * self.staging.block_bytes)
        except BaseException as error:
            self._fail(file, error)
        finally:
            self.staging.give(block)

    def _finish(self, file: PlannedFile, descriptor: int) -> None:
        self.at = file.path
        try:
            if self._failure is None:
                os.ftruncate(descriptor, file.size)  # writes past the cache were whole pages
                os.fsync(descriptor)
        except BaseException as error:
            self._fail(file, error)
        finally:
            os.close(descriptor)

    def _fail(self, file: PlannedFile, error: BaseException) -> None:
        if self._failure is None:
            self._failure = _cannot_write(file, error) if isinstance(error, OSError) else error


def _write_at(descriptor: int, block: memoryview, length: int, start: int) -> None:
    """Write the first `length` bytes of a block at offset `start` of a file; whole pages if it is open past the page cache."""
    direct = bool(_DIRECT and fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)
    wanted = min(-(-length // PAGE) * PAGE, len(block)) if direct else length
    done = 0
    while done < wanted:
        try:
            done += os.pwrite(descriptor, block[done:wanted], start + done)
        except OSError as error:
            if not (direct and error.errno == errno.EINVAL):
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
            direct, wanted = False, length  # a file system that accepts the flag but not the write


def _cannot_write(file: PlannedFile, error: OSError) -> CheckpointError:
    free = ""
    with suppress(OSError):  # a disk that fails at one call may fail at the next
        free = f", and the disk has {shutil.disk_usage(file.path.parent.parent).free:,} free"
    return CheckpointError(
        f"cannot write {file.path}: {error.strerror or error}. It needs {file.size:,} bytes{free}. Older checkpoints are as they were. "
        "Make room, lower checkpoint.keep, or set checkpoint.dir to another disk."
    )


class Sum(NamedTuple):
    """The sum that bytes of a block must have."""

    at: int
    length: int
    total: int
    """Sum of their 64-bit words, and of the bytes that are left, modulo 2^64."""


def _require_as_copied(block: memoryview, sums: list[Sum], file: PlannedFile, start: int) -> None:
    """Raise CheckpointError if a block has changed since it was filled. Call it with the checksum known, which holds for the same bytes."""
    for at, length, total in sums:
        words = length // 8
        found = int(np.frombuffer(block, np.int64, words, at).sum()) + sum(block[at + 8 * words : at + length])
        if (found - total) % (1 << 64):
            raise CheckpointError(
                f"memory of {socket.gethostname()} has changed by itself while {file.path} was being written: bytes {start + at} to "
                f"{start + at + length - 1} are not those that were copied. Older checkpoints are as they were. Look for a broken device."
            )


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's 64-bit words and of the bytes that are left: int64 scalar on its device, modulo 2^64."""
    data = values.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    words = len(data) // 8 * 8
    return data[:words].view(torch.int64).sum() + data[words:].sum()


def _fill(block: torch.Tensor, start: int, file: PlannedFile) -> list[Sum]:
    """Copy bytes start .. start + length - 1 of a file (header, tensors) into a block uint8 [length]; returns what they add up to, summed
    where they come from.
    """
    sums: list[tuple[int, int, torch.Tensor]] = []
    stop = start + block.numel()
    if start < len(file.header):
        part = file.header[start : min(stop, len(file.header))]
        given = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        block[: len(part)] = given
        sums.append((0, len(part), _sum(given)))
    waits = False
    for elements, entry, first, last in _overlaps(file, start, stop):
        at = entry.start + first * entry.dtype.itemsize - start
        target = block[at : at + (last - first) * entry.dtype.itemsize].view(entry.dtype)
        values = elements.read(slice(first, last))
        target.copy_(values, non_blocking=values.is_cuda)
        sums.append((at, target.nbytes, _sum(values.to(entry.dtype))))
        waits = waits or values.is_cuda
    if waits:
        torch.cuda.synchronize()
    return [Sum(at, length, int(total)) for at, length, total in sums]


def _overlaps(file: PlannedFile, start: int, stop: int) -> Iterator[tuple[Elements, Entry, int, int]]:
    """The tensors within bytes start .. stop - 1 of a file: elements, entry, number of the first element there and of the one after the
    last.
    """
    for name, (elements, count) in file.runs.items():
        entry = file.entries[name]
        size = entry.dtype.itemsize
        first = max(0, (start - entry.start) // size)
        last = min(count, (stop - entry.start) // size)
        if first < last:
            yield elements, entry, first, last
