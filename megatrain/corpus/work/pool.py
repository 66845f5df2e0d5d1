"""Workers of this machine: processes that are started, watched, replaced when one is killed, and ended with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from megatrain.corpus.work.leases import STUCK
from megatrain.stderr import note

LOOK_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""Time that workers have to end when they are told to."""
MOST_REPLACED = 10
"""Workers that are started in the place of killed ones."""
POOL = "MEGATRAIN_POOL"
"""Environment variable: the process that has started a worker."""
TOLD = 128 + signal.SIGTERM
"""Exit code of a worker that SIGTERM has ended."""


class PoolError(RuntimeError):
    """A worker that failed; it has said why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_workers(command: Sequence[str], count: int, look: Callable[[], None]) -> None:
    """Run a command so many times at once until all have ended; `look` is called now and then meanwhile.

    One that a signal ends is started again; when one has ended well all is done, and others, which a debugger or SIGSTOP may hold, are
    ended. Raises PoolError when one fails, or too many were killed, and KeyboardInterrupt when this process is told to stop; no worker
    is left behind.
    """
    replaced, done = 0, float("inf")
    with _told_to_stop(), _processes() as running:
        running += [_start(command) for _ in range(count)]
        while running:
            time.sleep(LOOK_SECONDS)
            look()
            if time.monotonic() > done + GRACE_SECONDS:
                note(f"megatrain: all is done, and {len(running)} workers do not end; they are ended")
                break
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                code = process.returncode
                if code == 0:
                    done = min(done, time.monotonic())
                    continue
                if code > 0 and code not in (STUCK, TOLD):
                    raise PoolError(f"worker {process.pid} failed (exit code {code}); what it said stands above", code)
                replaced += 1
                how = "itself, being stuck" if code == STUCK else signal.Signals(-code if code < 0 else code - 128).name
                if replaced > MOST_REPLACED:
                    raise PoolError(f"{replaced} workers were ended by a signal, the last by {how}", 1)
                note(f"megatrain: worker {process.pid} was ended by {how}; another takes its place")
                running.append(_start(command))


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, env=os.environ | {POOL: str(os.getpid())}
    )


@contextmanager
def _processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list of processes that are ended with the body."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
            process.send_signal(signal.SIGCONT)
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


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within the body SIGTERM ends this process as an error does, so that it leaves nothing behind; Linux sends it too when the pool that
    has started this process dies, however it does. In another thread than the first, as some launchers run things, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(TOLD)

    before = signal.signal(signal.SIGTERM, stop)
    pool = int(os.environ.get(POOL, "0"))
    if pool == os.getppid() and sys.platform.startswith("linux"):  # else another has started it: srun, say
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != pool:  # it died before the call
            sys.exit(TOLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
