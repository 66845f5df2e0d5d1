"""Groups in memory: the ranks are threads of one process, so hundreds of layouts are checked in seconds, without sockets.

The last rank to arrive at a collective carries it out for everyone, in rank order, while it holds the one lock of the world:

    rank 0  post tensors, sleep ------------------> awake, result is there
    rank 1  post tensors, sleep ------------------> awake, result is there
    rank 2  .......... post tensors, reduce 0+1+2 into all three, wake them

Results are therefore the same bits on every rank and on every run. Calls are matched by their number in the group, messages by
their order between two ranks. A call that does not match fails all ranks at once, and so does a rank that dies, or that every rank
waits. A rank is one thread: a second thread of the same rank must not wait while the first does. Ranks that ask for it compute in
turns (`turns.py`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from megatrain.transport.group import (
    REDUCTIONS,
    BlockRows,
    Group,
    Handle,
    ReduceOp,
    TransportError,
    World,
)
from megatrain.transport.turns import RankTurns

_NOTHING = torch.empty(0)


class _Part:
    """The arguments of one rank to a call of its group."""

    __slots__ = ("detail", "group", "operation", "output", "rows", "sequence", "tensor")

    def __init__(
        self,
        group: MemoryGroup,
        operation: str,
        detail: str,
        tensor: torch.Tensor,
        output: torch.Tensor | None = None,
        rows: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        self.group = group
        self.operation = operation
        self.detail = detail
        self.tensor = tensor
        self.output = tensor if output is None else output
        self.rows = rows  # (to each place, from each place): all_to_all only
        self.sequence = -1

    def fits(self, other: _Part) -> bool:
        """Whether two ranks call the same collective with matching tensors."""
        if self.operation != other.operation or self.detail != other.detail:
            return False
        mine, theirs = self.tensor, other.tensor
        dims = 1 if self.operation == "all_to_all" else 0  # rows may differ there, and are compared in pairs
        return mine.dtype == theirs.dtype and mine.shape[dims:] == theirs.shape[dims:]

    def __str__(self) -> str:
        detail = f"({self.detail})" if self.detail else ""
        shown = self.output if self.operation == "reduce_scatter" else self.tensor
        of = "" if self.operation == "barrier" else f" of {list(shown.shape)} {str(shown.dtype).removeprefix('torch.')}"
        rows = f" sending rows {list(self.rows[0])}, receiving {list(self.rows[1])}" if self.rows[0] else ""
        return f"{self.operation}{detail}{of}{rows}"

    def where(self) -> str:
        """The call with its axis, number and ranks."""
        return f"{self} (number {self.sequence} on axis {self.group.name}, ranks {list(self.group.ranks)})"


class _Round:
    """One collective or message: the ranks' parts that have arrived, and whether it is done."""

    __slots__ = ("done", "parts")

    def __init__(self) -> None:
        self.parts: dict[int, _Part] = {}  # by place; of a message, 0 is the sender and 1 the receiver
        self.done = False


class _Meeting:
    """State that the members of one group share: incomplete calls by number, and unmatched messages by (source, to)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounds: dict[int, _Round] = {}
        self.mail: dict[tuple[int, int], deque[_Round]] = {}


class _Job:
    """State that all ranks share: the lock, which rank waits in which call, and the failure that ends all calls."""

    def __init__(self, size: int, timeout_seconds: float) -> None:
        self.size = size
        self.timeout_seconds = timeout_seconds
        self.lock = threading.Lock()
        self.awake = [threading.Condition(self.lock) for _ in range(size)]  # one per rank: only those concerned are woken
        self.meetings: dict[tuple[tuple[int, ...], int], _Meeting] = {}
        self.waiting: dict[int, tuple[_Round, _Part]] = {}
        self.ended: dict[int, BaseException | None] = {}
        self.failure = ""
        self.turns = RankTurns()

    # All methods below are called with the lock held.

    def check(self) -> None:
        """Raise TransportError if the world has failed."""
        if self.failure:
            raise TransportError(self.failure)

    def fail(self, reason: str) -> None:
        """End every call, present and future, with this reason (the first one stays)."""
        if not self.failure:
            self.failure = reason
            for awake in self.awake:
                awake.notify()

    def report(self) -> str:
        """For each rank a line: the call it waits in, or that it has returned or computes."""
        lines = []
        for rank in range(self.size):
            if rank in self.waiting:
                lines.append(f"rank {rank} waits in {self.waiting[rank][1].where()}")
            else:
                lines.append(f"rank {rank} " + ("has returned" if rank in self.ended else "computes"))
        return "\n  ".join(["", *lines])

    def check_progress(self) -> None:
        """Fail the job if every rank that has not returned waits: no rank can wake another."""
        if self.waiting and len(self.waiting) + len(self.ended) == self.size:
            self.fail(f"deadlock: no rank can go on.{self.report()}")

    def finish(self, done: _Round) -> None:
        """Mark a round as done and wake those who wait for it."""
        done.done = True
        for part in done.parts.values():
            rank = part.group.world_rank
            if rank in self.waiting and self.waiting[rank][0] is done:
                del self.waiting[rank]  # not when it wakes up: `waiting` must never hold a rank that can go on
                self.awake[rank].notify()

    def wait(self, rank: int, awaited: _Round, part: _Part) -> None:
        """Sleep until `awaited` is done. Raises TransportError on failure, deadlock or timeout."""
        if awaited.done:  # it was done while this rank waited for the lock
            return
        self.waiting[rank] = (awaited, part)
        try:
            self.check_progress()
            deadline = time.monotonic() + self.timeout_seconds
            while not awaited.done:
                if self.failure:
                    raise TransportError(f"{self.failure}\n  This is rank {rank}, in {part.where()}.")
                if not self.awake[rank].wait(deadline - time.monotonic()) and not awaited.done:
                    self.fail(f"timeout: rank {rank} has waited for {self.timeout_seconds:g} s.{self.report()}")
        finally:
            self.waiting.pop(rank, None)


class _MemoryHandle(Handle):
    """A call of a `MemoryGroup`, under way or done."""

    __slots__ = ("_part", "_round")

    def __init__(self, awaited: _Round, part: _Part) -> None:
        self._round = awaited
        self._part = part

    def wait(self) -> None:
        """Block until the call is done."""
        if not self._round.done:
            job, rank = self._part.group.job, self._part.group.world_rank
            in_turn = job.turns.end(rank)
            with job.lock:
                job.wait(rank, self._round, self._part)
            if in_turn:
                job.turns.begin(rank, lambda: job.failure)

    def done(self) -> bool:
        """Whether every rank's part has arrived and the call is carried out."""
        return self._round.done


class MemoryGroup(Group):
    """The ranks along one axis, as threads. A blocking `send` waits until its message is received, as over a real network."""

    def __init__(self, job: _Job, meeting: _Meeting, ranks: tuple[int, ...], world_rank: int) -> None:
        self.name = meeting.name
        self.ranks = ranks
        self.rank = ranks.index(world_rank)
        self.world_rank = world_rank
        self.job = job
        self._meeting = meeting
        self._calls = itertools.count()
        self._messages = itertools.count()

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle:
        return self._meet(_Part(self, "all_reduce", op, tensor), blocking)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, blocking: bool) -> Handle:
        return self._meet(_Part(self, "all_gather", "", tensor, output), blocking)

    def _reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle:
        return self._meet(_Part(self, "reduce_scatter", op, tensor, output), blocking)

    def _all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, rows: BlockRows, blocking: bool) -> Handle:
        return self._meet(_Part(self, "all_to_all", "", tensor, output, rows), blocking)

    def _broadcast(self, tensor: torch.Tensor, source: int, blocking: bool) -> Handle:
        return self._meet(_Part(self, "broadcast", str(source), tensor), blocking)

    def _send(self, tensor: torch.Tensor, to: int, blocking: bool) -> Handle:
        return self._exchange(_Part(self, "send", f"to {to}", tensor), (self.rank, to), blocking)

    def _recv(self, output: torch.Tensor, source: int, blocking: bool) -> Handle:
        return self._exchange(_Part(self, "recv", f"from {source}", output), (source, self.rank), blocking)

    def barrier(self) -> None:
        """Return once every rank of the group has called."""
        self._meet(_Part(self, "barrier", "", _NOTHING), blocking=True)

    def _meet(self, part: _Part, blocking: bool) -> Handle:
        """Bring `part` to this group's next collective; the last to arrive carries it out."""
        job = self.job
        with job.lock:
            job.check()
            part.sequence = next(self._calls)
            rounds = self._meeting.rounds
            current = rounds.get(part.sequence)
            if current is None:
                current = rounds[part.sequence] = _Round()
            current.parts[self.rank] = part
            self._compare(current, part)
            if len(current.parts) == self.size:
                del rounds[part.sequence]
                self._carry_out(current)
        handle = _MemoryHandle(current, part)
        if blocking:
            handle.wait()
        return handle

    def _compare(self, current: _Round, part: _Part) -> None:
        """Fail all ranks if another rank's part of this call does not match `part`."""
        for place, other in current.parts.items():
            if other is part:
                continue
            fits = part.fits(other)
            if fits and part.operation == "all_to_all":
                fits = part.rows[0][place] == other.rows[1][self.rank] and part.rows[1][place] == other.rows[0][self.rank]
            if not fits:
                self.job.fail(
                    f"ranks {list(self.ranks)} disagree about call {part.sequence} on axis {self.name}: "
                    f"rank {self.ranks[place]} calls {other}, rank {self.world_rank} calls {part}."
                )
                self.job.check()
            if part.operation != "all_to_all":
                return  # all who arrived before agree with each other

    def _exchange(self, part: _Part, way: tuple[int, int], blocking: bool) -> Handle:
        """Match a send with a recv: for each (source, to), the n-th send with the n-th recv."""
        job = self.job
        place = 0 if part.operation == "send" else 1
        with job.lock:
            job.check()
            part.sequence = next(self._messages)
            box = self._meeting.mail.setdefault(way, deque())
            if box and place not in box[0].parts:
                current = box.popleft()
                current.parts[place] = part
                self._deliver(current)
            else:
                current = _Round()
                current.parts[place] = part
                box.append(current)
        handle = _MemoryHandle(current, part)
        if blocking:
            handle.wait()
        return handle

    def _deliver(self, current: _Round) -> None:
        """Copy a message into its receiver's output, or fail all ranks if shapes or dtypes differ."""
        sent, received = current.parts[0], current.parts[1]
        source, target = sent.tensor, received.output
        if source.shape != target.shape or source.dtype != target.dtype:
            self.job.fail(
                f"a message on axis {self.name} does not fit: rank {sent.group.world_rank} calls {sent}, "
                f"rank {received.group.world_rank} calls {received}."
            )
            self.job.check()
        with torch.no_grad():
            target.copy_(source)
        self.job.finish(current)

    def _carry_out(self, current: _Round) -> None:
        """Carry out a collective whose parts have all arrived, for every rank, and wake the ranks."""
        parts = [current.parts[place] for place in range(self.size)]
        try:
            with torch.no_grad():
                _OPERATIONS[parts[0].operation](parts)
        except RuntimeError as error:  # a dtype without such a reduction, outputs that overlap
            self.job.fail(f"{parts[0].where()} failed: {error}")
            self.job.check()
        self.job.finish(current)


def _all_reduce(parts: list[_Part]) -> None:
    reduce = REDUCTIONS[parts[0].detail]
    first, *others = (part.tensor for part in parts)
    for tensor in others:
        reduce(first, tensor, out=first)
    for tensor in others:
        tensor.copy_(first)


def _all_gather(parts: list[_Part]) -> None:
    pieces = [part.tensor.reshape(-1) for part in parts]
    for part in parts:
        for row, piece in zip(part.output.view(len(parts), -1), pieces, strict=True):
            row.copy_(piece)  # its own piece may already lie there: a copy onto itself


def _reduce_scatter(parts: list[_Part]) -> None:
    reduce = REDUCTIONS[parts[0].detail]
    rows = [part.tensor.view(len(parts), -1) for part in parts]
    for place, part in enumerate(parts):
        total = rows[0][place].to(part.output.dtype, copy=True)  # the output may lie inside this rank's tensor
        for row in rows[1:]:
            reduce(total, row[place], out=total)
        part.output.view(-1).copy_(total)


def _all_to_all(parts: list[_Part]) -> None:
    blocks = [part.tensor.split(list(part.rows[0])) for part in parts]
    for place, part in enumerate(parts):
        for block, target in zip(blocks, part.output.split(list(part.rows[1])), strict=True):
            target.copy_(block[place])


def _broadcast(parts: list[_Part]) -> None:
    source = parts[int(parts[0].detail)]
    for part in parts:
        if part is not source:
            part.tensor.copy_(source.tensor)


def _barrier(parts: list[_Part]) -> None:
    """Nothing to compute: every rank has arrived."""


_OPERATIONS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "barrier": _barrier,
}


class MemoryWorld(World):
    """All ranks of a job that runs in one process, seen from one of them. `create` makes one for each rank."""

    def __init__(self, job: _Job, rank: int) -> None:
        self.rank = rank
        self.size = job.size
        self._job = job
        self._made: dict[tuple[int, ...], int] = {}

    @classmethod
    def create(cls, size: int, timeout_seconds: float = 60.0) -> list[MemoryWorld]:
        """One world per rank; no call waits longer than `timeout_seconds`."""
        job = _Job(size, timeout_seconds)
        return [cls(job, rank) for rank in range(size)]

    def group(self, name: str, ranks: Sequence[int]) -> MemoryGroup:
        """Make the group of `ranks`. Raises TransportError if its ranks disagree about the name."""
        members = tuple(ranks)
        if self.rank not in members or len(set(members)) != len(members) or not all(0 <= r < self.size for r in members):
            raise TransportError(f"group {name}: rank {self.rank} cannot be in ranks {list(members)} of a world of {self.size}")
        count = self._made[members] = self._made.get(members, -1) + 1
        with self._job.lock:
            meeting = self._job.meetings.setdefault((members, count), _Meeting(name))
            if meeting.name != name:
                self._job.fail(f"ranks {list(members)} make a group: one calls it {meeting.name}, rank {self.rank} {name}")
            self._job.check()
        return MemoryGroup(self._job, meeting, members, self.rank)

    def begin_turn(self) -> None:
        """Compute in turns with the other ranks that called this, until `leave`."""
        self._job.turns.begin(self.rank, lambda: self._job.failure)

    def leave(self, error: BaseException | None = None) -> None:
        """Say that this rank has returned or, with `error`, died: ranks that wait for it get a TransportError at once."""
        self._job.turns.end(self.rank)
        with self._job.lock:
            self._job.ended[self.rank] = error
            if error is not None:
                self._job.fail(f"rank {self.rank} died: {type(error).__name__}: {error}")
            self._job.check_progress()

    def fail(self, reason: str) -> None:
        """End every rank's calls, present and future, with a TransportError."""
        with self._job.lock:
            self._job.fail(reason + self._job.report())
