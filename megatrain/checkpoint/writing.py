"""Files on their way to the disk: the caller copies into blocks of a bounded buffer, a thread hashes and writes them.

    training loop     copy block 0 | copy 1 | copy 2 | (goes on) ...
    thread                  hash, write 0 | hash, write 1 | hash, write 2 | fsync | what is to follow

Where the buffer takes all that a rank saves, the loop waits for one copy; where it is smaller, for the disk as well. The blocks are
those of which the manifest holds checksums, and they are kept for the next save.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatrain.checkpoint.tensor_file import BLOCK_BYTES, Entry, hash_block, header_of
from megatrain.checkpoint.together import CheckpointError
from megatrain.parallel.portion import Elements


@dataclass
class PlannedFile:
    """A safetensors file to be written: where, and of what."""

    path: Path
    runs: Mapping[str, tuple[Elements, int]]
    """Name -> elements, and how many of them; a tensor [n] each."""
    header: bytes = field(init=False)
    entries: dict[str, Entry] = field(init=False)
    size: int = field(init=False)
    """Bytes."""
    blocks: list[str] = field(default_factory=list)
    """Checksum of each block, filled in as they are written."""

    def __post_init__(self) -> None:
        named = [(name, elements.dtype, (count,)) for name, (elements, count) in self.runs.items()]
        self.header, self.entries, self.size = header_of(named)


class Staging:
    """Blocks of host memory, at most `limit` bytes of them, that are given back and used again."""

    def __init__(self, limit: int, device: torch.device, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes, self._most = block_bytes, max(2, limit // block_bytes)
        self._pinned = device.type == "cuda"
        self._made = 0
        self._free: list[torch.Tensor] = []
        self._given = threading.Condition()

    def take(self) -> torch.Tensor:
        """A block, uint8; waits for one where all are in use."""
        with self._given:
            while not self._free and self._made >= self._most:
                self._given.wait()
            if self._free:
                return self._free.pop()
            self._made += 1
        return torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, block: torch.Tensor) -> None:
        """Take a block back."""
        with self._given:
            self._free.append(block)
            self._given.notify()


class Writer:
    """The thread that writes, one thing after the other."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._failure: BaseException | None = None

    def begin(self) -> None:
        """Forget what went wrong with earlier files."""
        self._failure = None

    def write(self, file: PlannedFile) -> None:
        """Copy all of a file into blocks and let the thread write them; returns when all is copied.

        Raises CheckpointError where the file cannot be made. What goes wrong later is what `then` tells.
        """
        try:
            descriptor = os.open(file.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError as error:
            raise _cannot_write(file, error) from error
        file.blocks = [""] * -(-file.size // self.staging.block_bytes)
        for index in range(len(file.blocks)):
            block = self.staging.take()
            start = index * self.staging.block_bytes
            length = min(self.staging.block_bytes, file.size - start)
            try:
                _fill(block[:length], start, file)
            except BaseException:
                self.staging.give(block)
                self._pool.submit(os.close, descriptor)
                raise
            self._pool.submit(self._write_block, file, descriptor, index, block, length)
        self._pool.submit(self._finish, file, descriptor)

    def then(self, action: Callable[[BaseException | None], None]) -> Future[None]:
        """Run `action` in the thread when all files so far are on the disk; it is told what went wrong with them, or None."""
        return self._pool.submit(lambda: action(self._failure))

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._pool.shutdown()

    def _write_block(self, file: PlannedFile, descriptor: int, index: int, block: torch.Tensor, length: int) -> None:
        try:
            if self._failure is None:
                view = block.numpy().data[:length]
                file.blocks[index] = hash_block(view)
                done, start = 0, index * self.staging.block_bytes
                while done < length:
                    done += os.pwrite(descriptor, view[done:], start + done)
        except BaseException as error:
            self._fail(file, error)
        finally:
            self.staging.give(block)

    def _finish(self, file: PlannedFile, descriptor: int) -> None:
        try:
            if self._failure is None:
                os.fsync(descriptor)
        except BaseException as error:
            self._fail(file, error)
        finally:
            os.close(descriptor)

    def _fail(self, file: PlannedFile, error: BaseException) -> None:
        if self._failure is None:
            self._failure = _cannot_write(file, error) if isinstance(error, OSError) else error


def _cannot_write(file: PlannedFile, error: OSError) -> CheckpointError:
    free = shutil.disk_usage(file.path.parent.parent).free
    return CheckpointError(
        f"cannot write {file.path}: {error.strerror or error}. It needs {file.size:,} bytes, and the disk has {free:,} free. Older "
        "checkpoints are as they were. Make room, lower checkpoint.keep, or set checkpoint.dir to another disk."
    )


def _fill(block: torch.Tensor, start: int, file: PlannedFile) -> None:
    """Copy bytes `start` to `start` + length of a file into a block [length]."""
    stop = start + block.numel()
    if start < len(file.header):
        part = file.header[start : min(stop, len(file.header))]
        block[: len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
    waits = False
    for elements, entry, first, last in _overlaps(file, start, stop):
        at = entry.start + first * entry.dtype.itemsize - start
        target = block[at : at + (last - first) * entry.dtype.itemsize].view(entry.dtype)
        values = elements.read(slice(first, last))
        target.copy_(values, non_blocking=values.is_cuda)
        waits = waits or values.is_cuda
    if waits:
        torch.cuda.synchronize()


def _overlaps(file: PlannedFile, start: int, stop: int) -> Iterator[tuple[Elements, Entry, int, int]]:
    """The tensors that lie in bytes `start` to `stop`: elements, entry, first element there and the one behind the last."""
    for name, (elements, count) in file.runs.items():
        entry = file.entries[name]
        size = entry.dtype.itemsize
        first = max(0, (start - entry.start) // size)
        last = min(count, (stop - entry.start) // size)
        if first < last:
            yield elements, entry, first, last
