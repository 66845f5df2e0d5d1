"""The sections of a run, each with a limit in time: what this rank does now, and since when it has come no further.

    with sections.enter("save", where=lambda: path):      # limit: checkpoint.timeout_seconds
        ...
    sections.tick()                                       # within a section: it has come further, its time begins anew

    set-up       join the world, open the data, make or load the model     train.start_timeout_seconds
    data         wait for a batch                                          train.hang_timeout_seconds, as for all but
    step         the rest of an update; a tick a step
    evaluation   a tick a batch
    samples      what log.samples asks the model; a tick a token of each
    tasks        what eval.tasks asks it; likewise
    save         all of a save that training waits for                     checkpoint.timeout_seconds
    records      open the log and the checkpoints' directory, close them
    end          leave the world

One section lies within another (data in step), and only the innermost has its time measured. The main thread enters and ticks; the
guard's thread judges.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

Name = Literal["set-up", "data", "step", "evaluation", "samples", "tasks", "save", "records", "end"]

START_GRACE_SECONDS = 2.0
"""How much longer the set-up may take than the ranks wait for each other in it, so that those who come can say who has not."""
TOLD_SECONDS = 30.0
"""Once told to stop, a section that has come no further for this long hangs, unless it usually takes long."""
TOLD_TIMES = 5.0
"""... for this many times its longest time so far."""


class Limit(NamedTuple):
    """Seconds that something may take, and the key that sets them."""

    seconds: float
    key: str
    grace: float = 0.0
    """Seconds more until it counts as over."""
    told: bool = False
    """Whether it is the shorter one of a run that was told to stop."""

    def __str__(self) -> str:
        return (
            f"{self.key}={self.seconds:g}"
            if not self.told
            else f"told to stop; {self.seconds:g} s are far above its usual time"
        )


@dataclass(frozen=True)
class SectionLimits:
    """The limits of a run's sections, in seconds."""

    start: float
    hang: float
    save: float

    def of(self, name: Name) -> Limit:
        """The limit of a section."""
        if name == "set-up":
            return Limit(self.start, "train.start_timeout_seconds", START_GRACE_SECONDS)
        return self.of_save if name == "save" else self.of_call

    @property
    def of_call(self) -> Limit:
        """The limit of a collective that is in no section."""
        return Limit(self.hang, "train.hang_timeout_seconds")

    @property
    def of_save(self) -> Limit:
        """The limit of a save, in the background too."""
        return Limit(self.save, "checkpoint.timeout_seconds")


@dataclass
class TimedSection:
    """A section that this rank is in."""

    name: Name
    limit: Limit
    where: Callable[[], str]
    """Where it is, such as the file that a save writes; empty if there is no more to say."""
    since: float
    """When it has last come further."""

    def __str__(self) -> str:
        place = self.where()
        return f"{self.name} at {place}" if place else self.name


class Suspensions:
    """When this job was suspended: time that no limit counts."""

    def __init__(self) -> None:
        self._known: deque[tuple[float, float]] = deque(maxlen=1000)

    def add(self, ended: float, seconds: float) -> None:
        """Take note of a suspension that lasted for `seconds`, until `ended`."""
        self._known.append((ended, seconds))

    def since(self, begin: float) -> float:
        """Seconds after `begin` in which the job was suspended."""
        return sum(min(seconds, ended - begin) for ended, seconds in self._known if ended > begin)


class Sections:
    """The sections that one rank is in, innermost last."""

    def __init__(self, limits: SectionLimits) -> None:
        self.limits = limits
        self._inside: list[TimedSection] = []
        self.longest_save: Callable[[], float] = lambda: 0.0
        """Seconds of the longest save so far, with all that it writes in the background; 0 before the first has succeeded."""
        self._longest: dict[Name, float] = {}
        """Section -> the longest time so far from one tick to the next."""

    @contextmanager
    def enter(self, name: Name, where: Callable[[], str] = str) -> Iterator[TimedSection]:
        """Be in a section while the body runs; the one around it has its time begun anew afterwards."""
        section = TimedSection(name, self.limits.of(name), where, time.monotonic())
        self._inside.append(section)
        try:
            yield section
        finally:
            self.tick()
            self._inside.remove(section)
            if self._inside:
                self._inside[-1].since = time.monotonic()

    def tick(self) -> None:
        """The innermost section has come further: once a step, once a batch of an evaluation."""
        if self._inside:
            section, now = self._inside[-1], time.monotonic()
            self._longest[section.name] = max(now - section.since, self._longest.get(section.name, 0.0))
            section.since = now

    def now(self) -> TimedSection | None:
        """The innermost section; None outside of all, where time is not limited."""
        inside = list(self._inside)  # another thread asks
        return inside[-1] if inside else None

    def limit(self, told: bool = False) -> Limit | None:
        """The limit of the innermost section; a shorter one once the run was told to stop, where the usual time is known.

        A scheduler ends what does not end in time, often without a word: half a minute is what most give.
        """
        section = self.now()
        if section is None:
            return None
        usual = self.longest_save() if section.name == "save" else self._longest.get(section.name, 0.0)
        if told and usual and section.name in ("data", "step", "evaluation", "samples", "tasks", "save"):
            shorter = max(TOLD_SECONDS, TOLD_TIMES * usual)
            if shorter < section.limit.seconds:
                return Limit(shorter, section.limit.key, told=True)
        return section.limit
