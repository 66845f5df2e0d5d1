"""Duties between two steps, as data: each says when it is due, and the loop does those that are, in their order.

A new one is a line in `program.duties_of`; the loop does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Pause:
    """The time between a step and the next, the same on every rank."""

    step: int
    """Steps so far."""
    last: bool
    """Whether all steps are done."""
    stop: bool
    """Whether the run is told to stop; a duty may be told so too."""
    gone_back: bool = False
    """Whether the run is at another step now, so that no further duty is due here."""
    failed: bool = False
    """Whether the run cannot go on."""

    @property
    def final(self) -> bool:
        """Whether no step is to follow, unless the run goes back."""
        return self.last or self.stop

    @property
    def ends(self) -> bool:
        """Whether the run ends here, before all its steps are done."""
        return self.failed or (self.stop and not self.last and not self.gone_back)


@dataclass(frozen=True)
class Duty:
    """Something that is done between steps, when any of its reasons holds; ranks decide alike."""

    act: Callable[[Pause], None]
    every: int = 0
    """Steps from one time to the next; 0: the number of steps is no reason."""
    when: Callable[[Pause], bool] = lambda pause: False
    """A further reason. May be collective, and is asked at most twice in a pause."""
    waits: bool = True
    """Whether all steps so far are to be reported, with the device idle, before it is done."""

    def due(self, pause: Pause) -> bool:
        """Whether it is due."""
        return due(pause.step, self.every) or self.when(pause)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def always(pause: Pause) -> bool:
    """A reason that always holds."""
    return True


def goes_on(pause: Pause) -> bool:
    """Holds where another step follows."""
    return not pause.final


def do(duties: Sequence[Duty], pause: Pause, catch_up: Callable[[], bool]) -> None:
    """Do the duties that are due (collective). catch_up: reports all steps so far; returns whether the run is told to stop."""
    if any(duty.waits and duty.due(pause) for duty in duties):
        pause.stop |= catch_up()
    for duty in duties:
        if pause.gone_back or pause.failed:
            return
        if duty.due(pause):
            duty.act(pause)
