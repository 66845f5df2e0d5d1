"""Bytes become text: in the encoding that a byte-order mark tells, or the source says, or else UTF-8; what is none is mended or refused."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from typing import Any

from megatrain.corpus.reading.file_reading import FileReading
from megatrain.extras import need
from megatrain.files import HEAD_BYTES, byte_order_mark, compression, not_text, opened_plain

REPLACEMENT = "\ufffd"
PRESCAN_BYTES = 1024
"""The first bytes of a page, in which its declaration has to stand."""
_DECLARED = re.compile(rb"<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]+)", re.IGNORECASE)
_LARGER = {"gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "iso8859-11": "cp874", "big5": "big5hkscs"}
"""Encodings that browsers read as larger ones."""
_HALVES = re.compile("[\ud800-\udfff]")


def decoded_chunks(reading: FileReading) -> tuple[str, Iterator[bytes]]:
    """The encoding of a file of lines, and its bytes. Of encodings with 2 or 4 bytes a letter they have been made UTF-8.

    A file that is no text has none, which is counted. Raises ReadError with on_error=stop, and ChangedError.
    """
    chunks = reading.chunks()
    head = _file_head(reading) if reading.part.start else b""
    if not head:
        head = next(chunks, b"")
        chunks = itertools.chain([head], chunks)
    encoding = encoding_of(reading, head)
    if reading.part.start == 0 and (said := no_text(head, encoding)):
        reading.refuse("read.no_text", "", said)
        return encoding, iter(())
    return ("utf-8", _as_utf8(reading, encoding, chunks)) if encoding.startswith(("utf-16", "utf-32")) else (encoding, chunks)


def encoding_of(reading: FileReading, head: bytes) -> str:
    """The encoding of a file with these first bytes: by its byte-order mark, or as its source says, or UTF-8."""
    if marked := byte_order_mark(head):
        return marked
    declared = reading.source.encoding
    return "utf-8" if declared == "auto" else codecs.lookup(declared).name.removesuffix("-sig")


def no_text(head: bytes, encoding: str) -> str:
    """The message for a file whose first bytes are no text in that encoding; "" if they may be."""
    head = head[:HEAD_BYTES]
    if found := compression(head):
        return f"the file is compressed by {found[0]}, which its name does not say. Unpack it: {found[1]}"
    if encoding.startswith(("utf-16", "utf-32")):
        return ""
    said = not_text(head)
    return f"{said}, or say in `encoding:` of its source how it is encoded." if said else ""


def text_of(reading: FileReading, data: bytes, encoding: str, within: str = "") -> str | None:
    """The text of a whole file, or of a record of one, with line ends as Unix has them; None for one that is refused, which is counted."""
    text = mended_text(reading, data, encoding, within)
    if text is None:
        return None
    if "\r\n" in text:
        reading.count("read.crlf")
        text = text.replace("\r\n", "\n")
    return text.removeprefix("\ufeff")


def page_in_utf8(reading: FileReading, data: bytes, charset: str, within: str = "") -> bytes | None:
    """A page of HTML in UTF-8, without NULs; None for one that is refused, which is counted.

    Its encoding is, in this order, that of its byte-order mark, of its source, of HTTP (`charset`), of its own declaration, or UTF-8;
    names mean what browsers take them for.
    """
    encoding = encoding_of(reading, data)
    if encoding == "utf-8" and reading.source.encoding == "auto" and byte_order_mark(data) is None:
        declared = _DECLARED.search(data[:PRESCAN_BYTES])
        encoding = browser_encoding(charset or (declared[1].decode() if declared else ""))
    text = mended_text(reading, data, encoding, within)
    return None if text is None else text.encode(errors="replace")


def mended_text(reading: FileReading, data: bytes, encoding: str, within: str) -> str | None:
    """Bytes as text without NULs; None where they are refused, which is counted. within: the record, as messages name it."""
    place = f"{within}, " if within else ""
    text, broken = decoded(data, encoding)
    if broken is not None:
        line = data.count(10, 0, broken.start) + 1
        if not reading.may_mend("read.invalid_text", f"{place}line {line}", said_of(broken, encoding)):
            return None
    if nuls := text.count("\0"):
        line = text.count("\n", 0, text.index("\0")) + 1
        if not reading.may_mend("read.nul", f"{place}line {line}", f"{nuls:,} NULs."):
            return None
        text = text.replace("\0", "")
    return text


def browser_encoding(name: str) -> str:
    """The encoding that browsers use for a declared name; UTF-8 for none, for an unknown one and for UTF-16, which a page that declares
    something readable cannot be in (WHATWG, Encoding and HTML).
    """
    if not name or not name.isascii():
        return "utf-8"
    found = need("resiliparse.parse.encoding", "reading HTML", "data").map_encoding_to_html5(name)
    return "utf-8" if found.startswith("utf-") else _LARGER.get(found, found)


def decoded(data: bytes, encoding: str) -> tuple[str, UnicodeDecodeError | None]:
    """Bytes as text; where some are not of that encoding, with U+FFFD for them, and the first error."""
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError as error:
        return data.decode(encoding, "replace"), error


def said_of(error: UnicodeDecodeError, encoding: str) -> str:
    """The message for bytes that are not of an encoding."""
    return (
        f"not {encoding} (byte 0x{error.object[error.start]:02x}: {error.reason}). If all of the source is encoded otherwise, say how in "
        "its `encoding:`, for example gb18030 or windows-1252."
    )


def has_halves(value: Any) -> bool:
    """Whether a value of JSON has strings with lone surrogates."""
    if isinstance(value, str):
        return not value.isascii() and _HALVES.search(value) is not None
    if isinstance(value, dict):
        return any(has_halves(key) or has_halves(part) for key, part in value.items())
    return isinstance(value, list) and any(map(has_halves, value))


def without_halves(value: Any) -> Any:
    """A value of JSON with U+FFFD for every lone surrogate."""
    if isinstance(value, str):
        return _HALVES.sub(REPLACEMENT, value)
    if isinstance(value, dict):
        return {without_halves(key): without_halves(part) for key, part in value.items()}
    return [without_halves(part) for part in value] if isinstance(value, list) else value


def _file_head(reading: FileReading) -> bytes:
    """The first bytes of a file a later part of which is read; b"" where it cannot be, which its chunks will tell."""
    try:
        with opened_plain(reading.part.file) as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _as_utf8(reading: FileReading, encoding: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks in UTF-8; a half of a surrogate pair becomes bytes that are no UTF-8, which its line will be asked for."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode(errors="surrogatepass")
        yield decoder.decode(b"", final=reading.ended == "whole").encode(errors="surrogatepass")
    except UnicodeDecodeError as error:
        reading.refuse("read.invalid_text", "", f"{said_of(error, encoding)} The rest of the file is left out.")
        reading.ended = "broken"
