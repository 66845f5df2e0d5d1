"""What docs/benchmarks/scale.py measures with: a world that only pretends to be large, and stores that count."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatrain.parallel.mesh import MeshShape
from megatrain.transport.group import Group, World

SHAPE = MeshShape(tp=8, pp=16, dp=128)
RANKS = SHAPE.world
LIMIT = timedelta(seconds=60)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, result."""
    start = time.perf_counter()
    made = call()
    return round(time.perf_counter() - start, 4), made


class Idle(Group):
    """A group that can do nothing but be connected."""

    all_reduce = all_gather = reduce_scatter = all_to_all = broadcast = barrier = None  # type: ignore[assignment]

    def send(self, tensor: torch.Tensor, other: int) -> None:  # type: ignore[override]
        """Nothing."""

    recv = send  # type: ignore[assignment]


Idle.__abstractmethods__ = frozenset()


class Pretended(World):
    """One rank's view of a world that is not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.made: list[tuple[int, ...]] = []

    def group(self, name: str, ranks: Sequence[int]) -> Group:
        """Note the ranks."""
        self.made.append(tuple(ranks))
        return object.__new__(Idle)


class Counted(dist.Store):
    """A store that counts what one rank asks of it: messages, and bytes of keys and texts both ways."""

    def __init__(self, inner: Any, latency_seconds: float = 0.0) -> None:
        """latency_seconds: of each message and its answer."""
        super().__init__()
        self.inner, self.latency = inner, latency_seconds
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def ask(self, what: str, *args: Any) -> Any:
        """Do as the inner store, and count."""
        answer = getattr(self.inner, what)(*args)
        time.sleep(self.latency)
        self.calls[what] += 1
        self.bytes += size_of(args) + size_of(answer)
        return answer

    def taken(self) -> dict[str, Any]:
        """What was counted since the last time."""
        calls, size, self.calls, self.bytes = self.calls, self.bytes, Counter(), 0
        return {"messages": sum(calls.values()), "bytes": size, "of them": dict(calls)}


def _counting(what: str) -> Callable[..., Any]:
    return lambda self, *args: self.ask(what, *args)


for _what in ("set", "get", "add", "check", "wait", "compare_set", "multi_get", "multi_set"):
    setattr(Counted, _what, _counting(_what))


def size_of(value: Any) -> int:
    """Bytes of the texts in a value."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0


class Served:
    """A real store in a process of its own, whose processor time can be read."""

    CODE = (
        "import sys; from torch.distributed import TCPStore; s = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False);"
        "print(s.port, flush=True); sys.stdin.readline()"
    )

    def __enter__(self) -> Served:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.process.stdout.readline())  # type: ignore[union-attr]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate("\n")

    def seconds(self) -> float:
        """Processor time so far."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def client(self) -> dist.TCPStore:
        """A new connection."""
        return dist.TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False, timeout=LIMIT)
