"""De-duplication as phases: its passes over the fingerprints of all units become chores that workers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.corpus.duplicates.outcome import Removal, Removals
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.passes import Deduplication, DedupTask
from megatrain.corpus.work.chores import Chore, Phase, Published, key_of

FINGERPRINTS, FOUND = "fingerprints", "found"
"""Files of a unit, and of a chore here."""
Removed = tuple[Mapping[int, Removal], Mapping[int, list[int]]]
"""(documents to remove from a unit by row, lines to remove from others by row)"""


class Similar:
    """De-duplication of the units of one phase."""

    def __init__(self, settings: DedupConfig, units: Phase, published: Published) -> None:
        self.key = key_of(units.key, asdict(settings))
        """A hash of all that decides on what is removed."""
        self._units, self._published = units, published
        fingerprints = [published.folder(units, chore.name) / FINGERPRINTS for chore in units.chores]
        self._passes = Deduplication(fingerprints, self._where, settings)
        self._phases: dict[str, Phase] = {}

    def phases(self) -> Iterator[Phase]:
        """The phases, in order; each may be asked for when those before it are done."""
        for chore in self._units.chores:
            self._published.file(self._units, chore.name, FINGERPRINTS, whole=False)  # each worker would read all of them
        for found in self._passes.passes():
            phase = Phase(found.name, self.key, [Chore(task.name, 1, partial(_write, task)) for task in found.tasks])
            self._phases[found.name] = phase
            yield phase

    def removals(self) -> Removals:
        """The documents to remove, when all phases are done."""
        return self._passes.removals()

    def removed(self, unit: int) -> Removed:
        """The documents and lines to remove from a unit."""
        return self.removals().of(unit), self._passes.lines_of(unit)

    def _where(self, name: str, task: str) -> Path:
        return self._published.file(self._phases[name], task, FOUND)


def _write(task: DedupTask, folder: Path, progress: Callable[[int], None]) -> Mapping[str, Any]:
    task.write(folder / FOUND)
    progress(1)
    return {}
