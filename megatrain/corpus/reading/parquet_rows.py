"""Documents of parquet files: a row is one. Columns that nobody asks for are not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from megatrain.corpus.document import Document
from megatrain.corpus.extras import need
from megatrain.corpus.reading.encoded import mended_text
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.data.prepare.unpack import FREE_BYTES, PackedDamageError, UnpackError
from megatrain.files import brief

BATCH_ROWS = 64
"""Rows in memory at once; each may be as long as `read.longest`."""
BUFFER_BYTES = 1 << 20


def table_documents(reading: FileReading) -> Iterator[Document]:
    """The documents of some row groups of a file, in order. Raises ReadError with on_error=stop, ChangedError and ImportError."""
    return reading.guarded(lambda file: _rows(reading, file))


def _rows(reading: FileReading, file: BinaryIO) -> Iterator[Document]:
    """The documents. Raises PackedDamageError and UnpackError, and OSError for a footer that is broken."""
    arrow, parquet = (need(name, "reading .parquet", "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
        names = table.schema_arrow.names
        if not _has_text(reading, names, arrow):
            return
        columns = [name for name in (reading.source.key, *reading.source.keep) if name in names]
        row = sum(table.metadata.row_group(i).num_rows for i in range(reading.part.start))
        for group in range(reading.part.start, reading.part.stop):
            _require_honest(reading, table.metadata.row_group(group), columns)
            for batch in table.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                yield from _documents(reading, batch, row, arrow)
                row += batch.num_rows
    except arrow.ArrowException as error:
        raise PackedDamageError(brief(error)) from None


def _has_text(reading: FileReading, names: list[str], arrow: Any) -> bool:
    """Whether a file has a column of the text, and one alone."""
    key = reading.source.key
    if twice := next((name for name in (key, *reading.source.keep) if names.count(name) > 1), None):
        reading.refuse("read.duplicate_key", "", f"the column {twice!r} is there twice. Which of them counts?")
        return False
    if key not in names:
        there = brief(", ".join(map(repr, names[:8])) or "none")
        said = f"there is no column {key!r}; the file has {there}. Say in `key:` of {reading.source.name} which is the text."
        reading.refuse("read.no_key", "", said)
    return key in names


def _require_honest(reading: FileReading, group: Any, columns: list[str]) -> None:
    """Raise UnpackError where the columns of a row group become more than a compressed file may."""
    parts = [part for part in map(group.column, range(group.num_columns)) if part.path_in_schema.partition(".")[0] in columns]
    packed, made = sum(part.total_compressed_size for part in parts), sum(part.total_uncompressed_size for part in parts)
    if made > min(reading.settings.unpacked_mib << 20, FREE_BYTES + reading.settings.unpacked_ratio * packed):
        raise UnpackError(
            f"has {made:,} bytes in a row group that takes {packed:,} in the file. If it is meant, make smaller ones"
        )


def _documents(reading: FileReading, batch: Any, first: int, arrow: Any) -> Iterator[Document]:
    """The documents of some rows. first: number of the first of them in the file."""
    source, longest = reading.source, reading.settings.longest
    kept = {name: _values(batch.column(name), arrow) for name in source.keep if name in batch.schema.names}
    for number, value in enumerate(_values(batch.column(source.key), arrow)):
        where = f"row {first + number + 1}"
        if not isinstance(value, bytes):
            said = f"the value of {source.key!r} is {type(value).__name__}, not a string."
            reading.refuse("read.no_string", where, said)
        elif len(value) > longest:
            reading.refuse(
                "read.too_long", where, f"the text has more than {longest:,} bytes. If it is meant, raise read.longest."
            )
        elif text := mended_text(reading, value, "utf-8", where):
            yield reading.document(text, first + number, {name: _plain(values[number]) for name, values in kept.items()})
        elif text == "":
            reading.count("read.empty")


def _values(column: Any, arrow: Any) -> list[Any]:
    """The values of a column, text as bytes: a file may hold in it what is no UTF-8."""
    kinds = arrow.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type):
        column = column.cast(arrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _plain(value: Any) -> Any:
    """A value as JSON has it; of other kinds its text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
