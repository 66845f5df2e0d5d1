"""Documents of WARC files (ISO 28500): pages and texts that a crawler has kept, each a record.

Records are told apart here, since fastwarc ends a file at the first record that is broken and does not tell one that is cut short. After a
broken one reading goes on at the next line that begins a record; so it does within one whose length reaches over such a line, behind a
blank one, and does not end where another record or the file does.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import zstandard

from megatrain.corpus.document import Document
from megatrain.corpus.reading.choices import ReadConfig
from megatrain.corpus.reading.encoded import browser_encoding, page_in_utf8, text_of
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.corpus.reading.pages import Page, extracted_documents
from megatrain.extras import need

BEGIN = b"WARC/1."
_NEXT = re.compile(rb"\n\r?\n(?=WARC/1\.)")
"""The end of a line and a blank one, before a record within another one."""
_BORDER = len(b"\n\r\nWARC/1.") - 1
_BEGUN = len(BEGIN) - 1
"""Bytes behind a record that show whether its last ones begin another."""
MOST_BLANK = 1 << 16
"""Blank lines between records, in bytes, behind which another one is looked for."""
LONGEST_HEAD = 1 << 16
"""Bytes of the fields of a record, or of an answer of HTTP."""
HTML = ("text/html", "application/xhtml+xml")


End = Literal["well", "lies", "short"]
"""How a record ends: as its length says; its length reaches over another record; the file ends within it."""


class Record(NamedTuple):
    """A record of a file."""

    number: int
    fields: Mapping[str, str]
    """The fields of its header, by their names in small letters."""
    body: bytes | None
    """Its contents; None: they are more bytes than they may be."""


def warc_documents(readings: Iterable[FileReading], settings: ReadConfig) -> Iterator[Document]:
    """The documents of files: of HTML the main content, of plain text all. Raises ReadError with on_error=stop, and ChangedError."""
    return extracted_documents((item for reading in readings for item in _items(reading)), settings)


def _items(reading: FileReading) -> Iterator[Page | Document]:
    """The pages and texts of a file, in order."""
    for record in records_of(reading):
        kind = record.fields.get("warc-type", "")
        if kind not in ("response", "conversion", "resource"):
            continue
        where = f"record {record.number}"
        most = reading.settings.page_bytes
        if record.body is None:
            reading.refuse(
                "read.too_long", where, f"the record has more than {most:,} bytes. If it is meant, raise read.page_bytes."
            )
            continue
        fields, body = _answer(record.body) if kind == "response" else (record.fields, record.body)
        if not fields and body.startswith(b"HTTP/"):
            reading.refuse("read.http_body", where, "the record ends within the fields of the answer, or they have no end.")
            continue
        status = fields.get("status", "200")
        if not status.startswith("2"):
            reading.count("read.http_status")
            continue
        data = _plain_body(fields, body, most + 1) if kind == "response" else body
        if data is None or len(data) > most:
            said = "is encoded in a way that is not known" if data is None else f"unpacks to more than {most:,} bytes"
            reading.refuse("read.http_body", where, f"the body of the answer {said}.")
            continue
        content, _, parameters = fields.get("content-type", "text/html").partition(";")
        yield from _item(reading, record, content.strip().lower(), _charset(parameters), data)


def _item(reading: FileReading, record: Record, content: str, charset: str, data: bytes) -> Iterator[Page | Document]:
    """The page or text of a record, none where it is neither, or refused, which is counted."""
    where = f"record {record.number}"
    url = record.fields.get("warc-target-uri", "").strip("<>")
    marks = {"url": url} if url else {}
    if content in HTML:
        if (page := page_in_utf8(reading, data, charset, where)) is not None:
            yield Page(reading, record.number, where, page, marks)
    elif content == "text/plain":
        if text := text_of(reading, data, browser_encoding(charset), where):
            yield reading.document(text, record.number, marks)
        elif text == "":
            reading.count("read.empty")
    else:
        reading.count("read.other_content")


# --- records ------------------------------------------------------------------------------------------------------------------


def records_of(reading: FileReading) -> Iterator[Record]:
    """The records of a file that are whole, numbered from 0; what is broken is counted. Raises ReadError with on_error=stop."""
    stream = _Stream(reading.chunks())
    number = 0
    while stream.skip_blank():
        where = f"record {number}"
        fields = _fields(stream.head() or b"") if stream.starts(BEGIN) else {}
        length = fields.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            reading.refuse(
                "read.warc_record", where, "no record begins here: it is left out, up to the next line that begins one."
            )
            stream.seek_line(BEGIN)
            continue
        long = int(length) > reading.settings.page_bytes
        body = None if long else stream.take(int(length))
        ended = stream.pass_over(int(length)) if body is None else stream.end_of(body, int(length))
        if ended == "lies":
            said = f"its length, {int(length):,} bytes, reaches over the beginning of another record, where reading goes on."
            reading.refuse("read.warc_record", where, said)
        elif ended == "short":
            if reading.ended == "whole":
                reading.refuse("read.warc_record", where, f"the file ends within the record, which has {int(length):,} bytes.")
            return
        else:
            yield Record(number, fields, body)
            number += 1


def _fields(head: bytes) -> dict[str, str]:
    """The fields of a head, by names in small letters."""
    lines = head.decode(errors="replace").splitlines()[1:]
    pairs = (line.partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}


class _Stream:
    """Bytes that come in chunks, of which the next few are looked at."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._data, self._at = chunks, b"", 0

    def _more(self) -> bool:
        """Get more bytes; whether there are."""
        chunk = next(self._chunks, b"")
        self._data, self._at = self._data[self._at :] + chunk, 0
        return bool(chunk)

    def _have(self, size: int) -> bool:
        while len(self._data) - self._at < size:
            if not self._more():
                return False
        return True

    def skip_blank(self) -> bool:
        """Go to the next byte that ends no line; whether there is one."""
        while True:
            while self._at < len(self._data):
                if self._data[self._at] not in b"\r\n":
                    return True
                self._at += 1
            if not self._more():
                return False

    def starts(self, begin: bytes) -> bool:
        """Whether these bytes come next."""
        return self._have(len(begin)) and self._data.startswith(begin, self._at)

    def head(self) -> bytes | None:
        """The lines up to an empty one; None where none comes, or a record begins before."""
        while True:
            window = self._data[self._at : self._at + LONGEST_HEAD]
            found = [(at, at + len(end)) for end in (b"\r\n\r\n", b"\n\n") if (at := window.find(end)) >= 0]
            if found:
                end, after = min(found)
                if (b"\n" + BEGIN) in window[:end]:
                    return None
                self._at += after
                return window[:end]
            if len(window) == LONGEST_HEAD or not self._more():
                return None

    def take(self, size: int) -> bytes:
        """The next bytes, all that there are where those are fewer."""
        parts = []
        while size and (self._at < len(self._data) or self._more()):
            part = self._data[self._at : self._at + size]
            self._at += len(part)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def end_of(self, body: bytes, size: int) -> End:
        """How a body of so many bytes ends, which were just taken; where its length lies the next bytes are those of the next record."""
        short = len(body) < size
        if not short and self._is_at_record():
            return "well"
        self._have(_BEGUN)
        found = _NEXT.search(body + self._data[self._at : self._at + _BEGUN])
        if found is None:
            return "short" if short else "well"
        self._data, self._at = body[found.end() :] + self._data[self._at :], 0
        return "lies"

    def pass_over(self, size: int) -> End:
        """Go over so many bytes, or to the next record that begins within them."""
        while True:
            end = self._at + size
            found = _NEXT.search(self._data, self._at, end + _BEGUN)
            if found and found.end() < end:
                self._at = found.end()
                return "lies"
            there = len(self._data) - self._at
            if there >= size + _BEGUN:
                self._at = end
                return "well"
            step = max(there - _BORDER, 0)
            self._at, size = self._at + step, size - step
            if not self._more():
                whole = len(self._data) - self._at >= size
                self._at = self._at + size if whole else len(self._data)
                return "well" if whole else "short"

    def _is_at_record(self) -> bool:
        """Whether a record begins behind the blank lines that come next, if any, or nothing does."""
        for blank in range(MOST_BLANK):
            if not self._have(blank + 1):
                return True
            if self._data[self._at + blank] not in b"\r\n":
                return self._have(blank + len(BEGIN)) and self._data.startswith(BEGIN, self._at + blank)
        return True

    def rest(self) -> bytes:
        """The bytes that come next of those that have come."""
        return self._data[self._at :]

    def seek_line(self, begin: bytes) -> None:
        """Go to the next line that begins so, or to the end."""
        wanted = b"\n" + begin
        while (found := self._data.find(wanted, self._at)) < 0:
            self._at = max(self._at, len(self._data) - len(wanted) + 1)
            if not self._more():
                self._at = len(self._data)
                return
        self._at = found + 1


# --- HTTP ---------------------------------------------------------------------------------------------------------------------


def _answer(body: bytes) -> tuple[dict[str, str], bytes]:
    """The fields of an answer of HTTP, its status among them, and its body; of what is none, no fields and all."""
    stream = _Stream(iter([body]))
    head = stream.head() if body.startswith(b"HTTP/") else None
    if head is None:
        return {}, body
    words = head.split(None, 2)
    return _fields(head) | {"status": words[1].decode(errors="replace") if len(words) > 1 else ""}, stream.rest()


def _plain_body(fields: Mapping[str, str], body: bytes, most: int) -> bytes | None:
    """The body of an answer, put together and unpacked, `most` bytes of it; None where it is packed in an unknown way.

    Crawlers keep the fields and often unpack the body: one that is not what they say is taken as it is.
    """
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = _joined(body)
    for name in reversed(fields.get("content-encoding", "").lower().split(",")):
        unpack = _UNPACK.get(name.strip())
        if unpack is None:
            return None
        body = unpack(body, most)
    return body


def _joined(body: bytes) -> bytes:
    """A body that was sent in chunks."""
    parts: list[bytes] = []
    at = 0
    while (end := body.find(b"\r\n", at, at + 20)) >= 0:
        try:
            size = int(body[at:end].partition(b";")[0], 16)
        except ValueError:
            break
        if size <= 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts) if parts else body


def _inflated(kinds: tuple[int, ...]) -> Callable[[bytes, int], bytes]:
    def unpack(body: bytes, most: int) -> bytes:
        for bits in kinds:
            try:
                return zlib.decompressobj(bits).decompress(body, most)
            except zlib.error:
                continue
        return body

    return unpack


def _unzstd(body: bytes, most: int) -> bytes:
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(body) as stream:
            return bytes(stream.read(most))
    except zstandard.ZstdError:
        return body


def _unbrotli(body: bytes, most: int) -> bytes:
    stream = need("fastwarc.stream_io", "reading pages packed by Brotli", "data")
    try:
        return bytes(stream.BrotliReader(io.BytesIO(body)).read(most))
    except OSError:
        return body


_UNPACK: dict[str, Callable[[bytes, int], bytes]] = {
    "": lambda body, _most: body,
    "identity": lambda body, _most: body,
    "gzip": _inflated((31,)),
    "x-gzip": _inflated((31,)),
    "deflate": _inflated((15, -15)),
    "zstd": _unzstd,
    "br": _unbrotli,
}


def _charset(parameters: str) -> str:
    """The charset of the parameters of a Content-Type; "" without one."""
    pairs = (part.partition("=") for part in parameters.split(";"))
    return next((value.strip(" \"'") for name, _, value in pairs if name.strip().lower() == "charset"), "")
