"""Turns: ranks that are threads of one process compute one at a time.

Every operation of torch releases the interpreter's lock and takes it again; eight threads that compete for it take three times as long
for a step as one after the other. So a rank that computes keeps the turn until it waits in a collective.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_SECONDS = 0.2
"""How often a rank that waits for its turn checks whether the job has failed."""


class RankTurns:
    """The rank, among those of one process, that may compute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rank: int | None = None

    def begin(self, rank: int, failed: Callable[[], object]) -> None:
        """Wait until no other rank has the turn, and take it; return without it once `failed()` is true."""
        while not self._lock.acquire(timeout=_LOOK_SECONDS):
            if failed():
                return
        self._rank = rank

    def end(self, rank: int) -> bool:
        """Give up the turn, if `rank` has it; whether it had."""
        if self._rank != rank:
            return False
        self._rank = None
        self._lock.release()
        return True
