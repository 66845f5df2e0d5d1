"""Asks the process that reads parquet files (parquet_process.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatrain.data.prepare.unpack import PackedDamageError
from megatrain.isolation import SIZE, DiedError, Isolated

SECONDS, MEMORY_MIB = 60.0, 1024
"""Processor time for a batch of rows, and memory, which a batch of rows of 32 MiB each needs."""
PATIENCE = 600.0


class ParquetReader(Isolated):
    """The process that reads parquet files."""

    def __init__(self) -> None:
        super().__init__("megatrain.corpus.reading.parquet_process", str(SECONDS), str(MEMORY_MIB))

    def answers(self, wanted: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The parts of an answer. Raises PackedDamageError where the process does not survive the file, and ImportError."""
        words = json.dumps(wanted).encode()
        try:
            self.send(SIZE.pack(len(words)) + words, PATIENCE)
            while True:
                part = json.loads(self._bytes())
                yield part, self._bytes()
                if part.keys() & {"end", "groups", "problem"}:
                    return
        except DiedError as died:
            raise PackedDamageError(f"what reads it breaks down, {died.how}") from None

    def _bytes(self) -> bytes:
        return self.receive(SIZE.unpack(self.receive(SIZE.size, PATIENCE))[0], PATIENCE)


def row_groups(tables: ParquetReader, file: str) -> list[int]:
    """Bytes of each row group of a file, unpacked; none where it cannot be read. Raises ImportError."""
    try:
        ((found, _),) = tables.answers({"do": "groups", "file": file})
    except PackedDamageError:
        return []
    groups: list[int] = found.get("groups", [])
    return groups
