"""The documents of a unit of work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.reading.choices import Form, ReadConfig
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.json_rows import row_documents
from megatrain.corpus.reading.pages import page_documents
from megatrain.corpus.reading.parquet_rows import table_documents
from megatrain.corpus.reading.texts import text_documents
from megatrain.corpus.reading.units import WorkUnit
from megatrain.corpus.reading.warc import warc_documents


def read_unit(
    unit: WorkUnit, settings: ReadConfig, tally: Tally, moves: Callable[[], None] = lambda: None
) -> Iterator[Document]:
    """The documents of a unit, in order; what cannot be read is counted, as `read.no_json`, with its file and line.

    Counts `read.documents` too. Raises ReadError with on_error=stop, and ChangedError in any case where a file changes while it is read:
    what came of the unit is void then. ImportError where a package is not installed.

    moves: is called now and then, also where there are no documents for long, as among many pages that take their time
    """
    source = settings.source(unit.source)
    for form, parts in itertools.groupby(unit.parts, lambda part: part.form):
        readings = (FileReading(source, part, settings, tally, moves) for part in parts)
        for document in _READERS[form](readings, settings):
            tally.count("read.documents")
            yield document


def _each(
    read: Callable[[FileReading], Iterator[Document]],
) -> Callable[[Iterable[FileReading], ReadConfig], Iterator[Document]]:
    return lambda readings, _settings: itertools.chain.from_iterable(map(read, readings))


_READERS: dict[Form, Callable[[Iterable[FileReading], ReadConfig], Iterator[Document]]] = {
    "text": _each(text_documents),
    "lines": _each(row_documents),
    "html": page_documents,
    "warc": warc_documents,
    "parquet": table_documents,
}
