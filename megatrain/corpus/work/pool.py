"""Workers of this machine: processes that are started, watched, replaced when one is killed, and ended with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from megatrain.corpus.work.leases import STUCK
from megatrain.stderr import note

LOOK_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""Time that workers have to end when they are told to."""
MOST_REPLACED = 10
"""Workers that are started in the place of killed ones."""


class PoolError(RuntimeError):
    """A worker that failed; it has said why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_workers(command: Sequence[str], count: int, look: Callable[[], None]) -> None:
    """Run a command so many times at once until all have ended; `look` is called now and then meanwhile.

    One that a signal ends is started again. Raises PoolError when one fails, or too many were killed, and KeyboardInterrupt when
    this process is told to stop; no worker is left behind.
    """
    replaced = 0
    with _told_to_stop(), _processes() as running:
        running += [_start(command) for _ in range(count)]
        while running:
            time.sleep(LOOK_SECONDS)
            look()
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                code = process.returncode
                if code == 0:
                    continue
                if code > 0 and code != STUCK:
                    raise PoolError(f"worker {process.pid} failed (exit code {code}); what it said stands above", code)
                replaced += 1
                how = signal.Signals(-code).name if code < 0 else "itself, being stuck"
                if replaced > MOST_REPLACED:
                    raise PoolError(f"{replaced} workers were ended by a signal, the last by {how}", 1)
                note(f"megatrain: worker {process.pid} was ended by {how}; another takes its place")
                running.append(_start(command))


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


@contextmanager
def _processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list of processes that are ended with the body."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM as Ctrl-C within the body."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
