"""The monitor of a rank: a small process that ends the rank when it can no longer do so itself, and says why.

A thread of the guard measures the sections of a run, but it needs Python to run: not in a process that is frozen by a signal, nor where a
call in C never ends and never lets other threads in. So the thread writes a line to the monitor once a second,

    12.5 <tab> step <tab> 812 <tab> /runs/a/events.jsonl <newline>

in at most 12.5 seconds the next line comes, or else the limit of this section is over. Where none comes in that time, MARGIN_SECONDS
included, the monitor says so on stderr and, with the steps so far, in that file; it has the rank write the stacks of its threads where it
can, and kills it. The monitor is a child of the rank and ends with it, however that ends; where the whole job is suspended (Ctrl-Z, a
scheduler's SIGSTOP to all processes), so is the monitor, and its time with it. It tells the rank so in lines

    83124.5 <tab> 60.0 <newline>                  when it woke (time.monotonic), and the seconds before

since a rank cannot tell this from Python that others have kept from its thread. It runs this file with nothing but the standard
library: 10 ms of a core to start, 8 MB.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import time
from contextlib import suppress

MARGIN_SECONDS = 6.0
"""A rank has this much longer than its limit: the guards' verdict, which knows more, comes first."""
LOOK_SECONDS = 0.5
SUSPENDED_SECONDS = 5.0
"""If a look comes this much too late, or by the margin if that is less, this process itself was suspended."""
SAY_SECONDS = 2.0
"""How long it waits for its words to be taken, before it ends the rank; they are on offer for OFFER_SECONDS."""
OFFER_SECONDS = 10
DUMP_SECONDS = 1.0
"""Time to write the stacks."""
BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
"""Signals to a group of processes, meant for the rank."""
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", None)
"""On it, C code of the rank writes the stacks of all its threads to stderr (`faulthandler.register`)."""


class Monitor:
    """The rank's side of its monitor: starts it, and tells it how long the next line may take."""

    def __init__(self, rank: int, seconds: float, key: str, margin: float = MARGIN_SECONDS) -> None:
        """seconds, key: the limit of what comes first, the set-up, and the key that sets it. Raises OSError."""
        read, self._line = os.pipe()
        self._told, told = os.pipe()
        for end in (self._line, self._told, told):
            os.set_blocking(end, False)
        words = [f"{os.getpid()}", f"{rank}", f"{seconds}", key, f"{margin}"]
        arguments = [sys.executable, "-I", "-S", os.path.realpath(__file__), *words]
        try:
            actions = [(os.POSIX_SPAWN_DUP2, read, 0), (os.POSIX_SPAWN_DUP2, told, 1)]
            self._pid = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=actions, setsigmask=BLOCKED)
        finally:
            os.close(read)
            os.close(told)

    def beat(self, seconds: float, what: str, step: int = 0, events: str = "") -> None:
        """The next line comes within `seconds`, or the limit of `what` is over. Never blocks or raises: a run can do without a monitor.

        events: the file that gets an event then, of a run that has done `step` steps; empty for none.
        """
        with suppress(OSError, ValueError):
            words = (f"{seconds:.3f}", " ".join(what.split()), f"{step}", events)
            os.write(self._line, ("\t".join(words).replace("\n", " ") + "\n").encode(errors="surrogateescape"))

    def suspended(self, wait: float = 0.0) -> list[tuple[float, float]]:
        """The suspensions of this job since the last call, each as (its end on time.monotonic, its seconds). wait: for a first one."""
        with suppress(OSError, ValueError):
            if select.select([self._told], [], [], wait)[0]:
                lines = os.read(self._told, 1 << 16).decode().splitlines()  # each is written at once, so is whole
                return [(float(ended), float(seconds)) for ended, _, seconds in (line.partition("\t") for line in lines)]
        return []

    def close(self) -> None:
        """End the monitor."""
        line, self._line = self._line, -1
        if line >= 0:
            os.close(line)
            os.close(self._told)
            self._told = -1
            with suppress(OSError):
                os.kill(self._pid, signal.SIGKILL)  # not reaped before: the number is still its own
                os.waitpid(self._pid, 0)


def begin_monitor(rank: int, seconds: float) -> Monitor | None:
    """A monitor of this process; None where no process can be had. seconds: train.start_timeout_seconds."""
    with suppress(OSError):
        return Monitor(rank, seconds, "train.start_timeout_seconds")
    return None


def _state(pid: int) -> str:
    """The state letter of a process in /proc; empty if that is not known."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123  (pathlib takes as long to import as all the rest)
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _say(text: str) -> None:
    """Write to stderr in another process, for which this one waits no longer than SAY_SECONDS: perhaps nobody reads the pipe."""
    line = f"megatrain: {text}\n".encode(errors="replace")
    with suppress(OSError):
        child = os.fork()
        if not child:
            signal.alarm(OFFER_SECONDS)
            try:
                os.write(2, line)
            finally:
                os._exit(0)
        until = time.monotonic() + SAY_SECONDS
        while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < until:
            time.sleep(0.01)


def _record(events: str, step: str, rank: str, message: str) -> None:
    """Append an event to a run's events.jsonl, in another process, as the disk may be what does not answer."""
    if not events or os.fork():
        return
    try:
        import json  # noqa: PLC0415  (as long to import as all the rest)

        seconds = time.time()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}+00:00"
        line = json.dumps({"event": "hang", "time": when, "step": int(step), "rank": int(rank), "message": message})
        os.makedirs(os.path.dirname(events), exist_ok=True)  # noqa: PTH103, PTH120  (as above)
        file = os.open(events, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return
        size = os.fstat(file).st_size
        broken = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, ("\n" * broken + line + "\n").encode())
    finally:
        os._exit(0)


def _end(pid: int, rank: str, what: str, step: str, events: str) -> None:
    """Say what has happened, have the stacks written where that is possible, and kill the rank."""
    state = _state(pid)
    stopped = state in ("T", "t")
    meaning = {"D": "waits in the kernel, as for a disk that does not answer"}.get(state, "runs no Python any more")
    meaning = "is frozen (stopped by a signal)" if stopped else meaning
    who = f"rank {rank} (process {pid} on {os.uname().nodename})"
    said = f"{who} {meaning}, and the time of its section is over; to blame: rank {rank}\n    {what}"
    _say(f"{said}\n    its monitor ends it")
    with suppress(OSError):
        _record(events, step, rank, said)
    if not stopped and DUMP_SIGNAL is not None:
        os.kill(pid, DUMP_SIGNAL)
        time.sleep(DUMP_SECONDS)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)
    time.sleep(DUMP_SECONDS)
    if os.getppid() == pid:
        _say(f"{who} could not be killed: it waits in the kernel")


def main(parent: int, rank: str, seconds: float, key: str, margin: float) -> None:
    """The monitor itself: wait for lines until the parent ends, closes the pipe, or is silent for too long."""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):
            poller.register(os.pidfd_open(parent), select.POLLIN)
    last, looked = [f"set-up ({key}={seconds:g})", "0", ""], time.monotonic()
    deadline, rest = looked + seconds + margin, b""
    while os.getppid() == parent:
        ready = poller.poll(LOOK_SECONDS * 1000)
        now = time.monotonic()
        if now - looked - LOOK_SECONDS > min(SUSPENDED_SECONDS, margin):
            deadline += now - looked
            with suppress(OSError):
                os.write(1, f"{now}\t{now - looked}\n".encode())
        looked = now
        if any(number == 0 for number, _ in ready):
            said = os.read(0, 1 << 16)
            if not said:
                return
            *lines, rest = (rest + said).split(b"\n")
            if lines:
                left, *last = lines[-1].decode(errors="surrogateescape").split("\t", 3)
                deadline = now + float(left) + margin
        elif now > deadline and os.getppid() == parent:
            return _end(parent, rank, *last)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
