"""Blocks between ranks of one machine through shared memory; gloo then carries a single byte that says "it is there".

Problem: gloo moves tensors between two processes of one machine over a loopback socket, at 1 to 2 GB/s and with both cores
busy. One copy into memory that the other process sees costs a quarter of that. Each rank of a group owns one file in /dev/shm:

    rank 0's file    [ read marks | slot 0 | slot 1 | slot 2 | slot 3 ]     exchange number n uses slot n mod 4
    rank 1's file    [ read marks | slot 0 | slot 1 | slot 2 | slot 3 ]

An exchange: copy my blocks into my slot; send a byte to each other rank; when its byte has come, read its slot in place (a
reduction adds straight from there) and set my read mark of that slot. Before a slot is used again, the exchange that used it is
completed here, and the others' read marks say that they have done with it. The files are unlinked as soon as all have mapped them, so
a crash leaves nothing behind; their size is allocated beforehand, so that a full /dev/shm is noticed here and not by a signal.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

SLOTS = 4
SLOT_BYTES = 8 << 20
SMALLEST_BLOCK = 1 << 15
"""Bytes; smaller blocks travel faster in gloo's own message."""
_HEADER = 4096
_FOLDER = Path("/dev/shm")


def fits(blocks: int, block_bytes: int) -> bool:
    """Whether an exchange of `blocks` different blocks of so many bytes may go through a slot."""
    return block_bytes >= SMALLEST_BLOCK and blocks * block_bytes <= SLOT_BYTES


class SharedSlots:
    """The mapped files of a group's ranks, seen from one of them."""

    def __init__(self, place: int, size: int, files: list[Path], timeout_seconds: float) -> None:
        """Map every rank's file. Raises OSError."""
        self.place, self.size, self._timeout = place, size, timeout_seconds
        self._memory = [torch.frombuffer(_map(file), dtype=torch.uint8) for file in files]
        self._marks = [memory[: SLOTS * 8].view(torch.int64) for memory in self._memory]
        self._exchanges = 0
        self._unfinished: dict[int, Callable[[], None]] = {}

    @staticmethod
    def path(name: str, place: int) -> Path:
        """The file of a place of the group called `name`."""
        return _FOLDER / f"{name}-{place}"

    @staticmethod
    def create(name: str, place: int) -> Path:
        """Make this rank's file, filled with room. Raises OSError where there is none."""
        path = SharedSlots.path(name, place)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _HEADER + SLOTS * SLOT_BYTES)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return path

    def begin(self, finish: Callable[[], None]) -> int:
        """Number of a new exchange, whose slot is free to be written; `finish` completes it, if that is left till then.

        Raises TimeoutError if another rank never reads what lay in the slot.
        """
        number = self._exchanges
        self._exchanges += 1
        earlier = self._unfinished.get(number - SLOTS)
        if earlier is not None:
            earlier()
        self._await_readers(number)
        self._unfinished[number] = finish
        return number

    def slot(self, place: int, number: int, index: int, like: torch.Tensor) -> torch.Tensor:
        """View of block `index`, of the shape and dtype of `like`, in the slot of exchange `number` in the file of `place`."""
        size = like.numel() * like.element_size()
        start = _HEADER + (number % SLOTS) * SLOT_BYTES + index * size
        return self._memory[place][start : start + size].view(like.dtype).view(like.shape)

    def end(self, number: int) -> None:
        """Say that this rank has read all it wants of exchange `number`."""
        self._unfinished.pop(number, None)
        self._marks[self.place][number % SLOTS] = number + 1

    def _await_readers(self, number: int) -> None:
        """Until every other rank has read the exchange that used this slot before."""
        wanted, slot = number - SLOTS + 1, number % SLOTS
        deadline = time.monotonic() + self._timeout
        for place in range(self.size):
            while place != self.place and wanted > 0 and int(self._marks[place][slot]) < wanted:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"place {place} of the group has not read exchange {number - SLOTS}")
                time.sleep(2e-5)


def _map(file: Path) -> mmap.mmap:
    descriptor = os.open(file, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, _HEADER + SLOTS * SLOT_BYTES)
    finally:
        os.close(descriptor)
