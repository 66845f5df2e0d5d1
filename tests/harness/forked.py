"""Processes of `megatrain` that begin with everything imported: forks of a template, which has done nothing else.

Importing torch and the program takes a process two seconds of a core, more than most tests' training. A fork has its own memory,
environment, session and output, and ends as any process does; only what the environment says to imports comes too late for it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PIPE = "PIPE"
"""The word in whose place a process finds the number of the pipe that it inherits."""
_MOST_GIVEN = 3
"""Descriptors: output, errors and a pipe."""

_started: list[tuple[subprocess.Popen[bytes], str]] = []
"""The template of this process, once there is one, and the address of its socket."""


class Forked:
    """One such process, with what `subprocess.Popen` has."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], out: Path | int, err: Path | int, *pipe: int) -> None:
        """words: after `megatrain`, or the name of a file of Python and its arguments.

        out, err: files, or descriptors of this process. pipe: one more descriptor, which it inherits.
        """
        self.args, self.returncode, self._said = list(words), None, b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_template(env))
        with contextlib.ExitStack() as files:
            given = [w if isinstance(w, int) else files.enter_context(w.open("wb")).fileno() for w in (out, err)]
            socket.send_fds(self._socket, [b"."], [*given, *pipe])
        request = {"words": self.args, "env": dict(env), "cwd": str(Path.cwd())}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self.pid = int(self._line(None))

    def _line(self, seconds: float | None) -> bytes:
        """The next line that the template sends; empty if there is none within `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._said:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return b""
            part = self._socket.recv(64)
            if not part:
                raise RuntimeError(f"the template of forked processes has ended: {self.args}")
            self._said += part
        line, self._said = self._said.split(b"\n", 1)
        return line

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            line = self._line(timeout)
            if not line:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int(line)
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As os.kill, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _template(env: Mapping[str, str]) -> str:
    """The address of the template, which is started with the first request."""
    if not _started or _started[0][0].poll() is not None:
        folder = tempfile.mkdtemp(prefix="megatrain_forked_")
        address = str(Path(folder, "socket"))
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), address],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise RuntimeError("the template of forked processes did not start")
        process.stdout.close()
        _started[:] = [(process, address)]
    return _started[0][1]


@atexit.register
def _end() -> None:
    for process, address in _started:
        process.kill()
        process.wait()
        Path(address).unlink(missing_ok=True)
        Path(address).parent.rmdir()


# --- the template ----------------------------------------------------------------------------------------------------------


def _serve(address: str) -> list[str]:
    """Fork for every request; returns, in the forked process alone, what it is to do."""
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    listener.settimeout(1.0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that stand between
    os.write(1, b"ready\n")
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            return _between(connection)
        connection.close()
    os._exit(0)


def _between(connection: socket.socket) -> list[str]:
    """Fork once more, wait for that process and tell its exit code; returns in the second fork alone, which tells its number."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    _, given, _, _ = socket.recv_fds(connection, 1, _MOST_GIVEN)
    with connection.makefile("r") as lines:
        request = json.loads(lines.readline())
    child = os.fork()
    if child:
        for number in given:
            os.close(number)
        end = os.pidfd_open(child)
        ready, _, _ = select.select([end, connection], [], [])
        if end not in ready:  # whoever has asked has gone, and nobody else would end it
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(OSError):  # whoever has asked may be gone
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.setsid()
    connection.sendall(f"{os.getpid()}\n".encode())  # of a session by now, which can be killed
    connection.close()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, file in enumerate(given[:2], 1):
        os.dup2(file, number)
        os.close(file)
    words: list[str] = [str(given[2]) if word == PIPE else word for word in request["words"]]
    sys.argv = ["megatrain", *words]
    sys.orig_argv = [sys.executable, "-m", "megatrain", *words]
    return words


def _main() -> None:
    """The template, and each process that it has become."""
    import pytest  # noqa: F401  (the tests whose functions a pool runs)

    import megatrain.cli.main
    import megatrain.program
    import megatrain.testing  # noqa: F401  (what a pool's functions take)
    from megatrain.records.plot import draw_loss

    with tempfile.TemporaryDirectory() as folder:  # a first picture reads the fonts
        Path(folder, "metrics.jsonl").touch()
        draw_loss(Path(folder, "metrics.jsonl"), Path(folder, "loss.png"))
    tempfile.tempdir = None  # each process finds its own

    words = _serve(sys.argv[1])
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module("megatrain", run_name="__main__")


if __name__ == "__main__":
    _main()
