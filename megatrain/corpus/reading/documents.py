"""The documents of a unit of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.reading.choices import Form, ReadConfig
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.json_rows import row_documents
from megatrain.corpus.reading.texts import text_documents
from megatrain.corpus.reading.units import WorkUnit

READERS: dict[Form, Callable[[FileReading], Iterator[Document]]] = {"text": text_documents, "lines": row_documents}


def read_unit(unit: WorkUnit, settings: ReadConfig, tally: Tally) -> Iterator[Document]:
    """The documents of a unit, in order; what cannot be read is counted, as `read.no_json`, with its file and line.

    Counts `read.documents` too. Raises ReadError with on_error=stop, and ChangedError in any case where
    a file changes while it is read: the unit has to be done again then, and what came of it is void.
    """
    source = settings.source(unit.source)
    for piece in unit.pieces:
        reading = FileReading(source, piece, settings, tally)
        for document in READERS[piece.form](reading):
            tally.count("read.documents")
            yield document
