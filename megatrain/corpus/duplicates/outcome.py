"""Reads what de-duplication has decided: for the pass that removes documents and lines, and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatrain.corpus.duplicates.key_files import Column, KeyFile
from megatrain.corpus.duplicates.minhash import HASHES
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.duplicates.places import UnitRow, UnitStarts
from megatrain.corpus.duplicates.representatives import REMOVED

EXACT, NEAR = "duplicates.exact", "duplicates.near"
"""Reasons for which documents are removed, as the report has them."""


class Removal(NamedTuple):
    """Why a document is removed."""

    reason: str
    representative: UnitRow
    """The document that stays in its place."""
    agreement: float
    """Share of the 120 hashes in which the two agree."""


class Cluster(NamedTuple):
    """A document that stays, and its copies."""

    representative: UnitRow
    removed: int


class Removals:
    """The documents that are removed from the units of a corpus. Raises OSError and KeyFileError."""

    def __init__(self, places: str | Path, removed: str | Path) -> None:
        self._places, (self._block,) = UnitStarts.read(places), KeyFile(removed, REMOVED).blocks

    def of(self, unit: int) -> dict[int, Removal]:
        """The removed documents of a unit, by row, ascending."""
        begin, end = self._places.documents[unit : unit + 2].tolist()
        found = self._block.column("document").range_of(begin, end - 1)
        columns = [
            self._block.column(name).read(found.start, found.stop).tolist()
            for name in ("document", "representative", "agree", "exact")
        ]
        return {
            document - begin: Removal(EXACT if exact else NEAR, self._places.of(representative), agree / HASHES)
            for document, representative, agree, exact in zip(*columns, strict=True)
        }

    def counts(self) -> tuple[Column, Column]:
        """(documents, removed ones) of each unit [units]."""
        bounds = np.searchsorted(self._block.column("document").read(), self._places.documents)
        return np.diff(self._places.documents), np.diff(bounds)

    def sizes(self) -> dict[int, int]:
        """How many clusters there are by the number of their copies, ascending."""
        _, copies = np.unique(self._block.column("representative").read(), return_counts=True)
        sizes, clusters = np.unique(copies, return_counts=True)
        return dict(zip(sizes.tolist(), clusters.tolist(), strict=True))

    def largest(self, most: int = 20) -> list[Cluster]:
        """The largest clusters, by size and place."""
        found, copies = np.unique(self._block.column("representative").read(), return_counts=True)
        order = np.lexsort((found, -copies))[:most]
        return [Cluster(self._places.of(int(found[i])), int(copies[i])) for i in order]


def alarms(removals: Removals, sources: Sequence[str], settings: DedupConfig) -> list[str]:
    """Warnings of the report: sources that lose much, and documents with many copies. sources: each unit's source."""
    documents, removed = removals.counts()
    said = []
    for source in dict.fromkeys(sources):
        of = [name == source for name in sources]
        total, gone = int(documents[of].sum()), int(removed[of].sum())
        if gone > settings.alarm_share * total:
            said.append(
                f"source {source} loses {gone:,} of {total:,} documents ({gone / total:.0%}) as duplicates, more than "
                f"dedup.alarm_share={settings.alarm_share:g}: read some of them beside their representatives."
            )
    for cluster in removals.largest():
        if cluster.removed > settings.alarm_cluster:
            unit, row = cluster.representative
            said.append(
                f"row {row:,} of unit {unit} stays for {cluster.removed:,} removed copies, more than "
                f"dedup.alarm_cluster={settings.alarm_cluster:,}: read some of them beside it."
            )
    return said
