"""Documents of files that are one document each: text and source code."""

from __future__ import annotations

from collections.abc import Iterator

from megatrain.corpus.document import Document
from megatrain.corpus.reading.encoded import encoding_of, no_text, text_of
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.files import HEAD_BYTES

FEW_NULS, MOST_NULS = 8, 0.05
"""NULs among a file's first bytes, and their share, from which it is no text."""


def text_documents(reading: FileReading) -> Iterator[Document]:
    """The document of a file, none where it is empty or cannot be read, which is counted. Raises ReadError with on_error=stop, and
    ChangedError.
    """
    data = whole_file(reading, reading.settings.longest, "longest")
    if data is None:
        return
    encoding = encoding_of(reading, data)
    if said := no_text(data, encoding):
        reading.refuse("read.no_text", "", said)
    elif encoding == "utf-8" and data.count(0, 0, HEAD_BYTES) > max(FEW_NULS, MOST_NULS * min(len(data), HEAD_BYTES)):
        reading.refuse("read.no_text", "", "the file is no text: it has many NULs.")
    elif (text := text_of(reading, data, encoding)) is not None:
        if text:
            yield reading.document(text, 0)
        else:
            reading.count("read.empty")


def whole_file(reading: FileReading, longest: int, key: str) -> bytes | None:
    """All bytes of a file; None for one that is broken or has more than `longest`, the value of read.KEY, which is counted."""
    held, parts = 0, []
    for chunk in reading.chunks():
        held += len(chunk)
        if held > longest:
            reading.refuse(
                "read.too_long", "", f"the document has more than {longest:,} bytes. If it is meant, raise read.{key}."
            )
            return None
        parts.append(chunk)
    return b"".join(parts) if reading.ended == "whole" else None
