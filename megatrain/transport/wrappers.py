"""Wrappers around any `Group`: recorded (calls and bytes counted, waits visible) and delayed (tests that work overlaps)."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from megatrain.transport.group import BlockRows, Group, Handle, ReduceOp, World, name_ranks
from megatrain.transport.host import Reading
from megatrain.transport.stalls import Stalls

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """A call that a thread of this process is blocked in."""

    axis: str
    ranks: tuple[int, ...]
    """World ranks of the group."""
    operation: str
    sequence: int
    """Number of the call in its group, from 0. For a `read` (`to_host`): the number of the last call before it started."""
    started: float
    """When the thread began to wait (time.monotonic, seconds)."""
    shape: tuple[int, ...]
    """Shape of the larger of input and output; () for a barrier."""
    dtype: torch.dtype | None
    """None for a barrier."""

    def __str__(self) -> str:
        of = "" if self.dtype is None else f" of {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.operation}{of} (number {self.sequence} on axis {self.axis}, ranks {name_ranks(self.ranks)})"


@dataclass(frozen=True)
class Total:
    """Calls of one kind on one axis."""

    calls: int
    bytes: int
    """Sum over the calls of the bytes of the larger of input and output. Of these a ring sends (size-1)/size from each rank, twice
    that in an all_reduce."""


class Recorder:
    """The calls of one process (of one rank, where ranks are threads): counts, and where they wait. Any thread may read it."""

    def __init__(self) -> None:
        self._waiting: dict[int, Call] = {}
        self._tokens = itertools.count()
        self._totals: dict[tuple[str, str], list[int]] = {}
        self._issued: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        self.stalls: Stalls | None = None
        """Counts the time of all waits, if somebody wants to know."""

    def waiting(self) -> Call | None:
        """The oldest call in which a thread is blocked now; None if there is none."""
        return min(list(self._waiting.values()), key=lambda call: call.started, default=None)

    def totals(self) -> dict[tuple[str, str], Total]:
        """Calls and bytes so far, by (axis, operation)."""
        with self._lock:
            return {key: Total(calls, size) for key, (calls, size) in self._totals.items()}

    def issued(self) -> dict[str, int]:
        """Number of calls begun in each group so far, by `axis/first rank`, which is unique to a group."""
        return {f"{axis}/{first}": calls for (axis, first), calls in list(self._issued.items())}

    def reset(self) -> None:
        """Set the totals to zero."""
        with self._lock:
            self._totals.clear()

    def count(self, group: Group, operation: str, size: int) -> None:
        """Count one call of `size` bytes."""
        with self._lock:
            key = group.name, group.ranks[0]
            self._issued[key] = self._issued.get(key, 0) + 1
            total = self._totals.setdefault((group.name, operation), [0, 0])
            total[0] += 1
            total[1] += size

    def wait(self, call: tuple[Group, str, int, torch.Tensor | None], block: Callable[[], T]) -> T:
        """Return `block()`. While it blocks, `waiting` shows the call (group, operation, number, larger tensor)."""
        group, operation, sequence, tensor = call
        shape, dtype = ((), None) if tensor is None else (tuple(tensor.shape), tensor.dtype)
        token = next(self._tokens)  # dict and itertools.count are thread-safe, so no lock is needed
        self._waiting[token] = Call(group.name, group.ranks, operation, sequence, time.monotonic(), shape, dtype)
        stalls = self.stalls
        began = None if stalls is None else stalls.begin()
        try:
            return block()
        finally:
            if stalls is not None:
                stalls.end(began)
            del self._waiting[token]


class _RecordedHandle(Handle):
    __slots__ = ("_call", "_inner", "_recorder")

    def __init__(self, inner: Handle, recorder: Recorder, call: tuple[Group, str, int, torch.Tensor | None]) -> None:
        self._inner = inner
        self._recorder = recorder
        self._call = call

    def wait(self) -> None:
        self._recorder.wait(self._call, self._inner.wait)

    def done(self) -> bool:
        return self._inner.done()


class _RecordedReading(Reading):
    def __init__(self, inner: Reading, recorder: Recorder, call: tuple[Group, str, int, torch.Tensor | None]) -> None:
        self.copied = inner.copied
        self._inner, self._recorder, self._call = inner, recorder, call

    def wait(self) -> torch.Tensor:
        return self._recorder.wait(self._call, self._inner.wait)


class Wrapper(Group):
    """A group that makes every call of `inner` through `_around`."""

    def __init__(self, inner: Group) -> None:
        self.name, self.ranks, self.rank = inner.name, inner.ranks, inner.rank
        self.inner = inner

    def named(self, name: str) -> Group:
        """The inner group under another name, wrapped alike."""
        other = copy.copy(self)
        other.name, other.inner = name, self.inner.named(name)
        return other

    @abstractmethod
    def _around(self, operation: str, larger: torch.Tensor | None, start: Callable[[], Handle], blocking: bool) -> Handle:
        """Start the inner call, which is never blocking; wait for it if `blocking`."""

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle:
        return self._around("all_reduce", tensor, partial(self.inner._all_reduce, tensor, op, False), blocking)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, blocking: bool) -> Handle:
        return self._around("all_gather", output, partial(self.inner._all_gather, output, tensor, False), blocking)

    def _reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle:
        start = partial(self.inner._reduce_scatter, output, tensor, op, False)
        return self._around("reduce_scatter", tensor, start, blocking)

    def _all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, rows: BlockRows, blocking: bool) -> Handle:
        larger = max(output, tensor, key=torch.Tensor.numel)
        return self._around("all_to_all", larger, partial(self.inner._all_to_all, output, tensor, rows, False), blocking)

    def _broadcast(self, tensor: torch.Tensor, source: int, blocking: bool) -> Handle:
        return self._around("broadcast", tensor, partial(self.inner._broadcast, tensor, source, False), blocking)

    def _send(self, tensor: torch.Tensor, to: int, blocking: bool) -> Handle:
        return self._around("send", tensor, partial(self.inner._send, tensor, to, False), blocking)

    def _recv(self, output: torch.Tensor, source: int, blocking: bool) -> Handle:
        return self._around("recv", output, partial(self.inner._recv, output, source, False), blocking)

    def start_to_host(self, tensor: torch.Tensor) -> Reading:
        """The inner group's copy to the host."""
        return self.inner.start_to_host(tensor)

    def close(self) -> None:
        """Close the inner group."""
        self.inner.close()


class RecordedGroup(Wrapper):
    """A group whose calls and waits are recorded by a `Recorder`."""

    def __init__(self, inner: Group, recorder: Recorder) -> None:
        super().__init__(inner)
        self._recorder = recorder
        self._calls = 0

    def named(self, name: str) -> Group:
        """The inner group under another name, with a count of calls of its own."""
        return RecordedGroup(self.inner.named(name), self._recorder)

    def barrier(self) -> None:
        """Wait in the inner group's barrier, and record the wait."""
        self._recorder.wait(self._counted("barrier", None), self.inner.barrier)

    def start_to_host(self, tensor: torch.Tensor) -> Reading:
        """The inner group's copy to the host, whose wait is recorded."""
        call = self, "read", max(0, self._calls - 1), tensor
        return _RecordedReading(self.inner.start_to_host(tensor), self._recorder, call)

    def _counted(self, operation: str, larger: torch.Tensor | None) -> tuple[Group, str, int, torch.Tensor | None]:
        self._recorder.count(self, operation, 0 if larger is None else larger.nbytes)
        self._calls += 1
        return self, operation, self._calls - 1, larger

    def _around(self, operation: str, larger: torch.Tensor | None, start: Callable[[], Handle], blocking: bool) -> Handle:
        call = self._counted(operation, larger)
        handle = _RecordedHandle(self._recorder.wait(call, start), self._recorder, call)  # may connect first
        if blocking:
            handle.wait()
        return handle


class RecordedWorld(World):
    """A world whose groups are recorded."""

    def __init__(self, world: World, recorder: Recorder) -> None:
        self.rank, self.size = world.rank, world.size
        self.recorder = recorder
        self.inner = world
        self._everyone: Group | None = None

    def group(self, name: str, ranks: Sequence[int]) -> Group:
        """The inner world's group, recorded. The axis `world` is made once: connections between all ranks cost the most."""
        if name != "world":
            return RecordedGroup(self.inner.group(name, ranks), self.recorder)
        if self._everyone is None:
            self._everyone = RecordedGroup(self.inner.group(name, ranks), self.recorder)
        return self._everyone

    def close(self) -> None:
        """Close the inner world."""
        self.inner.close()


class _DelayedHandle(Handle):
    __slots__ = ("_due", "_inner")

    def __init__(self, inner: Handle, due: float) -> None:
        self._inner = inner
        self._due = due

    def wait(self) -> None:
        self._inner.wait()
        time.sleep(max(0.0, self._due - time.monotonic()))

    def done(self) -> bool:
        return self._inner.done() and time.monotonic() >= self._due


class DelayedGroup(Wrapper):
    """A slow network: every call takes at least `seconds` from its start, during which a non-blocking caller can compute."""

    def __init__(self, inner: Group, seconds: float) -> None:
        super().__init__(inner)
        self._seconds = seconds

    def barrier(self) -> None:
        """The inner group's barrier; returns `seconds` after it began, at the earliest."""
        due = time.monotonic() + self._seconds
        self.inner.barrier()
        time.sleep(max(0.0, due - time.monotonic()))

    def _around(self, operation: str, larger: torch.Tensor | None, start: Callable[[], Handle], blocking: bool) -> Handle:
        due = time.monotonic() + self._seconds
        handle = _DelayedHandle(start(), due)
        if blocking:
            handle.wait()
        return handle
