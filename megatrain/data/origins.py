"""Where the documents of a token store come from: `PREFIX.documents` beside `.bin` and `.idx`, from a token back to file and line.

    offset   bytes   content
    0        8       magic b"MTORIGIN"
    8        8       <Q D, number of documents
    16       8       <Q T, tokens of the store
    24       8       <Q N, bytes of the names
    32       16      XXH3-128 of all other bytes
    48       N       JSON: {"files": [name, ...], "units": [unit, ...]}, in UTF-8
    48 + N   4 D     <u4 number of the file of each document
    ...      8 D     <i8 its place there, counted in the file's unit

A unit says what a place counts: `line` from 1, `byte` of the text before it (in a compressed file: of what is unpacked), `row` or `record`
from 0; "" where the file is the document. Stores of other programs, or of an earlier release, have no such file.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from megatrain.data.indexed import TokenStore, TokenStoreError, origins_path
from megatrain.files import brief, opened_plain, printable
from megatrain.untrusted import parse_json

MAGIC = b"MTORIGIN"
HEADER = struct.Struct("<8sQQQ")
DIGEST_BYTES = 16
UNITS = ("", "line", "byte", "row", "record")
LARGEST_NAMES = 1 << 30
"""Bytes of all names: of ten million files."""
_UNIT_OF = {".jsonl": "byte", ".json": "byte", ".ndjson": "byte", ".parquet": "row", ".warc": "record"}
_PACKED = (".gz", ".zst")
_CHUNK = 1 << 20


class FilePlace(NamedTuple):
    """The place of a document."""

    file: str
    at: int = 0
    unit: str = ""

    def __str__(self) -> str:
        file = printable(self.file)
        return f"{file}, {self.unit} {self.at:,}" if self.unit else file


def origin_of(file: str, at: int) -> FilePlace:
    """The place of a document of the data factory: `at` counts bytes in a .jsonl, rows in a .parquet, records in a .warc; and bytes in
    what has another name, of which all but lines of JSON begin at 0.
    """
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return FilePlace(file, at, _UNIT_OF.get(suffixes[-1] if suffixes else "", "byte" if at else ""))


class OriginsWriter:
    """Collects the places of a store's documents, 12 bytes each."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], int] = {}
        self._numbers, self._at = array("I"), array("q")

    def __len__(self) -> int:
        return len(self._at)

    def add(self, origin: FilePlace) -> None:
        """The next document's place. Raises ValueError for an unknown unit and a negative place."""
        key = (origin.file, origin.unit)
        number = self._files.get(key)
        if number is None:
            if origin.unit not in UNITS:
                raise ValueError(f"{origin.file}: {origin.unit!r} is no unit of places; {', '.join(map(repr, UNITS))} are")
            number = self._files[key] = len(self._files)
        if origin.at < 0:
            raise ValueError(f"{origin.file}: the place {origin.at} is negative")
        self._numbers.append(number)
        self._at.append(origin.at)

    def add_store(self, store: TokenStore) -> None:
        """The places of all documents of another store, which come next. Raises TokenStoreError for a file that is not as written."""
        path = origins_path(store.prefix)
        with opened_plain(path) as file:
            data = file.read()
        begin = HEADER.size + DIGEST_BYTES
        digest = xxhash.xxh3_128(data[: HEADER.size])
        digest.update(data[begin:])
        if not data.startswith(MAGIC) or digest.digest() != data[HEADER.size : begin]:
            raise TokenStoreError(f"{path} was changed after it was written. Make the store again.")
        _, documents, _, length = HEADER.unpack(data[: HEADER.size])
        said = json.loads(data[begin : begin + length])
        keys = zip(said["files"], said["units"], strict=True)
        known = np.array([self._files.setdefault(key, len(self._files)) for key in keys], np.uint32)
        numbers = np.frombuffer(data, "<u4", documents, begin + length)
        self._numbers.frombytes(known[numbers].tobytes())
        self._at.frombytes(np.frombuffer(data, "<i8", documents, begin + length + 4 * documents).astype("q").tobytes())

    def contents(self, tokens: int) -> Iterator[bytes]:
        """The file of a store of `tokens` tokens, in parts."""
        said = {"files": [file for file, _ in self._files], "units": [unit for _, unit in self._files]}
        names = json.dumps(said).encode()
        header = HEADER.pack(MAGIC, len(self._at), tokens, len(names))
        numbers, at = np.array(self._numbers, "<u4").tobytes(), np.array(self._at, "<i8").tobytes()
        digest = xxhash.xxh3_128(header)
        for part in (names, numbers, at):
            digest.update(part)
        yield from (header, digest.digest(), names, numbers, at)


def read_origin(store: TokenStore, document: int) -> FilePlace | None:
    """The place that document `document` of a store comes from; None if that is not known. Raises TokenStoreError, IndexError."""
    path = origins_path(store.prefix)
    if not 0 <= document < store.documents:
        raise IndexError(f"{store.prefix}: document {document} is not in 0..{store.documents - 1}")
    try:
        with opened_plain(path) as file:
            return _read(file, store, document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, TokenStoreError):
            raise
        raise TokenStoreError(
            f"{path}, which says where documents come from, cannot be read ({brief(error)}). Copy the store again, or take this file away: "
            "the store can be used without it."
        ) from None


def _read(file: BinaryIO, store: TokenStore, document: int) -> FilePlace:
    size = os.fstat(file.fileno()).st_size
    head = file.read(HEADER.size + DIGEST_BYTES)
    if len(head) < HEADER.size + DIGEST_BYTES or not head.startswith(MAGIC):
        raise ValueError(f"it has {size:,} bytes and does not begin with {MAGIC!r}")
    _, documents, tokens, length = HEADER.unpack(head[: HEADER.size])
    if (documents, tokens) != (store.documents, store.tokens):
        raise ValueError(
            f"it is of a store of {documents:,} documents and {tokens:,} tokens, and {store.prefix} has {store.documents:,} and "
            f"{store.tokens:,}"
        )
    if length > LARGEST_NAMES or size != len(head) + length + 12 * documents:
        raise ValueError(
            f"it has {size:,} bytes, and {documents:,} documents and {length:,} bytes of names make {len(head) + length + 12 * documents:,}"
        )
    digest = xxhash.xxh3_128(head[: HEADER.size])
    names = file.read(length)
    digest.update(names)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.digest() != head[HEADER.size :]:
        raise ValueError("it was changed: its hash is another one")
    numbers_at = len(head) + length
    number = int.from_bytes(os.pread(file.fileno(), 4, numbers_at + 4 * document), "little")
    at = int.from_bytes(os.pread(file.fileno(), 8, numbers_at + 4 * documents + 8 * document), "little", signed=True)
    said = parse_json(names, 8)
    name, unit = said["files"][number], said["units"][number]
    if not isinstance(name, str) or unit not in UNITS:
        raise ValueError(f"the file {number} has no name or unit")
    return FilePlace(name, at, unit)
