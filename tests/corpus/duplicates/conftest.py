"""De-duplication of documents given as text, pass by pass, as workers do it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from megatrain.corpus.duplicates.fingerprints import fingerprinting
from megatrain.corpus.duplicates.outcome import Removals
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.passes import Deduplication


class Found(NamedTuple):
    """What is removed, by number of the document over all units."""

    instead: dict[int, int]
    """The representative of each removed document."""
    reason: dict[int, str]
    agreement: dict[int, float]
    lines: dict[int, list[int]]
    removals: Removals
    units: list[Path]
    removed: Path
    places: Path


def deduplicate(folder: Path, units: list[list[str]], settings: DedupConfig) -> Found:
    paths = []
    for number, texts in enumerate(units):
        paths.append(folder / f"unit-{number}")
        with fingerprinting(paths[-1], settings) as prints:
            for text in texts:
                prints.add(text, "code" if text.startswith("#!") else "text")
    job = Deduplication(paths, lambda name, task: folder / f"{name}-{task}", settings)
    for work in job.passes():
        for task in work.tasks:
            task.write(folder / f"{work.name}-{task.name}")
    starts = [0, *itertools.accumulate(len(texts) for texts in units)]
    removals = job.removals()
    found = {starts[unit] + row: gone for unit in range(len(units)) for row, gone in removals.of(unit).items()}
    return Found(
        {document: starts[gone.representative.unit] + gone.representative.row for document, gone in found.items()},
        {document: gone.reason for document, gone in found.items()},
        {document: gone.agreement for document, gone in found.items()},
        {starts[unit] + row: lines for unit in range(len(units)) for row, lines in job.lines_of(unit).items()},
        removals,
        paths,
        folder / "decided-removed",
        folder / "places-places",
    )


@pytest.fixture
def deduplicated(tmp_path) -> Callable[..., Found]:
    """A function that de-duplicates the texts of units, in a folder of its own."""
    folders = (tmp_path / str(number) for number in itertools.count())

    def run(units: list[list[str]], settings: DedupConfig) -> Found:
        folder = next(folders)
        folder.mkdir()
        return deduplicate(folder, units, settings)

    return run
