"""Where the workers of pytest-xdist run their tests: all at once, but for one marked `alone`, beside which nothing else runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Room:
    """One worker's way into the room of a test run.

    Two locks, since those who share the room come one after the other, for ever: who wants to be alone keeps the door meanwhile.
    """

    def __init__(self, run: str) -> None:
        folder = Path(tempfile.gettempdir())
        self._paths = [folder / f"megatrain-tests-{run}-{name}" for name in ("door", "room")]
        self._files = [os.open(path, os.O_CREAT | os.O_RDWR, 0o600) for path in self._paths]

    @contextlib.contextmanager
    def taken(self, alone: bool) -> Iterator[None]:
        """Be in the room as long as the block runs; `alone`: when all others have left it."""
        import fcntl  # not on Windows

        door, room = self._files
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)

    def leave(self) -> None:
        """Remove the files; workers that still run tests have them open."""
        for path, file in zip(self._paths, self._files, strict=True):
            os.close(file)
            path.unlink(missing_ok=True)
