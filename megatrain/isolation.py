"""A process of its own for libraries that break down on hostile files: both ends of its pipes.

The process limits itself: the kernel refuses it memory beyond a bound, and ends it where one answer takes too much processor time; it ends
within a second when its parent does, even if another process holds the pipe open. Processor time, since the clock would leave out other
documents on a busy machine.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from megatrain.extras import MissingPackageError

SIZE = struct.Struct("<I")
"""A number on a pipe."""
READY, MISSING = b"ready", b"missg"
"""First words of the process: requests may come; or a package is missing, of which the bytes of a message and it follow."""
START_SECONDS = 60.0
T = TypeVar("T")
Own = TypeVar("Own", bound="Isolated")


class DiedError(Exception):
    """The process has ended, or had to be."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code
        """Exit code, or minus the number of the signal that has ended it; None: it did not answer."""

    @property
    def took_too_long(self) -> bool:
        """Whether it went beyond its processor time, or gave no answer."""
        return self.code in (None, -signal.SIGPROF)

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.code is None:
            return "no answer"
        return f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name


class Isolated:
    """The parent's end: a process that is started for the first request, and again after it has ended; `with` ends it."""

    def __init__(self, module: str, *words: str) -> None:
        """module: what is run, with these words."""
        self.command = [sys.executable, "-m", module, *words]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            with process:
                process.wait()

    def send(self, data: bytes, patience: float) -> None:
        """Write all of `data`. Raises DiedError, and MissingPackageError where the process lacks a package.

        patience: seconds by the clock after which the process is given up
        """
        process = self.process or self._start()
        assert process.stdin is not None  # noqa: S101  a pipe
        view, deadline = memoryview(data), time.monotonic() + patience
        while view:
            if not select.select([], [process.stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                raise self._died(None)
            try:
                view = view[os.write(process.stdin.fileno(), view) :]
            except BrokenPipeError:
                raise self._died(process.wait()) from None

    def receive(self, size: int, patience: float) -> bytes:
        """Read `size` bytes. Raises DiedError."""
        process = self.process
        assert process is not None  # noqa: S101  it has been sent something
        assert process.stdout is not None  # noqa: S101  a pipe
        parts, deadline = [], time.monotonic() + patience
        while size:
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._died(None)
            part = os.read(process.stdout.fileno(), size)
            if not part:
                raise self._died(process.wait())
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _died(self, code: int | None) -> DiedError:
        self.end()
        return DiedError(code)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process, with pipes that never block. Raises MissingPackageError."""
        pipe = subprocess.PIPE
        self.process = process = subprocess.Popen(
            self.command, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for file in (process.stdin, process.stdout):
            assert file is not None  # noqa: S101  both are pipes
            os.set_blocking(file.fileno(), False)
        try:
            if self.receive(len(READY), START_SECONDS) != READY:
                size = SIZE.unpack(self.receive(SIZE.size, START_SECONDS))[0]
                raise MissingPackageError(self.receive(size, START_SECONDS).decode())
        except DiedError as died:
            raise MissingPackageError(f"the process of its own does not start: {' '.join(self.command)}") from died
        return process


def packages(make: Callable[[], T]) -> T:
    """The packages that a process needs, made by a call; where one is missing, the parent is told, and the process ends."""
    try:
        return make()
    except ImportError as error:
        said = str(error).encode()
        os.write(1, MISSING + SIZE.pack(len(said)) + said)
        raise SystemExit(3) from None


class Requests:
    """The process's own end. It is ready when this is made."""

    def __init__(self, seconds: float, memory_mib: int) -> None:
        """seconds: of processor time for an answer. memory_mib: beyond what the process has by now."""
        self._seconds, self._parent = seconds, os.getppid()
        self._in, self._out = os.dup(0), os.dup(1)
        os.dup2(2, 1)  # for libraries that print
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  pathlib is not needed here otherwise
                most = int(file.read().split()[0]) * resource.getpagesize() + (memory_mib << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        self.answer(READY)

    def more(self) -> bool:
        """Wait for a request; whether there is one and the parent still lives."""
        while not select.select([self._in], [], [], 1.0)[0]:
            if os.getppid() != self._parent:
                return False
        return True

    def read(self, size: int) -> bytes:
        """`size` bytes of a request, fewer where the parent has ended."""
        parts = []
        while size and (part := os.read(self._in, min(size, 1 << 20))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def timed(self, work: Callable[[], T]) -> T:
        """The outcome of a call, within the processor time of one answer."""
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def answer(self, data: bytes) -> None:
        """Write a part of an answer."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._out, view) :]
