"""Reads documents from files: .txt (one document a file) and .jsonl or .json (one a line), plain or compressed as .gz or .zst.

Everything is streamed: for a .jsonl one line is in memory at a time, and `read_pieces` yields a long document in pieces, so that a .txt
of many gigabytes needs no more memory than a small one. Errors name the file and the line.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatrain.files import HEAD_BYTES, not_text, not_utf8

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 16
SAFE_CUT = re.compile(r"(?<=\S)[ \n]")
"""Places before which a divisible tokenizer (data/tokenizer.py) always starts a new word."""
_ROW = json.JSONDecoder(parse_int=len)
"""Decoder of lines. It reads an integer as its number of digits: no integer is used, and Python refuses those of over 4,300 digits."""


class ReadError(ValueError):
    """A file that cannot be read as documents; the message names file, line and remedy."""


@dataclass(frozen=True)
class Document:
    """One text and its file and line."""

    text: str
    path: Path
    line: int
    """Line of a .jsonl, from 1; 0 for a file that is one document."""

    @property
    def source(self) -> str:
        """The source in messages: `file` or `file:line`."""
        return f"{self.path}:{self.line}" if self.line else str(self.path)


@dataclass(frozen=True)
class TextPiece:
    """A part of a document; concatenated, the pieces up to the one with `last` set are the document."""

    text: str
    last: bool


def ignore_bytes(_count: int) -> None:
    """An `on_bytes` that does nothing, for readers without progress display."""


def read_documents(
    paths: Iterable[str | Path], key: str = "text", on_bytes: Callable[[int], None] = ignore_bytes
) -> Iterator[Document]:
    """Every document, in order; `key` is the field of the text in a .jsonl. `on_bytes` is called with bytes read. Raises ReadError."""
    for path in map(Path, paths):
        if _is_lines(path):
            yield from _line_documents(path, key, on_bytes)
        else:
            yield Document("".join(_decoded(path, on_bytes)), path, 0)


def read_pieces(
    paths: Iterable[str | Path], key: str = "text", divide: bool = True, on_bytes: Callable[[int], None] = ignore_bytes
) -> Iterator[TextPiece]:
    """The documents, in order, in pieces of about PIECE_CHARACTERS cut at SAFE_CUT; without `divide` whole. Raises ReadError.

    A stretch without a place to cut stays whole, however long.
    """
    for path in map(Path, paths):
        if not divide:
            yield from (TextPiece(document.text, True) for document in read_documents([path], key, on_bytes))
        elif _is_lines(path):
            for document in _line_documents(path, key, on_bytes):
                yield from _pieces([document.text])
        else:
            yield from _pieces(_decoded(path, on_bytes))


def total_bytes(paths: Iterable[str | Path]) -> int:
    """Total size of the files, for progress; checks names first. Raises ReadError for a missing file or an unknown kind."""
    total = 0
    for path in map(Path, paths):
        _is_lines(path)
        if not path.is_file():
            kind = "is a directory; name its files" if path.is_dir() else "does not exist"
            raise ReadError(f"{path} {kind}.")
        total += path.stat().st_size
    return total


def _is_lines(path: Path) -> bool:
    """Whether a file holds a document a line; the name decides. Raises ReadError for an unknown name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in TEXT_SUFFIXES + LINE_SUFFIXES:
        known = ", ".join(TEXT_SUFFIXES + LINE_SUFFIXES)
        raise ReadError(f"{path}: what kind of file is this? Names end in {known}, then .gz or .zst where compressed.")
    return kind in LINE_SUFFIXES


def _chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """The decompressed contents of a file, chunk by chunk. Raises ReadError."""
    kind = path.suffix.lower()
    try:
        with path.open("rb") as file:
            source = {".gz": _gunzip, ".zst": unzstd}.get(kind, _plain)(file)
            done = 0
            for chunk in source:
                if not done and (problem := not_text(chunk[:HEAD_BYTES])):
                    raise ReadError(f"{path}: {problem}")
                yield chunk
                on_bytes(file.tell() - done)
                done = file.tell()
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ReadError(f"{path} is not a whole {kind} file ({error}). It was cut short or damaged; fetch it again.") from None
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror or error}.") from None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def unzstd(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a file. Unlike the library's own reader, it does not take an incomplete last frame for the end of the file.

    Raises EOFError if the file is incomplete or damaged, ReadError without the library.
    """
    try:
        import zstandard  # noqa: PLC0415  few files need it
    except ImportError:
        raise ReadError(f"{file.name} is compressed with Zstandard, which zstandard reads: pip install zstandard.") from None
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, started = context.decompressobj(), False
    while data := file.read(CHUNK_BYTES // 8):
        while data:
            started = True
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            if chunk:
                yield chunk
            data = b""
            if frame.eof:
                data = frame.unused_data
                frame, started = context.decompressobj(), False
    if started:
        raise EOFError("the last frame does not end")


def _decoded(path: Path, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """The text of a file, chunk by chunk, without a byte-order mark. Raises ReadError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, offset, head = 1, 0, b""
    chunk = b""
    try:
        for chunk in _chunks(path, on_bytes):
            head = head or chunk[:HEAD_BYTES]
            yield decoder.decode(chunk)
            line, offset = line + chunk.count(b"\n"), offset + len(chunk)
        chunk = b""
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        pending = len(error.object) - len(chunk)  # bytes of the chunk before that belong to the same character
        line += chunk[: max(error.start - pending, 0)].count(b"\n")
        raise ReadError(not_utf8(head, f"{path}:{line}", error, f"byte {offset - pending + error.start} of the file")) from None


def _lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """The lines of a file, split at b"\\n" only, as JSON strings may contain every other kind of line end."""
    rest: list[bytes] = []
    for chunk in _chunks(path, on_bytes):
        *whole, tail = chunk.split(b"\n")
        if whole:
            yield b"".join([*rest, whole[0]])
            yield from whole[1:]
            rest = []
        rest.append(tail)
    last = b"".join(rest)
    if last:
        yield last


def _line_documents(path: Path, key: str, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    """The documents of a .jsonl; blank lines are skipped. Raises ReadError that names file and line."""
    for number, line in enumerate(_lines(path, on_bytes), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
        if line.strip():
            yield Document(_text_of(line, key, f"{path}:{number}"), path, number)


def _text_of(line: bytes, key: str, where: str) -> str:
    """The text under `key` in a line of JSON. Raises ReadError."""
    try:
        row = _ROW.decode(line.decode())
    except UnicodeDecodeError as error:
        raise ReadError(not_utf8(line, where, error, f"byte {error.start} of the line")) from None
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{where}: not JSON ({error}). {_one_a_line(line, key)}") from None
    if not isinstance(row, dict):
        raise ReadError(f"{where}: a JSON {type(row).__name__}, not an object. {_one_a_line(line, key)}")
    if key not in row:
        raise ReadError(
            f"{where}: there is no key {key!r}; the line has {', '.join(map(repr, list(row)[:8])) or 'none'}. Use --key."
        )
    text = row[key]
    if not isinstance(text, str):
        raise ReadError(f"{where}: the value of {key!r} is {type(text).__name__}, not a string.")
    if b"\\u" in line and not _is_unicode(text):
        raise ReadError(
            f"{where}: the text holds half of a surrogate pair (\\ud800..\\udfff), which is not a character. Remove it."
        )
    return text


def _one_a_line(line: bytes, key: str) -> str:
    """Advice on the form of lines, and on how to convert a file that is one JSON text."""
    if line.strip()[:1] == b"[":
        return f'Each line must be one object like {{"{key}": "..."}}; of an array make such lines: jq -c ".[]" OLD > NEW.jsonl'
    if line.strip() == b"{":
        return f'Each line must be one object like {{"{key}": "..."}}; put objects on a line each: jq -c . OLD > NEW.jsonl'
    return f'Each line must be one object like {{"{key}": "..."}}.'


def _is_unicode(text: str) -> bool:
    """Whether a string can be encoded as UTF-8 (it has no lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pieces(chunks: Iterable[str]) -> Iterator[TextPiece]:
    """One document, given in chunks, in pieces that a divisible tokenizer encodes as it would the whole."""
    buffer, searched = "", PIECE_CHARACTERS
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > searched:
            cut = SAFE_CUT.search(buffer, start + searched)
            if cut is None:
                searched = len(buffer) - start
                break
            yield TextPiece(buffer[start : cut.start()], False)
            start, searched = cut.start(), PIECE_CHARACTERS
        buffer = buffer[start:]
    yield TextPiece(buffer, True)
