"""The request to stop: a signal after which the queued steps end, a checkpoint is saved, and the run ends so that it can go on later.

Any of SIGNALS is such a request: schedulers send SIGTERM, or what they are told to (SLURM: --signal=USR2@120), a person presses Ctrl-C.
A thread receives them, since the main thread may be in a long call (waiting for other ranks, copying a checkpoint):

    starting   nothing is trained yet, so nothing needs saving: the process ends at once, with 75
    training   the request is remembered; a step tells all ranks, and after the next one the run saves and ends with 75
    ending     it changes nothing

A second Ctrl-C ends the process at once. A launcher sends SIGTERM to the others when one worker has failed: at the start SIGTERM is
therefore no request, and the process ends with 143; the launch scripts know whether they were told to stop. To torchrun, a worker that
ends with 75 has failed and should be started again: so a file, the marker, says that this job is stopping (`write_marker`), and a worker
that is started again ends at once (`is_stopping`); another marker likewise where training has gone wrong (76). Imports only the
standard library, so as to listen before torch, which takes seconds to import.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from megatrain.runtime.launch import REPLY, Launch
from megatrain.stderr import say
from megatrain.untrusted import parse_json, read_plain

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
INSIST_SECONDS = 3.0
"""Ctrl-C reaches a process from the terminal and from its launcher: only one that comes this much later counts as a second."""
PREEMPTED = "preempted"
"""Name of the marker file in log.dir: the run stopped early and wants to be started again."""
DIVERGED = "diverged"
"""Name of the marker file in log.dir: training went wrong, and a person should look before the run is started again."""
INTERRUPTED = 130
LISTENING = "listening"
"""The reply to the launch scripts from a process that receives signals and has no exit code yet."""
_LARGEST_MARKER = 4096
"""Bytes; the file has some hundred."""


class StopRequest:
    """Whether this process was told to stop. A context manager that receives signals while it is entered; it may be nested.

    marker: file to write when a signal comes at the start; None where no launcher reads it.
    """

    def __init__(self, marker: Path | None = None, launch: Launch | None = None) -> None:
        self.signal: signal.Signals | None = None
        """The first signal received."""
        self._marker, self._launch = marker, launch
        self._starting = marker is not None
        self.came: float | None = None
        """When it came (time.monotonic)."""
        self._depth = 0
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] = (-1, -1)
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def started(self) -> None:
        """Call when training starts: from here on a request waits for the queued steps to end."""
        with self._lock:
            self._starting = False

    def ignore(self) -> None:
        """Call when the run ends: from here on signals are ignored, to the end of the process."""
        signal.set_wakeup_fd(self._before.pop(0, -1))
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth > 1 or threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="megatrain-stop", daemon=True).start()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a script's background job: ignored by intent
                self._before[number] = signal.signal(number, _leave_to_the_thread)
        self._before[0] = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth or not self._before:
            return
        signal.set_wakeup_fd(self._before.pop(0))
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        os.close(self._pipe[1])  # ends the thread

    def _listen(self, pipe: int) -> None:
        """Thread: read the numbers of signals from the pipe that C's handler writes them to, whatever the main thread does."""
        while numbers := os.read(pipe, 64):
            for number in numbers:
                self._hear(number)
        os.close(pipe)

    def _hear(self, number: int) -> None:
        if number not in SIGNALS:
            return
        now = time.monotonic()
        if self.signal is not None:
            if number == signal.SIGINT and self.came is not None and now - self.came > INSIST_SECONDS:
                say("megatrain: interrupted; the last checkpoint holds")
                os._exit(INTERRUPTED)
            return
        with self._lock:
            self.signal, self.came = signal.Signals(number), now
            if self._starting:
                self._end_at_start()
        if sys.stderr is not None and sys.stderr.isatty():  # not in a log, where every rank would write it
            say(
                f"megatrain: {self.signal.name}: ending after at most three more steps, with a checkpoint saved; Ctrl-C again ends at once"
            )

    def _end_at_start(self) -> NoReturn:
        if self._marker is not None and self._launch is not None and self.signal is not None:
            if self.signal == signal.SIGTERM and self._launch.launcher != "none":
                os._exit(128 + self.signal)
            write_marker(self._marker, self._launch, self.signal.name, None)
            say(f"megatrain: {self.signal.name} came before the first step: nothing is to be saved; the same command goes on")
            reply(self._launch, os.EX_TEMPFAIL)
        os._exit(os.EX_TEMPFAIL)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """An empty handler in Python, without which C's handler would not write to the pipe."""


def hold_signals() -> None:
    """Block the signals until a StopRequest receives them, also across `exec`: none is lost, and none kills the process before."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def write_marker(marker: Path, launch: Launch, why: str, step: int | None) -> None:
    """Write the marker: this job stops early. why: the signal's name, or the limit; step: the last one trained, None if none was.

    One rank of each node writes it, since log.dir may not be shared. Where it cannot be written (a full disk), which must not change how
    the process ends, stderr says so.
    """
    part = marker.with_name(f".{marker.name}.{launch.rank}.{os.getpid()}")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"why": why, "step": step, "time": time.time(), "job": launch.job}) + "\n")
        part.replace(marker)
    except OSError as error:
        say(f"warning: {marker} could not be written ({error.strerror or error}); the exit code holds without it")
        with suppress(OSError):
            part.unlink(missing_ok=True)


def reply(launch: Launch, code: int) -> int:
    """Write the intended exit code for the launch scripts; returns it."""
    _write_reply(launch, str(code))
    return code


def reply_listening(launch: Launch) -> None:
    """Tell the launch scripts that this process receives signals: from here on it can reply how it ended."""
    _write_reply(launch, LISTENING)


def leave_error(text: str, env: Mapping[str, str]) -> bool:
    """Leave an error for the launch scripts, which print once what several ranks report; False if no script started this process."""
    if REPLY not in env:
        return False
    try:
        with errors_file(env[REPLY]).open("a") as file:
            file.write(f"{text}\n")
    except OSError:  # the launcher has gone, and its folder with it
        return False
    return True


def errors_file(reply: str | Path) -> Path:
    """The file of a worker's errors, beside that of its exit code."""
    return Path(reply).with_suffix(".error")


def _write_reply(launch: Launch, text: str) -> None:
    if launch.reply is not None:
        with suppress(OSError):  # the launcher has gone, and its folder with it
            Path(launch.reply).write_text(text)


def is_stopping(marker: Path, launch: Launch) -> bool:
    """Whether torchrun has started this process again in a job that is stopping."""
    if launch.launcher != "torchrun" or launch.restart_count == 0:
        return False  # SLURM counts restarts too, but restarts on purpose
    try:
        return bool(parse_json(read_plain(marker, _LARGEST_MARKER))["job"] == launch.job)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def end_with_launcher(launch: Launch) -> None:
    """Linux: have SIGTERM sent to this process when the torchrun that started it dies, so that a killed launcher leaves no orphans."""
    if not sys.platform.startswith("linux") or launch.launcher != "torchrun":
        return
    parent = launch.launcher_process or os.getppid()
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)
