"""A function in a process of its own, with a limit: what it has noted so far comes back whatever becomes of it.

The process is a fork, which begins with everything imported, where a new one takes 5 to 10 seconds for that. The parent must not have
touched CUDA; where that cannot be had (`Isolated.fresh`), the fork becomes a new interpreter.

    python isolated.py FILE        such an interpreter: FILE has the function and what it needs
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

Note = Callable[[Any], None]
"""Keeps a value that JSON can hold in the place of the one before."""

STACKS_BEFORE_END = 1.5
"""Seconds before the limit at which the stacks of all threads are written."""
SAID = 3000
"""Characters of what a process said that are kept, from the end."""


@dataclass(frozen=True)
class Outcome:
    """What became of a process."""

    seconds: float
    result: Any
    """The last note; None where there is none."""
    problem: str | None
    """Why it did not come to its end, in a line."""
    said: str
    """The end of its stdout and stderr."""


class Isolated:
    """A running process: function(note, *args). Everything it says goes to FILE.log, its notes to FILE.json."""

    fresh = False
    """Whether each process is to be a new interpreter."""

    def __init__(self, file: Path, seconds: float, function: Callable[..., None], *args: Any) -> None:
        self.log, self.notes, self.began = file.with_suffix(".log"), file.with_suffix(".json"), time.monotonic()
        self.seconds = seconds
        self.notes.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        faulthandler.cancel_dump_traceback_later()  # whose thread a fork does not have, but waits for
        self.pid = os.fork()
        if self.pid == 0:
            if self.fresh:
                _begin_anew(file.with_suffix(".call"), (self.log, self.notes, seconds, function, args))
            _run(self.log, self.notes, seconds, function, args)

    def finish(self) -> Outcome:
        """Wait for its end, or end it and all that it has started."""
        status = None
        try:
            while status is None and time.monotonic() - self.began < self.seconds:
                ended, code = os.waitpid(self.pid, os.WNOHANG)
                status = os.waitstatus_to_exitcode(code) if ended else None
                if status is None:
                    time.sleep(0.02)
        finally:
            if status is None:
                self.end()
        if status is None:
            problem = f"not done after {self.seconds:.0f} s"
        else:
            problem = None if status == 0 else self._why(status)
        spent = time.monotonic() - self.began
        said = self.log.read_text(errors="replace")[-SAID:] if self.log.exists() else ""
        return Outcome(spent, self.noted(), problem, said)

    def noted(self) -> Any:
        """The last note; None where there is none."""
        try:
            return json.loads(self.notes.read_text())
        except (OSError, ValueError):
            return None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it and its descendants; it may have ended by itself."""
        try:
            those = psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            those = []
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for process in those:
            try:
                process.kill()
            except psutil.Error:
                continue

    def _why(self, status: int) -> str:
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines[-1] if lines else f"exit code {status}")[:300]


def isolated(file: Path, seconds: float, function: Callable[..., None], *args: Any) -> Outcome:
    """Run function(note, *args) in a process of its own for so long at most."""
    return Isolated(file, seconds, function, *args).finish()


def _begin_anew(file: Path, call: tuple[Any, ...]) -> None:
    """The child as a new interpreter; does not return."""
    file.write_bytes(pickle.dumps(call))
    os.execv(sys.executable, [sys.executable, __file__, str(file)])


def _run(log: Path, notes: Path, seconds: float, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """The child; does not return."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.dump_traceback_later(max(seconds - STACKS_BEFORE_END, seconds / 2), file=2)
        partial = notes.with_suffix(".part")

        def note(value: Any) -> None:
            partial.write_text(json.dumps(value))
            partial.replace(notes)

        function(note, *args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _run(*pickle.loads(Path(sys.argv[1]).read_bytes()))
