"""all_gather and reduce_scatter between the ranks of one machine, as exchanges of blocks through shared memory.

A blocking call copies in the caller's thread. A call that overlaps with computation is given to a thread of the group, so that the
caller never waits for other ranks; blocks under BACKGROUND_BYTES are copied by the caller, which takes less time than waking that
thread. All ranks call with the same sizes and so choose alike, but correctness does not depend on it: exchanges are matched by number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megatrain.transport.background import WaitingThread, Work
from megatrain.transport.consensus import broadcast_text
from megatrain.transport.group import REDUCTIONS, Group, ReduceOp
from megatrain.transport.leftovers import name_of
from megatrain.transport.owner import own
from megatrain.transport.shared_memory import SharedSlots, fits

BACKGROUND_BYTES = 1 << 18
"""Smallest block that is given to the thread."""


class Exchanges:
    """The exchanges of one rank of a group. Made with the group, set up when first needed."""

    def __init__(self, timeout_seconds: float) -> None:
        """timeout_seconds: how long to wait for another rank in one exchange."""
        self._timeout = timeout_seconds
        self._slots: SharedSlots | None = None
        self._tried = False
        self._thread = WaitingThread("megatrain-exchanges")

    def ready(self, group: Group, blocks: int, block: torch.Tensor) -> bool:
        """Whether `blocks` blocks like `block` may be exchanged here; the first call sets up the shared memory (collective)."""
        if not fits(blocks, block.numel() * block.element_size()):
            return False
        if not self._tried:
            self._tried = True
            self._slots = _open(group, self._timeout)
        return self._slots is not None

    def gather(self, blocks: Sequence[torch.Tensor], part: torch.Tensor, blocking: bool) -> Work:
        """Start to fill `blocks` with every place's `part`. Raises OSError where another rank has ended, or never comes."""
        slots = self._opened()

        def write(number: int) -> None:
            slots.slot(slots.place, number, 0, part).copy_(part.detach())

        def read(number: int) -> None:
            for place in slots.others():
                blocks[place].copy_(slots.slot(place, number, 0, part))

        return self._start(write, read, blocking or part.nbytes < BACKGROUND_BYTES)

    def reduce_scatter(self, output: torch.Tensor, parts: dict[int, torch.Tensor], op: ReduceOp, blocking: bool) -> Work:
        """Start to reduce, in order of place, each place's part for this rank into `output`; parts are read in shared memory."""
        slots = self._opened()
        mine = parts[slots.place]

        def write(number: int) -> None:
            for place in slots.others():
                slots.slot(slots.place, number, place - (place > slots.place), mine).copy_(parts[place])

        def read(number: int) -> None:
            index = {place: slots.place - (slots.place > place) for place in slots.others()}
            all_parts = parts | {place: slots.slot(place, number, i, mine) for place, i in index.items()}
            reduce_in_order(output, [all_parts[place] for place in range(slots.size)], op)

        return self._start(write, read, blocking or mine.nbytes < BACKGROUND_BYTES)

    def close(self) -> None:
        """Unmap the memory; other ranks that wait for this one get an error."""
        self._thread.close()
        if self._slots is not None:
            self._slots.close()
            self._slots = None

    def _opened(self) -> SharedSlots:
        if self._slots is None:
            raise OSError("an exchange without shared memory")
        return self._slots

    def _start(self, write: Callable[[int], None], read: Callable[[int], None], here: bool) -> Work:
        slots = self._opened()
        number = slots.take()
        exchange = _Exchange(slots, number, write, read, patient=not here)
        if here:
            exchange.begin()
        work: Work = exchange if here else self._thread.watched(exchange)
        slots.left(number, work.wait)
        return work


class _Exchange:
    """One exchange as a work: `begin` writes this rank's blocks, `wait` reads the others'."""

    def __init__(
        self, slots: SharedSlots, number: int, write: Callable[[int], None], read: Callable[[int], None], patient: bool
    ) -> None:
        """patient: sleep at once when another rank must be waited for, instead of spinning first."""
        self._slots, self._number, self._write, self._read, self._patient = slots, number, write, read, patient
        self._begun = self._ended = False

    def begin(self) -> None:
        """Write this rank's blocks into its slot, once the slot is free. Raises OSError."""
        self._begun = True
        self._slots.claim(self._number, self._patient)
        self._write(self._number)
        self._slots.publish(self._number)

    def wait(self) -> None:
        """Read the other ranks' blocks. Later calls return at once. Raises OSError."""
        if self._ended:
            return
        if not self._begun:
            self.begin()
        self._slots.receive(self._number, self._patient)
        self._read(self._number)
        self._slots.end(self._number)
        self._ended = True

    def is_completed(self) -> bool:
        """Whether the other ranks' blocks have been read."""
        return self._ended


def reduce_in_order(output: torch.Tensor, parts: Sequence[torch.Tensor], op: ReduceOp) -> None:
    """Reduce the parts, in the order given, into `output`, which may be one of them, or of a wider dtype to add in."""
    total = parts[0].to(output.dtype)
    for part in parts[1:-1]:
        total = REDUCTIONS[op](total, part)
    with torch.no_grad():
        if len(parts) > 1:
            REDUCTIONS[op](total, parts[-1], out=output)
        else:
            output.copy_(total)


def _open(group: Group, timeout_seconds: float) -> SharedSlots | None:
    """Map every rank's file (collective); None where some rank cannot: another machine, or no room in /dev/shm."""
    name = broadcast_text(name_of(own(), os.urandom(16).hex()), group, torch.device("cpu"))
    mine: Path | None = None
    slots: SharedSlots | None = None
    with suppress(OSError):
        mine = SharedSlots.create(name, group.rank, group.size)
    try:
        if _all_agree(group, mine is not None):
            files = [SharedSlots.path(name, place) for place in range(group.size)]
            with suppress(OSError):
                slots = SharedSlots(group.rank, group.size, files, timeout_seconds)
            if not _all_agree(group, slots is not None):
                slots = None
    finally:
        if mine is not None:
            mine.unlink()
    return slots


def _all_agree(group: Group, mine: bool) -> bool:
    """Whether `mine` is true on every rank."""
    votes = torch.tensor([int(mine)])
    group.all_reduce(votes, "min")
    return bool(votes.item())
