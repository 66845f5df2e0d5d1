"""Documents of parquet files: a row is one. A process of its own (parquet_process.py) reads the columns that are asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatrain.corpus.document import Document
from megatrain.corpus.reading.choices import ReadConfig
from megatrain.corpus.reading.encoded import mended_text
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.parquet_answers import ParquetReader
from megatrain.data.prepare.unpack import PackedDamageError, UnpackError
from megatrain.files import brief


def table_documents(readings: Iterable[FileReading], _settings: ReadConfig) -> Iterator[Document]:
    """The documents of some row groups of files, in order. Raises ReadError with on_error=stop, ChangedError and ImportError."""
    with ParquetReader() as tables:
        for reading in readings:
            yield from reading.guarded(functools.partial(_rows, tables, reading))


def _rows(tables: ParquetReader, reading: FileReading, file: BinaryIO) -> Iterator[Document]:
    """The documents. Raises PackedDamageError, UnpackError and ImportError."""
    settings, source, row = reading.settings, reading.source, 0
    same = f"/proc/{os.getpid()}/fd/{file.fileno()}"  # the file that is open here, whatever has its name by now
    wanted = {
        "do": "rows",
        "file": same if Path(same).exists() else reading.part.file,
        "start": reading.part.start,
        "stop": reading.part.stop,
        "key": source.key,
        "keep": source.keep,
        "ratio": settings.unpacked_ratio,
        "made": settings.unpacked_mib << 20,
        "longest": settings.longest,
    }
    for part, texts in tables.answers(wanted):
        if "rows" in part:
            yield from _documents(reading, part, texts, row)
            row += len(part["rows"])
        row = part.get("before", row)
        said = brief(part.get("said", ""))
        match part.get("problem"):
            case "damaged":
                raise PackedDamageError(said)
            case "bomb":
                raise UnpackError(f"{said}. If it is meant, make smaller ones")
            case "no_key":
                reading.refuse("read.no_key", "", f"{said}. Say in `key:` of {source.name} which is the text.")
            case "duplicate_key":
                reading.refuse("read.duplicate_key", "", said)


def _documents(reading: FileReading, part: dict[str, Any], texts: bytes, first: int) -> Iterator[Document]:
    """The documents of some rows. first: number of the first of them in the file."""
    key, longest, at = reading.source.key, reading.settings.longest, 0
    for number, size in enumerate(part["rows"]):
        where = f"row {first + number + 1}"
        if isinstance(size, str):
            reading.refuse("read.no_string", where, f"the value of {key!r} is {size}, not a string.")
        elif size > longest:
            reading.refuse(
                "read.too_long", where, f"the text has more than {longest:,} bytes. If it is meant, raise read.longest."
            )
        else:
            text = mended_text(reading, texts[at : at + size], "utf-8", where)
            at += size
            if text:
                yield reading.document(text, first + number, {name: values[number] for name, values in part["kept"].items()})
            elif text == "":
                reading.count("read.empty")
