"""Saves again what could not be saved: a disk that is full or away for a minute costs neither the run nor its last checkpoint.

    save_every          200               400               600
    saves                x  .  .    .      x       .         o      x failed, . tried again at the end of a step, o saved

A save that has failed is tried again, with the state that the run has by then, at the first step that ends FIRST_WAIT_SECONDS later,
then after twice that time and so on, and whenever a save is due anyway. So many failures in a row end the run, on every rank at once.
The last save, which nothing follows, is tried again at once, then after LAST_WAIT_SECONDS and so on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from megatrain.checkpoint.directory import latest
from megatrain.checkpoint.save import Contents, Saver
from megatrain.checkpoint.together import CheckpointError, ContentError
from megatrain.parallel.portion import Portions
from megatrain.transport.consensus import lowest

FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 10.0, 600.0
"""How long to wait after a first failure, and at most."""
LAST_WAIT_SECONDS = 1.0
"""How long to wait after the first failure of the last save."""


class Retries:
    """The saves of a run, tried again where they fail. All ranks have one, and call alike; the clock of rank 0 decides."""

    def __init__(
        self, saver: Saver, give_up_after: int, timeout_seconds: float, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        """give_up_after: failures in a row that end the run; timeout_seconds: for all attempts of the last save; tell: prints a line."""
        self.saver, self.give_up_after, self.timeout_seconds, self._tell = saver, give_up_after, timeout_seconds, tell
        self.failures = 0
        """Failures in a row."""
        self._saved_at: int | None = None
        """Step of the save that goes on in the background."""
        self._look_at = 0
        """Step after which to see whether that one has ended: 1, 2, 4, 8 ... steps later, since each look costs a small collective."""
        self._again: float | None = None
        """When to try again, by this rank's clock."""

    def due(self, step: int) -> bool:
        """Whether a save that has failed is to be tried again after `step`; call it at the end of each (collective, if one has failed or
        goes on). Raises CheckpointError on every rank after too many failures in a row.
        """
        if self._saved_at is not None and step >= self._look_at:
            self._look_at = step + max(1, step - self._saved_at)
            if self.saver.ended():
                self.settle()
        return self._again is not None and self._rank_0_says(time.monotonic() >= self._again)

    def save(self, contents: Contents, portions: Portions, *, wait: bool) -> None:
        """Save, once the save before has ended; returns as `Saver.save` does, or when it has failed, to be tried again (collective).

        Raises CheckpointError on every rank after too many failures in a row, or ContentError, which no later attempt would mend.
        """
        self.settle()
        try:
            self.saver.save(contents, portions, wait=wait)
        except ContentError:
            raise
        except CheckpointError as error:
            self._failed(error)
            return
        self._again = None
        if wait:
            self.failures = 0
        else:
            self._saved_at, self._look_at = contents.step, contents.step + 1

    def save_last(self, contents: Contents, portions: Portions) -> None:
        """Save what the run ends with, and wait for it (collective); failures of earlier saves do not count.

        Raises CheckpointError on every rank after `give_up_after` failures, or when the time for another attempt is over.
        """
        self.settle(last=True)
        began, self.failures = time.monotonic(), 0
        while True:
            try:
                self.saver.save(contents, portions, wait=True)
                return
            except ContentError:
                raise
            except CheckpointError as error:
                self.failures += 1
                seconds = LAST_WAIT_SECONDS * 2 ** (self.failures - 1)
                late = self._rank_0_says(time.monotonic() + seconds > began + self.timeout_seconds)
                if late or self.failures >= self.give_up_after:
                    limit = f"checkpoint.timeout_seconds={self.timeout_seconds:g}" if late else self._limit()
                    raise self._gives_up(error, limit) from error
                self._tell(f"the last save is tried again in {seconds:g} s ({self._count()})")
                time.sleep(seconds)

    def settle(self, *, last: bool = False) -> None:
        """Wait for the save in the background, if there is one, and count its failure. last: a failure changes nothing any more."""
        if self._saved_at is None:
            return
        self._saved_at = None
        try:
            self.saver.finish()
        except CheckpointError as error:
            if not last:
                self._failed(error)
        else:
            self.failures = 0

    def _failed(self, error: CheckpointError) -> None:
        """Count a failure and plan the next attempt. Raises CheckpointError after too many in a row."""
        self.failures += 1
        if self.failures >= self.give_up_after:
            raise self._gives_up(error, self._limit()) from error
        seconds = min(FIRST_WAIT_SECONDS * 2 ** (self.failures - 1), MOST_WAIT_SECONDS)
        self._again = time.monotonic() + seconds
        self._tell(f"training goes on; it is saved again in {seconds:g} s, or when a save is due before ({self._count()})")

    def _gives_up(self, error: CheckpointError, limit: str) -> CheckpointError:
        newest = ""
        with suppress(OSError):
            newest = latest(self.saver.directory)
        holds = f"{newest} is as it was" if newest else f"there is no checkpoint in {self.saver.directory}"
        times = "once" if self.failures == 1 else f"{self.failures} times in a row"
        return CheckpointError(f"the run could not be saved {times} ({limit}), and ends; {holds}. {error}")

    def _limit(self) -> str:
        return f"checkpoint.give_up_after={self.give_up_after}"

    def _count(self) -> str:
        return f"failure {self.failures} of {self.give_up_after} in a row that end the run: checkpoint.give_up_after"

    def _rank_0_says(self, mine: bool) -> bool:
        """Rank 0's value of `mine`, on every rank (collective)."""
        world = self.saver.ctx.world
        return lowest(mine and world.rank == 0, world.group, self.saver.ctx.device) is not None
