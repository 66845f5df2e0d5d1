"""The passes of de-duplication over the fingerprints of all units: which tasks there are, and what each reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatrain.corpus.duplicates.exact import exact_task
from megatrain.corpus.duplicates.line_copies import lines_of, lines_task
from megatrain.corpus.duplicates.near import near_task
from megatrain.corpus.duplicates.outcome import Removals
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.places import UnitStarts, count_places
from megatrain.corpus.duplicates.representatives import merge


class DedupTask(NamedTuple):
    """A piece of work that reads files of earlier passes and writes one."""

    name: str
    write: Callable[[Path], None]
    """Writes the file; may be sent to another process. Raises OSError and KeyFileError."""


class DedupPass(NamedTuple):
    """Tasks that need nothing of each other."""

    name: str
    tasks: list[DedupTask]


class Deduplication:
    """One de-duplication of units whose fingerprints are written.

    units    their fingerprints, in order
    where    the path of a task's file, by the names of its pass and the task
    memory   bytes that a task may take, about
    """

    def __init__(
        self, units: Sequence[Path], where: Callable[[str, str], Path], settings: DedupConfig, memory: int = 1 << 28
    ) -> None:
        self.units, self.where, self.settings, self.memory = list(units), where, settings, memory

    @property
    def parts(self) -> int:
        """How many parts each comparison has; known when the first pass is done."""
        return self.settings.parts or UnitStarts.read(self.where("places", "places")).parts(self.memory)

    def passes(self) -> Iterator[DedupPass]:
        """The passes in order; a pass is made when the one before it is done."""
        units, settings = self.units, self.settings
        yield DedupPass("places", [DedupTask("places", partial(count_places, units, settings))])
        places, parts = self.where("places", "places"), self.parts
        exact = [
            DedupTask(self._name("exact", part), partial(exact_task, part, parts, units, settings)) for part in self._exact
        ]
        near = [
            DedupTask(self._name("near", number), partial(near_task, number // parts, number % parts, parts, units, settings))
            for number in self._near
        ]
        yield DedupPass("compared", exact + near)
        copies, pairs = ([self.where("compared", task.name) for task in tasks] for tasks in (exact, near))
        yield DedupPass("decided", [DedupTask("removed", partial(merge, places, units, copies, pairs, settings))])
        removed = self.where("decided", "removed")
        yield DedupPass(
            "lines",
            [
                DedupTask(self._name("lines", part), partial(lines_task, part, parts, units, removed, settings))
                for part in self._lines
            ],
        )

    @property
    def _exact(self) -> range:
        return range(0 if self.settings.exact == "none" else self.parts)

    @property
    def _near(self) -> range:
        return range(self.parts * self.settings.bands if self.settings.near else 0)

    @property
    def _lines(self) -> range:
        return range(0 if self.settings.lines == "none" else self.parts)

    @staticmethod
    def _name(kind: str, number: int) -> str:
        return f"{kind}-{number:05}"

    def removals(self) -> Removals:
        """The documents that are removed. Raises OSError and KeyFileError."""
        return Removals(self.where("places", "places"), self.where("decided", "removed"))

    def lines_of(self, unit: int) -> dict[int, list[int]]:
        """The numbers of the lines to remove from each document of a unit, by row. Raises OSError and KeyFileError."""
        first = int(UnitStarts.read(self.where("places", "places")).lines[unit])
        return lines_of(self.units[unit], first, [self.where("lines", self._name("lines", part)) for part in self._lines])
