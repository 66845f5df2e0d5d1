"""Compiled models: the tables of a model in one file that is memory-mapped, so loading takes the same time for any size.

    8 bytes    "mtngram\\n"
    4 bytes    length of what follows: JSON, padded with blanks to a multiple of 64
    JSON       version, order, sections: {name: [offset, dtype, count, crc32]}, and a crc32 of all that
    sections   each at a multiple of 64 bytes, little-endian

Sections: `words` bytes and `word_ends`; `word_keys`, `word_numbers` (a table of 64-bit hashes of words); for each order k `k.keys` (from 2
on), `k.log10`, `k.backoff`, as float32 or, quantised, as indices into `k.log10_values` and `k.backoff_values`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.files import whole
from megatrain.ngram.model import HeldWords, NgramModel, Numbers, Order
from megatrain.ngram.table import MISSING, Table
from megatrain.ngram.text import UNKNOWN

MAGIC = b"mtngram\n"
VERSION = 1
ALIGN = 64
Array = npt.NDArray[Any]


class BinaryError(ValueError):
    """A file that is not a compiled model of this version, or is damaged."""


def is_binary(path: Path) -> bool:
    """Whether a file begins as a compiled model does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_binary(model: NgramModel, path: Path, quantize: int = 0) -> None:
    """Write a model, the whole file or nothing. quantize: bits of each log10 (2 to 16); 0 keeps float32. Raises ValueError."""
    if quantize and not 2 <= quantize <= 16:
        raise ValueError(f"--quantize {quantize} must be 2 to 16 bits, or 0 for float32. Use for example --quantize 8.")
    sections = _sections(model, quantize)
    rows: dict[str, list[Any]] = {}
    offset = 0
    for name, values in sections.items():
        rows[name] = [offset, values.dtype.str, values.size, zlib.crc32(values.view(np.uint8).data)]
        offset += -(-values.nbytes // ALIGN) * ALIGN
    said = {"version": VERSION, "order": model.order, "sections": rows}
    text = json.dumps({**said, "crc32": zlib.crc32(json.dumps(said, sort_keys=True).encode())}).encode()
    head = len(MAGIC) + 4
    text = text.ljust(-(-(len(text) + head) // ALIGN) * ALIGN - head)
    with whole(path) as file:
        file.write(MAGIC + len(text).to_bytes(4, "little") + text)
        for values in sections.values():
            file.write(values.data)
            file.write(bytes(-values.nbytes % ALIGN))


def _sections(model: NgramModel, quantize: int) -> dict[str, Array]:
    if not isinstance(model.words, HeldWords):
        raise ValueError("only a model that was read from an ARPA file can be compiled")
    words = model.words.words
    ends = np.frombuffer(words.buffers()[1], np.int64)[words.offset : words.offset + len(words) + 1]
    letters = np.frombuffer(words.buffers()[2], np.uint8)[int(ends[0]) : int(ends[-1])]
    table, slots = Table.of(hashes_of(words.to_pylist()))
    numbers = np.full(table.keys.size, UNKNOWN, np.uint32)
    numbers[slots] = np.arange(len(words), dtype=np.uint32)
    found: dict[str, Array] = {
        "words": letters,
        "word_ends": ends[1:] - ends[0],
        "word_keys": table.keys,
        "word_numbers": numbers,
    }
    for k, order in enumerate(model.orders, 1):
        if order.table is not None:
            found[f"{k}.keys"] = order.table.keys
        for name, values in (("log10", order.log10), ("backoff", order.backoff)):
            found |= _stored(f"{k}.{name}", values, quantize)
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _stored(name: str, values: npt.NDArray[np.float32], bits: int) -> dict[str, Array]:
    """The sections for some values: float32; or with `bits`, the index of the nearest of 2^bits values taken at even quantiles."""
    if not bits or not values.size:
        return {name: values.astype("<f4")}
    ordered = np.unique(values)
    middles = ordered[np.linspace(0, ordered.size - 1, min(1 << bits, ordered.size)).round().astype(np.int64)]
    at = np.searchsorted((middles[1:] + middles[:-1]) / 2, values)
    return {name: at.astype("<u1" if bits <= 8 else "<u2"), f"{name}_values": middles.astype("<f4")}


def hashes_of(words: list[bytes]) -> npt.NDArray[np.uint64]:
    """64 bits of BLAKE2 of each word: the same on every machine."""
    data = b"".join(hashlib.blake2b(word, digest_size=8).digest() for word in words)
    return np.minimum(np.frombuffer(data, "<u8"), np.uint64(0xFFFFFFFFFFFFFFFE)).astype(np.uint64)


@dataclass(frozen=True)
class MappedWords:
    """The words of a mapped file."""

    table: Table
    of_slot: Numbers
    letters: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    def numbers(self, words: Any) -> Numbers:
        """The number of each word, by the table of hashes; a word that only shares another's hash and differs in length is UNKNOWN."""
        encoded = words.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        slots = self.table.find(hashes_of(texts))
        found = np.where(slots == MISSING, np.uint32(UNKNOWN), self.of_slot[np.where(slots == MISSING, 0, slots)]).astype(
            np.uint32
        )
        ends = self.ends[found]
        begins = np.where(found > 0, self.ends[np.maximum(found.astype(np.int64) - 1, 0)], 0)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        found[ends - begins != sizes] = UNKNOWN
        return found[encoded.indices.to_numpy(zero_copy_only=False)]


@dataclass(frozen=True)
class _Quantised:
    """Quantised values: an array of indices into a small array of values, indexed like a plain array."""

    numbers: Array
    values: npt.NDArray[np.float32]

    def __getitem__(self, at: Any) -> npt.NDArray[np.float32]:
        return self.values[self.numbers[at]]

    @property
    def size(self) -> int:
        """Number of values."""
        return int(self.numbers.size)


def map_binary(path: Path, *, verify: bool = False) -> NgramModel:
    """The model of a compiled file, memory-mapped. verify: read all and compare checksums.

    Raises BinaryError for another version, a truncated file, or damage.
    """
    said, start = _head(path)
    size = path.stat().st_size
    whole = np.memmap(path, np.uint8, "r")

    def section(name: str) -> Array:
        offset, dtype, count, crc = said["sections"][name]
        begin, end = start + offset, start + offset + count * np.dtype(dtype).itemsize
        if end > size:
            raise BinaryError(f"{path} is cut short: it has {size:,} bytes, and its {name} ends at {end:,}. Compile it again.")
        data = whole[begin:end]
        if verify and zlib.crc32(data.data) != crc:
            raise BinaryError(
                f"{path} is damaged: the checksum of its {name} is not the one it was written with. Compile it again."
            )
        return np.asarray(data.view(dtype))

    def numbers(name: str) -> Any:
        values = said["sections"].get(f"{name}_values")
        return section(name) if values is None else _Quantised(section(name), section(f"{name}_values"))

    orders = [
        Order(Table(section(f"{k}.keys")) if k > 1 else None, numbers(f"{k}.log10"), numbers(f"{k}.backoff"))
        for k in range(1, said["order"] + 1)
    ]
    words = MappedWords(Table(section("word_keys")), section("word_numbers"), section("words"), section("word_ends"))
    return NgramModel(orders, words)


def _head(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and the offset where its sections begin."""
    with path.open("rb") as file:
        head = file.read(len(MAGIC) + 4)
        length = int.from_bytes(head[len(MAGIC) :], "little")
        text = file.read(min(length, 1 << 24))
    if head[: len(MAGIC)] != MAGIC or len(text) != length:
        raise BinaryError(f"{path} is no compiled n-gram model, or it is cut short")
    try:
        said = json.loads(text)
        crc = said.pop("crc32")
    except (ValueError, KeyError, AttributeError):
        raise BinaryError(f"{path} is damaged: its header cannot be read. Compile it again.") from None
    if said.get("version") != VERSION:
        raise BinaryError(
            f"{path} is of version {said.get('version')}, and this release reads version {VERSION}. Compile its ARPA file again."
        )
    if crc != zlib.crc32(json.dumps(said, sort_keys=True).encode()):
        raise BinaryError(f"{path} is damaged: its header is not as it was written. Compile it again.")
    return said, len(MAGIC) + 4 + length
