"""Turns: ranks that are threads of one process compute one at a time.

Every operation of torch lets go of the interpreter's lock and takes it again, and eight threads that all want it make a step take three
times as long as one after the other. So a rank that computes holds its turn until it waits in a collective.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_SECONDS = 0.2
"""How often a rank that waits for its turn looks whether it still has to."""


class Turns:
    """Whose turn it is, among the ranks of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rank: int | None = None

    def begin(self, rank: int, over: Callable[[], object]) -> None:
        """Wait until no other rank is in turn; once `over` says so, nobody waits."""
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            if over():
                return
        self._rank = rank

    def end(self, rank: int) -> bool:
        """Let another rank compute; whether this one was in turn."""
        if self._rank != rank:
            return False
        self._rank = None
        self._lock.release()
        return True
