"""`spawn`: run a function on every rank of a mesh, as real processes that talk over gloo.

Processes are started once, as many as the largest world so far had ranks, and wait for the next call, since importing torch takes
longer than most tests; they end with this process. A pool in which a rank crashed or did not answer is killed and replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatrain.parallel.mesh import MeshShape
from megatrain.testing.failure import Failure, raise_first
from megatrain.testing.simulate import mesh_of

_GRACE_SECONDS = 5.0  # after the first failure, for the other ranks to notice

_START_SECONDS = 120.0  # for all processes of a pool to import torch
_CRASHED = 0.0  # when a process crashed: before every exception, since none of them can be its cause


@dataclass(frozen=True)
class Task:
    """A worker's task: where to find the function, and how to meet the other ranks."""

    module: str
    file: str
    qualname: str
    path: tuple[str, ...]
    """sys.path of the caller."""
    shape: MeshShape
    timeout_seconds: float
    rendezvous: Path


@dataclass(frozen=True)
class RankAnswer:
    """A worker's answer to a task."""

    result: bytes
    """The pickled result; for a failure its pickled exception, empty if that cannot be pickled."""
    failed_at: float | None = None
    """time.monotonic() of the failure, the same clock for all processes of a machine; None if there is none."""
    summary: str = ""
    trace: str = ""

    def failure(self, rank: int) -> Failure:
        """The failure that this answer describes."""
        return Failure(rank, pickle.loads(self.result) if self.result else None, self.summary, self.trace)


def spawn(shape: int | MeshShape, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 60.0) -> list[Any]:
    """Call `fn(ctx, *args)` on every rank of `shape` at once and return the results in rank order.

    shape: a MeshShape, or a world size, which means that many data-parallel ranks. `ctx` is each rank's ParallelContext.
    fn: a function at the top level of a module or test file; `args` and the results are pickled.
    timeout_seconds: limit of the whole call, and of each collective.

    Each rank is one process with one intra-op thread. Raises the exception of the first rank to fail, caused by a
    `RankTraceback` with its traceback and a line for each other rank; TimeoutError, with the ranks' stacks, past the limit.
    """
    mesh = mesh_of(shape)
    if _pools and not _pools[0].usable():
        close_pools()
    if not _pools:
        _pools.append(_Pool())
    answers = _pools[0].run(fn, mesh, args, timeout_seconds)
    failed = [(answer.failed_at, rank) for rank, answer in enumerate(answers) if answer.failed_at is not None]
    raise_first([answers[rank].failure(rank) for _, rank in sorted(failed)], mesh.world)
    return [pickle.loads(answer.result) for answer in answers]


def start_worker(pipe: int, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the process behind one rank, which inherits the descriptor `pipe`; words: what follows that on its command line."""
    command = [sys.executable, "-m", "megatrain.testing.worker", str(pipe), *words]
    return subprocess.Popen(command, pass_fds=[pipe], env=dict(environment), stdin=subprocess.DEVNULL)


class _Pool:
    """The worker processes; a world takes the first of them."""

    def __init__(self) -> None:
        self._tasks = 0
        self._closed = False
        self._folder = Path(tempfile.mkdtemp(prefix="megatrain_spawn_"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []

    def _grow(self, size: int) -> None:
        """Start processes until there are `size`. Raises TimeoutError where one does not start."""
        known = len(self._pipes)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        for rank in range(known, size):
            mine, theirs = Pipe()
            number = theirs.fileno()
            self._processes.append(start_worker(number, [str(rank), str(self._stacks(rank))], environment))
            theirs.close()
            self._pipes.append(mine)
        deadline = time.monotonic() + _START_SECONDS
        for rank, pipe in enumerate(self._pipes[known:], known):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"the process of rank {rank} of {size} did not start within {_START_SECONDS:g} s")
            with contextlib.suppress(EOFError):  # it has crashed, which the first task will report
                pipe.recv()

    def usable(self) -> bool:
        """Whether all processes live."""
        return not self._closed and all(process.poll() is None for process in self._processes)

    def run(self, fn: Callable[..., Any], shape: MeshShape, args: tuple[Any, ...], timeout_seconds: float) -> list[RankAnswer]:
        """Give all ranks the task and collect their answers."""
        self._tasks += 1
        rendezvous = self._folder / f"task_{self._tasks}"
        message = (_describe(fn, shape, timeout_seconds, rendezvous), pickle.dumps(args))
        self._grow(shape.world)
        answers: dict[int, RankAnswer] = {}
        deadline = time.monotonic() + timeout_seconds
        for rank, pipe in enumerate(self._pipes[: shape.world]):
            try:
                pipe.send(message)
            except OSError:
                answers[rank] = self._crashed(rank)
        while len(answers) < shape.world:
            failed = any(answer.failed_at is not None for answer in answers.values())
            limit = min(deadline, time.monotonic() + _GRACE_SECONDS) if failed else deadline
            if not self._collect(answers, shape.world, limit):
                self._give_up(answers, shape.world, timeout_seconds, failed)
        if any(process.poll() is not None for process in self._processes):
            self.close()
        else:
            rendezvous.unlink(missing_ok=True)
        return [answers[rank] for rank in range(shape.world)]

    def _collect(self, answers: dict[int, RankAnswer], size: int, limit: float) -> bool:
        """Read the next answers; False if none arrives until `limit`."""
        awaited = {id(pipe): rank for rank, pipe in enumerate(self._pipes[:size]) if rank not in answers}
        ready = wait([self._pipes[rank] for rank in awaited.values()], max(0.0, limit - time.monotonic()))
        for rank in [awaited[id(pipe)] for pipe in ready]:
            try:
                answers[rank] = self._pipes[rank].recv()
            except (EOFError, OSError):
                answers[rank] = self._crashed(rank)
        return bool(ready)

    def _crashed(self, rank: int) -> RankAnswer:
        """The answer for a process that ended without one."""
        code = self._processes[rank].wait()
        what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        summary = f"the process of rank {rank} was {what}" if code < 0 else f"the process of rank {rank} {what}"
        return RankAnswer(b"", _CRASHED, summary, summary + "\n")

    def _give_up(self, answers: dict[int, RankAnswer], size: int, timeout_seconds: float, failed: bool) -> None:
        """Kill the pool. Raises TimeoutError with stacks, unless another rank's failure explains the missing answers."""
        late = [rank for rank in range(size) if rank not in answers]
        stacks = [f"rank {rank} was in:\n{self._stack(rank)}" for rank in late]
        self.close()
        if not failed:
            headline = f"{len(late)} of {size} spawned ranks still ran after {timeout_seconds:g} s"
            raise TimeoutError("\n".join([headline, *stacks]))
        for rank in late:
            answers[rank] = RankAnswer(b"", time.monotonic(), "did not notice the failure and was killed", "")

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"stack_{rank}"

    def _stack(self, rank: int) -> str:
        """The stack of a process at this moment, if the process can still write it."""
        self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        return self._stacks(rank).read_text() if self._stacks(rank).exists() else "(no stack)"

    def close(self) -> None:
        """Kill the processes and remove their files; the pool is usable no more."""
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._closed = True
        for process in self._processes:
            process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _describe(fn: Callable[..., Any], shape: MeshShape, timeout_seconds: float, rendezvous: Path) -> Task:
    """The task for `fn`: found by its file, since test files cannot be imported by name. Raises TypeError if it cannot be found."""
    name = getattr(fn, "__qualname__", "<unnamed>")
    module = sys.modules.get(getattr(fn, "__module__", ""))
    if "<" in name or module is None or getattr(module, "__file__", None) is None:
        raise TypeError(
            f"spawn cannot send {fn!r} to other processes: give it a function at the top level of a module or test file"
        )
    return Task(module.__name__, str(module.__file__), name, tuple(sys.path), shape, timeout_seconds, rendezvous)


_pools: list[_Pool] = []
"""The pool, if there is one. The one state that outlives a call: starting processes anew would take most of a test's time."""


@atexit.register
def close_pools() -> None:
    """End all waiting processes; also called at exit."""
    for pool in _pools:
        pool.close()
    _pools.clear()
