"""Counts documents and lines over all units of a corpus, so that one number tells a document, and the lower one came first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatrain.corpus.duplicates.fingerprints import KIND, require_recipe
from megatrain.corpus.duplicates.key_files import Column, KeyFile, KeyFileError, written
from megatrain.corpus.duplicates.parameters import DedupConfig

_PLACES = "places"
_BYTES = 120
"""Bytes that a task needs for each document or line of its part, about: hash, number, their order, and copies of them."""


class UnitRow(NamedTuple):
    """A document by the unit that it is in."""

    unit: int
    row: int


class UnitStarts(NamedTuple):
    """Where the documents and lines of each unit begin in the order of the corpus."""

    documents: Column
    """int64 [units + 1]."""
    lines: Column
    """Likewise."""

    @classmethod
    def read(cls, path: str | Path) -> UnitStarts:
        """The places that `count_places` has written. Raises OSError and KeyFileError."""
        (block,) = KeyFile(path, _PLACES).blocks
        return cls(block.column("documents").read(), block.column("lines").read())

    def of(self, document: int) -> UnitRow:
        """The unit and row of a document."""
        unit = int(np.searchsorted(self.documents, document, "right")) - 1
        return UnitRow(unit, document - int(self.documents[unit]))

    def parts(self, memory: int) -> int:
        """How many parts by hash a comparison has to have, so that a task needs so many bytes of memory, about."""
        return int(max(1, -(-max(self.documents[-1], self.lines[-1]) * _BYTES // memory)))


def count_places(units: Sequence[str | Path], settings: DedupConfig, output: str | Path) -> None:
    """Write where the documents and lines of each unit begin. Raises OSError; KeyFileError for files made with other settings."""
    counts = np.zeros((2, len(units) + 1), np.int64)
    for number, path in enumerate(units):
        file = KeyFile(path, KIND)
        require_recipe(file, settings)
        try:
            counts[:, number + 1] = file.about["documents"], file.about["lines"]
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise KeyFileError.damaged(file.path, error) from None
    documents, lines = np.cumsum(counts, axis=1)
    with written(output, _PLACES) as writer:
        writer.block({"documents": documents, "lines": lines})
