"""Leases: who works at a chore, said by files in a folder that all workers see.

    <chore>.1    the first worker's; its time is that of its last sign of life
    <chore>.2    of the worker that took over when that had none for STALE_SECONDS, or was seen to be dead

A lease is made with O_EXCL, so that one worker alone gets each number, on any file system. Two workers at one chore do no harm: both
would publish the same bytes, and one of them does (chores.py).
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatrain.files import OneLine, doing, make_folder
from megatrain.stderr import note
from megatrain.untrusted import parse_json, read_plain

STALE_SECONDS, SIGN_SECONDS = 60.0, 2.0
"""Age of a lease that counts as left; time between signs of life."""
MOST_TAKEN = 4
"""Workers that may begin a chore: when so many were lost at it, the chore is at fault."""
WIDTH = 320
"""Bytes of a lease, so that it is rewritten in place."""
_LARGEST, _DIGITS = 4096, 3
"""Bytes of a file, and digits of a number, beyond which it is no lease."""
STUCK = 70
"""Exit code of a process that ends itself."""


class LostWorkersError(OneLine, RuntimeError):
    """A chore at which one worker after the other was lost."""


class OtherWorkError(OneLine, RuntimeError):
    """Workers of another config, or of files that have changed, are at work in the same folder."""


@dataclass(frozen=True)
class Sign:
    """The newest lease of a chore as another worker sees it."""

    number: int
    age: float
    """Seconds since its last sign of life, by the clock of the file system."""
    host: str
    process: int
    born: float
    """Start time of the process, which tells it from a later one of the same number."""
    done: int
    """Bytes of the chore that were done by then."""
    space: str = ""
    """Where its process number counts: containers may have the name of their host in common."""
    run: str = ""
    """The preparation that its worker works for."""

    @property
    def left(self) -> bool:
        """Whether its worker is dead, or has given no sign for too long."""
        if self.host == socket.gethostname() and self.space == _space() and not _lives(self.process, self.born):
            return True
        return self.age > STALE_SECONDS


def _lives(process: int, born: float) -> bool:
    try:
        return abs(psutil.Process(process).create_time() - born) < 1.0
    except (psutil.Error, ValueError, OverflowError):  # a number that no process can have, too
        return False


@functools.cache
def _space() -> str:
    """The space of process numbers that this process is in; "" where the system has but one."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  (a link to nothing)
    except OSError:
        return ""


_UNKNOWN: dict[str, Any] = {"host": "", "process": 0, "born": 0.0, "done": 0, "space": "", "run": ""}
"""Contents of a lease before it is written."""


def _said(path: Path) -> dict[str, Any]:
    """The contents of a lease; nothing where it is none, or not yet written. Raises OSError."""
    try:
        about = parse_json(read_plain(path, _LARGEST, follow=False))
    except ValueError:
        return {}
    fits = isinstance(about, dict) and all(type(value) is type(_UNKNOWN.get(name)) for name, value in about.items())
    return about if fits else {}


class Leases:
    """The leases in a folder, as seen and taken by this process."""

    def __init__(self, folder: Path, stuck_seconds: float, run: str = "") -> None:
        """stuck_seconds: a process whose steady chore says nothing for so long ends itself, so that another worker takes over.
        run: what it works for, which workers in one folder have in common."""
        make_folder(folder)
        self._folder, self._stuck_seconds, self._run = folder, stuck_seconds, run
        self._born = psutil.Process().create_time()

    def signs(self) -> dict[str, Sign]:
        """The newest lease of each chore."""
        now, newest = self._now(), dict[str, Sign]()
        for path in self._folder.iterdir():
            chore, _, number = path.name.rpartition(".")
            if not number.isdecimal() or len(number) > _DIGITS or (chore in newest and newest[chore].number > int(number)):
                continue
            about: dict[str, Any] = {}
            moved = now
            with suppress(OSError):  # gone meanwhile
                moved = path.lstat().st_mtime
                about = _said(path)
            newest[chore] = Sign(number=int(number), age=now - moved, **{**_UNKNOWN, "space": _space(), **about})
        return newest

    def require_alone(self, signs: Iterable[Sign], *, first: bool) -> None:
        """Raise OtherWorkError where another run is at work here. first: this one has not begun; else one of two gives way."""
        for sign in signs:
            if sign.run and sign.run != self._run and (first or sign.run < self._run) and not sign.left:
                raise OtherWorkError(
                    f"{self._folder.parent} is being worked at for another config, or other files than there are now, by process "
                    f"{sign.process} on {sign.host}. Wait until that has ended, or give this preparation an output.dir of its own."
                )

    def forgive(self) -> None:
        """Remove the leases that were left: a new run tries again what an earlier one has lost workers at."""
        for chore, sign in self.signs().items():
            for number in range(1, sign.number + 1) if sign.left else ():
                (self._folder / f"{chore}.{number}").unlink(missing_ok=True)

    def _now(self) -> float:
        """The time of the file system, which need not be that of this machine."""
        probe = self._folder / f"clock-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        return probe.stat().st_mtime

    @contextmanager
    def held(self, chore: str, over: Sign | None, steady: bool = True, about: str = "") -> Iterator[Lease | None]:
        """The lease of a chore nobody has (over: its newest one, which was left); None if another worker was faster.

        steady: the chore says again and again how far it is, and is stuck where it does not; about: what it reads. Raises
        LostWorkersError for a chore that has cost too many workers.
        """
        number = 1 if over is None else over.number + 1
        if over is not None and number > MOST_TAKEN:
            what = f"{chore} ({about})" if about else chore
            raise LostWorkersError(
                f"{what}: {number - 1} workers were lost at it, the last was process {over.process} on {over.host}. Look at its memory "
                f"(dmesg) and time limits. Another `megatrain data prepare` tries it again; a job array does when "
                f"{self._folder}/{chore}.* are removed."
            )
        path = self._folder / f"{chore}.{number}"
        try:
            with doing("writing", path):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            yield None
            return
        holder = {"host": socket.gethostname(), "space": _space(), "process": os.getpid(), "born": self._born, "run": self._run}
        try:
            with doing("writing", path):
                lease = Lease(chore, descriptor, holder, self._stuck_seconds if steady else float("inf"))
            try:
                yield lease
            finally:
                lease.end()
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def forget(self, chore: str) -> None:
        """Remove the leases of a chore that is done."""
        for path in self._folder.glob(f"{chore}.*"):
            path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Remove what this process keeps here beside leases."""
        (self._folder / f"clock-{socket.gethostname()}-{os.getpid()}").unlink(missing_ok=True)


class Lease:
    """A lease that this process holds: a thread gives signs of life while the work goes on."""

    def __init__(self, chore: str, descriptor: int, about: dict[str, Any], stuck_seconds: float) -> None:
        self._chore, self._descriptor, self._about, self._stuck_seconds = chore, descriptor, about, stuck_seconds
        self._done, self._said = 0, time.monotonic()
        self._ended = threading.Event()
        self._sign()
        self._thread = threading.Thread(target=self._give_signs, name="lease", daemon=True)
        self._thread.start()

    def progress(self, count: int) -> None:
        """Count bytes that have been done since the last call, which is a sign of life too."""
        self._done += count
        self._said = time.monotonic()

    def end(self) -> None:
        """Stop giving signs."""
        self._ended.set()
        self._thread.join()

    def _sign(self) -> None:
        line = json.dumps({**self._about, "done": self._done})
        os.pwrite(self._descriptor, line.ljust(WIDTH).encode(), 0)

    def _give_signs(self) -> None:
        while not self._ended.wait(SIGN_SECONDS):
            with suppress(OSError):  # a full disk: the lease grows old, and another worker takes over
                self._sign()
            if time.monotonic() - self._said > self._stuck_seconds:
                note(
                    f"megatrain: {self._chore} has not moved for {self._stuck_seconds:g} s (run.stuck_seconds); its process ends here:"
                )
                faulthandler.dump_traceback()
                os._exit(STUCK)
