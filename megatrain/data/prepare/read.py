"""Reads documents from files: .txt (one document a file) and .jsonl or .json (one a line), plain or compressed as .gz or .zst.

Everything is streamed: for a .jsonl one line is in memory at a time, and `read_pieces` yields a long document in pieces, so that a .txt
of many gigabytes needs no more memory than a small one. What has to be in memory whole is at most `longest` bytes: a line of a .jsonl,
and of a compressed text a document or a stretch without a place to cut; a plain text is as long as it is. Errors name the file and the
line.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatrain.data.origins import FilePlace
from megatrain.data.prepare.lines import lines_of
from megatrain.data.prepare.unpack import PackedDamageError, UnpackError, unpacked
from megatrain.files import HEAD_BYTES, OneLine, not_text, not_utf8, opened_plain

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 16
LONGEST_LINE = 32 << 20
"""Bytes, unless `--max-line` says more: a book has one or two million, and Python needs up to nine times as many to read a line."""
MOST_VALUES_BYTES = 2 << 20
"""Bytes of a line outside of its strings: of a small value in brackets Python makes fifty times as many."""
SAFE_CUT = re.compile(r"[ \n](?<=\S.)", re.DOTALL)
"""Places before which a divisible tokenizer (data/tokenizer.py) always starts a new word."""
_ROW = json.JSONDecoder(parse_int=len)
"""Decoder of lines. It reads an integer as its number of digits: no integer is used, and Python refuses those of over 4,300 digits."""


_STRING = re.compile(rb'"[^"]*"?')
"""A string of a line without escapes."""


class ReadError(OneLine, ValueError):
    """A file that cannot be read as documents; the message names file, line and remedy."""


class Lines(NamedTuple):
    """How lines are read, where the key of the text does not say enough."""

    key: str = "text"
    longest: int = LONGEST_LINE
    """Bytes of a line of a .jsonl, and of a compressed document that must be in memory."""


class PlacedText(NamedTuple):
    """One text and its file and line."""

    text: str
    path: Path
    line: int
    """Line of a .jsonl, from 1; 0 for a file that is one document."""

    @property
    def source(self) -> str:
        """The source in messages: `file` or `file:line`."""
        return f"{self.path}:{self.line}" if self.line else str(self.path)

    @property
    def origin(self) -> FilePlace:
        """Where it comes from."""
        return FilePlace(str(self.path), self.line, "line" if self.line else "")


class TextPiece(NamedTuple):
    """A part of a document; concatenated, the pieces up to the one with `last` set are the document."""

    text: str
    last: bool
    origin: FilePlace
    """Where it comes from."""


def ignore_bytes(_count: int) -> None:
    """An `on_bytes` that does nothing, for readers without progress display."""


def read_documents(
    paths: Iterable[str | Path], key: str | Lines = "text", on_bytes: Callable[[int], None] = ignore_bytes
) -> Iterator[PlacedText]:
    """Every document, in order; `key` is the field of the text in a .jsonl. `on_bytes` is called with bytes read. Raises ReadError."""
    lines = _lines_of(key)
    for path in map(Path, paths):
        if _is_lines(path):
            yield from _line_documents(path, lines, on_bytes)
        else:
            yield PlacedText("".join(_together(_decoded(path, on_bytes), path, lines.longest)), path, 0)


def read_pieces(
    paths: Iterable[str | Path],
    key: str | Lines = "text",
    divide: bool = True,
    on_bytes: Callable[[int], None] = ignore_bytes,
) -> Iterator[TextPiece]:
    """The documents, in order, in pieces of about PIECE_CHARACTERS cut at SAFE_CUT; without `divide` whole. Raises ReadError.

    A stretch without a place to cut stays whole.
    """
    lines = _lines_of(key)
    for path in map(Path, paths):
        if not divide:
            yield from (TextPiece(document.text, True, document.origin) for document in read_documents([path], lines, on_bytes))
        elif _is_lines(path):
            for document in _line_documents(path, lines, on_bytes):
                yield from pieces_of(document.text, document.origin)
        else:
            yield from _pieces(_decoded(path, on_bytes), FilePlace(str(path)), lines.longest)


def pieces_of(text: str, origin: FilePlace) -> Iterable[TextPiece]:
    """A document in memory in pieces, as `read_pieces` cuts them."""
    return _pieces([text], origin, len(text)) if len(text) > PIECE_CHARACTERS else (TextPiece(text, True, origin),)


def _lines_of(key: str | Lines) -> Lines:
    return key if isinstance(key, Lines) else Lines(key)


def total_bytes(paths: Iterable[str | Path]) -> int:
    """Total size of the files, for progress; checks names first. Raises ReadError for a missing file or an unknown kind."""
    total = 0
    for path in map(Path, paths):
        _is_lines(path)
        if not path.is_file():
            fault = "is no plain file: write what it gives to a file, and name that" if path.exists() else "does not exist"
            fault = "is a directory; name its files" if path.is_dir() else fault
            raise ReadError(f"{path} {fault}.")
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
        with opened_plain(path) as file:
            source = unpacked(file, kind[1:]) if kind in COMPRESSIONS else _plain(file)
            done = 0
            for chunk in source:
                if not done and (problem := not_text(chunk[:HEAD_BYTES])):
                    raise ReadError(f"{path}: {problem}")
                yield chunk
                on_bytes(file.tell() - done)
                done = file.tell()
    except PackedDamageError as error:
        raise ReadError(f"{path} is not a whole {kind} file ({error}). It was cut short or damaged; fetch it again.") from None
    except UnpackError as error:
        raise ReadError(f"{path} {error}") from None
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror or error}.") from None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _together(texts: Iterable[str], path: Path, longest: int) -> Iterator[str]:
    """Texts that will be in memory together. Raises ReadError where they are too long for that."""
    size = 0
    for text in texts:
        size += len(text)
        _require_short(size, path, longest)
        yield text


def _require_short(size: int, path: Path, longest: int) -> None:
    """Raise ReadError for `size` characters of a compressed file that would have to be in memory together."""
    if size > longest and path.suffix.lower() in COMPRESSIONS:
        raise ReadError(f"{path}: {size:,} characters of one document have to be in memory. {_longer(path, longest)}")


def _longer(path: Path, longest: int) -> str:
    """Advice for what is longer than it may be; a plain file's own size is always enough."""
    enough = -(-max(2 * longest, path.stat().st_size) >> 20)
    return f"Lines and compressed documents have at most {longest:,} bytes here. If it is meant, give --max-line {enough}M."


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


def _lines(path: Path, on_bytes: Callable[[int], None], longest: int) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines of a file that are not empty, split at b"\\n" only, as JSON strings may contain every other kind of
    line end. Raises ReadError.
    """
    for number, at, line in lines_of(_chunks(path, on_bytes), longest):
        if line is None:
            raise ReadError(
                f"{path}:{number + 1}: the line, from byte {at:,} of the text, is too long. {_longer(path, longest)}"
            )
        yield number + 1, line


def _line_documents(path: Path, lines: Lines, on_bytes: Callable[[int], None]) -> Iterator[PlacedText]:
    """The documents of a .jsonl; blank lines are skipped. Raises ReadError that names file and line."""
    for number, line in _lines(path, on_bytes, lines.longest):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
        if not line.isspace():
            text = _plain_text(line, lines.key)
            yield PlacedText(_text_of(line, lines.key, f"{path}:{number}") if text is None else text, path, number)


def _plain_text(line: bytes, key: str) -> str | None:
    """The text under `key`, read by orjson at twice the speed; None where it is not installed or finds anything that it does not take."""
    loads = _orjson()
    if loads is None or len(line) > MOST_VALUES_BYTES:
        return None
    try:
        row = loads(line)
    except ValueError:
        return None
    text = row.get(key) if type(row) is dict else None
    return text if type(text) is str else None


@functools.cache
def _orjson() -> Callable[[bytes], Any] | None:
    try:
        from orjson import loads  # noqa: PLC0415  an extra
    except ImportError:
        return None
    return loads


def _text_of(line: bytes, key: str, where: str) -> str:
    """The text under `key` in a line of JSON. Raises ReadError."""
    if len(line) > MOST_VALUES_BYTES and not is_mostly_text(line):
        raise ReadError(
            f"{where}: more than {MOST_VALUES_BYTES:,} bytes of the line are no text but other values. Leave those out: jq -c "
            f"'{{{key}}}' OLD > NEW.jsonl"
        )
    try:
        row = _ROW.decode(line.decode())
    except UnicodeDecodeError as error:
        raise ReadError(not_utf8(line, where, error, f"byte {error.start} of the line")) from None
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{where}: not JSON ({error}). {one_a_line(line, key)}") from None
    if not isinstance(row, dict):
        raise ReadError(f"{where}: a JSON {type(row).__name__}, not an object. {one_a_line(line, key)}")
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


def is_mostly_text(line: bytes) -> bool:
    """Whether what is outside of a line's strings, and their number, is within bounds."""
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    return bare.count(b'"') < MOST_VALUES_BYTES // 2 and len(_STRING.sub(b"", bare)) <= MOST_VALUES_BYTES


def one_a_line(line: bytes, key: str) -> str:
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


def _pieces(chunks: Iterable[str], origin: FilePlace, longest: int) -> Iterator[TextPiece]:
    """One document, given in chunks, in pieces that a divisible tokenizer encodes as it would the whole. Raises ReadError."""
    buffer, searched = "", PIECE_CHARACTERS
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > searched:
            cut = SAFE_CUT.search(buffer, start + searched)
            if cut is None:
                searched = len(buffer) - start
                break
            yield TextPiece(buffer[start : cut.start()], False, origin)
            start, searched = cut.start(), PIECE_CHARACTERS
        buffer = buffer[start:]
        _require_short(len(buffer), Path(origin.file), longest)
    yield TextPiece(buffer, True, origin)
