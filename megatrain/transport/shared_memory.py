"""Blocks between ranks of one machine through shared memory, in place of gloo's messages.

Problem: gloo moves tensors between two processes of one machine over a loopback socket, at 1 to 2 GB/s and with both cores
busy; a thread of its own must wake to receive, and then wake the one that waits. One copy into memory that the other process
sees costs a quarter of that. Each rank of a group owns one file in /dev/shm:

    rank 0's file    [ semaphores | slot 0 | slot 1 | slot 2 | slot 3 ]     exchange number n uses slot n mod 4
    rank 1's file    [ semaphores | slot 0 | slot 1 | slot 2 | slot 3 ]

An exchange: copy my blocks into my slot and `publish`; `receive` until every other rank has published, read its slot in place (a
reduction adds straight from there) and `end`. Before a slot is used again, the exchange that used it is completed here, and the
others have ended it. So there are two semaphores for each slot and reader: "it is there", posted by the owner, and "I have read
it", posted by the reader (POSIX semaphores, which order memory on every processor).

Who waits looks again and again for a moment, since sleep and wake cost more than most waits, then sleeps. Every owner holds a
lock on its file, which the system releases when the process ends: so a waiting rank notices within a tenth of a second. The
files are unlinked as soon as all have mapped them, so that a crash later leaves nothing behind, and their names tell whose they
are (leftovers.py), for one before; their size is allocated beforehand, so that a full /dev/shm is noticed here and not by a signal.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatrain.transport import leftovers

SLOTS = 4
SLOT_BYTES = 8 << 20
SMALLEST_BLOCK = 1 << 15
"""Bytes. Smaller blocks are sent faster by gloo."""
SPIN_SECONDS = 3e-4
"""How long to spin before sleeping: about the cost of one sleep and wake on a virtual machine."""
NAP_SECONDS = 0.1
"""How long to sleep before checking that the other process is still alive."""
_PUBLISHED, _READ = 0, 1
_SEMAPHORE_BYTES = 64
"""Space for one sem_t (32 bytes in glibc) in a cache line of its own."""


def fits(blocks: int, block_bytes: int) -> bool:
    """Whether an exchange of `blocks` different blocks of `block_bytes` each may go through a slot."""
    return block_bytes >= SMALLEST_BLOCK and blocks * block_bytes <= SLOT_BYTES


class SharedSlots:
    """The files of a group's ranks, mapped by one of them."""

    def __init__(self, place: int, size: int, files: list[Path], timeout_seconds: float) -> None:
        """Map every rank's file, and hold the lock on this rank's own. Raises OSError."""
        self.place, self.size, self._timeout = place, size, timeout_seconds
        self._libc = _semaphores()
        self._files = [os.open(file, os.O_RDWR | os.O_CLOEXEC) for file in files]
        fcntl.flock(self._files[place], fcntl.LOCK_EX)
        maps = [mmap.mmap(file, _header_bytes(size) + SLOTS * SLOT_BYTES) for file in self._files]
        self._memory = [torch.frombuffer(memory, dtype=torch.uint8) for memory in maps]
        self._exchanges = 0
        self._unfinished: dict[int, Callable[[], object]] = {}

    @staticmethod
    def path(name: str, place: int) -> Path:
        """The file of the rank at `place` in the group called `name`."""
        return leftovers.FOLDER / f"{name}-{place}"

    @staticmethod
    def create(name: str, place: int, size: int) -> Path:
        """Make this rank's file at its full size, its semaphores at zero. Raises OSError where there is no space."""
        path = SharedSlots.path(name, place)
        length = _header_bytes(size) + SLOTS * SLOT_BYTES
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, length)
            header = torch.frombuffer(mmap.mmap(descriptor, length), dtype=torch.uint8)
            libc = _semaphores()
            for start in range(0, _header_bytes(size), _SEMAPHORE_BYTES):
                if libc.sem_init(header.data_ptr() + start, 1, 0) != 0:
                    raise OSError(ctypes.get_errno(), "no semaphore in shared memory")
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return path

    def take(self) -> int:
        """The number of a new exchange. An unfinished exchange that used the same slot is finished first."""
        number = self._exchanges
        self._exchanges += 1
        earlier = self._unfinished.pop(number - SLOTS, None)
        if earlier is not None:
            earlier()
        return number

    def left(self, number: int, finish: Callable[[], object]) -> None:
        """Register `finish`, which finishes exchange `number` when its slot is needed again, unless it has ended by then."""
        self._unfinished[number] = finish

    def claim(self, number: int, patient: bool = False) -> None:
        """Wait until the slot of exchange `number` is free to be written. patient: sleep at once instead of spinning first.

        Raises TimeoutError if another rank never reads the slot's earlier blocks, ConnectionError if that rank has ended.
        """
        if number >= SLOTS:
            for place in self.others():
                self._await(self.place, _READ, place, number, f"has not read exchange {number - SLOTS}", patient)

    def slot(self, place: int, number: int, index: int, like: torch.Tensor) -> torch.Tensor:
        """View of block `index`, of the shape and dtype of `like`, in the slot of exchange `number` in the file of `place`."""
        size = like.numel() * like.element_size()
        start = _header_bytes(self.size) + (number % SLOTS) * SLOT_BYTES + index * size
        return self._memory[place][start : start + size].view(like.dtype).view(like.shape)

    def publish(self, number: int) -> None:
        """Tell the other ranks that this rank's blocks of exchange `number` are in its slot."""
        for place in self.others():
            self._libc.sem_post(self._semaphore(self.place, _PUBLISHED, place, number))

    def receive(self, number: int, patient: bool = False) -> None:
        """Wait until every other rank's blocks of exchange `number` are in its slot. Call once. patient and errors: as in `claim`."""
        for place in self.others():
            self._await(place, _PUBLISHED, self.place, number, f"has not come to exchange {number}", patient)

    def end(self, number: int) -> None:
        """Tell the other ranks that this rank has read their blocks of exchange `number`."""
        self._unfinished.pop(number, None)
        for place in self.others():
            self._libc.sem_post(self._semaphore(place, _READ, self.place, number))

    def close(self) -> None:
        """Close the files; other ranks that wait for this one get an error."""
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_UN)  # the mapping holds a copy of the descriptor, and with it the lock
            os.close(file)
        self._files.clear()

    def others(self) -> list[int]:
        """The places of the other ranks."""
        return [place for place in range(self.size) if place != self.place]

    def _semaphore(self, owner: int, kind: int, reader: int, number: int) -> int:
        """Address of the semaphore in the file of `owner` for `reader` and the slot of exchange `number`."""
        index = (kind * SLOTS + number % SLOTS) * self.size + reader
        return self._memory[owner].data_ptr() + index * _SEMAPHORE_BYTES

    def _await(self, owner: int, kind: int, reader: int, number: int, problem: str, patient: bool) -> None:
        """Decrement a semaphore, waiting while it is zero. Raises TimeoutError, or ConnectionError if the other rank has ended."""
        semaphore, other = self._semaphore(owner, kind, reader, number), reader if owner == self.place else owner
        start = time.monotonic()
        while not patient and time.monotonic() < start + SPIN_SECONDS:
            if self._libc.sem_trywait(semaphore) == 0:
                return
        while not self._nap(semaphore):
            if self._has_ended(other) and not self._nap(semaphore):  # it may have posted just before
                raise ConnectionError(f"place {other} of the group has ended, and {problem}")
            if time.monotonic() > start + self._timeout:
                raise TimeoutError(f"place {other} of the group {problem}")

    def _nap(self, semaphore: int) -> bool:
        """Wait up to NAP_SECONDS to decrement the semaphore; whether that succeeded."""
        monotonic = hasattr(self._libc, "sem_clockwait")  # glibc before 2.30 waits by the clock that may be set back
        seconds, fraction = divmod((time.monotonic() if monotonic else time.time()) + NAP_SECONDS, 1)
        until = (ctypes.c_long * 2)(int(seconds), int(fraction * 1e9))
        if monotonic:
            return bool(self._libc.sem_clockwait(semaphore, time.CLOCK_MONOTONIC, until) == 0)
        return bool(self._libc.sem_timedwait(semaphore, until) == 0)

    def _has_ended(self, place: int) -> bool:
        """Whether the rank at `place` has released the lock of its file, as it does when its process ends."""
        try:
            fcntl.flock(self._files[place], fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _header_bytes(size: int) -> int:
    """Bytes of the semaphores in one file of a group of `size`, rounded up to whole pages."""
    return -(-2 * SLOTS * size * _SEMAPHORE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


def _semaphores() -> ctypes.CDLL:
    """The C library's semaphores, called without the interpreter's lock. Raises OSError where it has none with a time limit."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "sem_timedwait"):
        raise OSError("the C library has no sem_timedwait")
    for name in ("sem_post", "sem_trywait"):
        getattr(libc, name).argtypes = [ctypes.c_void_p]
    libc.sem_timedwait.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    if hasattr(libc, "sem_clockwait"):
        libc.sem_clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    return libc
