"""Compiled models: the tables of a model in one file of which only what is asked for is read, so opening takes the same time for any size.

    8 bytes    "mtngram\n"
    4 bytes    length of what follows: JSON, padded with blanks to a multiple of 64
    JSON       version, order, sections: {name: [offset, dtype, count]}, xxh3 (128 bits) of the section `checksums`, crc32 of all that
    sections   each at the next multiple of 64 bytes, little-endian, nothing between them or behind the last

Sections: `words` bytes and `word_ends`; `word_keys`, `word_numbers` (a table of 64-bit hashes of words); for each order k `k.keys` (from 2
on), `k.log10`, `k.backoff`, as float32 or, quantised, as indices into `k.log10_values` and `k.backoff_values`; last `checksums`: the
XXH3-64 of every block of 64 KiB of each section before it, padding included. They are verified when a block is first read (lazy.py),
and of a file up to 64 MiB when it is opened. Files of version 1 had checksums that nobody read, and are refused.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.files import HEAD_BYTES, brief, opened_plain, pointer, whole
from megatrain.ngram.lazy import Array, BinaryError, LazyArray, ModelFile, block_count, blocks, checksums, padded
from megatrain.ngram.model import HeldWords, NgramModel, Numbers, Order
from megatrain.ngram.table import MISSING, MOST_SLOTS, Table
from megatrain.ngram.text import END, UNKNOWN

MAGIC = b"mtngram\n"
VERSION = 2
AT_ONCE = 1 << 26
"""Files up to this many bytes are verified whole when they are opened (some ten milliseconds)."""
_LONGEST_HEADER = 1 << 16
_INTEGERS, _FLOATS, _INDICES = ("<i8",), ("<f4",), ("|u1", "<u2")
_HASHES = ("<u8",)


def is_binary(path: Path) -> bool:
    """Whether a file begins as a compiled model does."""
    with opened_plain(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def write_binary(model: NgramModel, path: Path, quantize: int = 0) -> None:
    """Write a model, the whole file or nothing. quantize: bits of each log10 (2 to 16); 0 keeps float32. Raises ValueError."""
    if quantize and not 2 <= quantize <= 16:
        raise ValueError(f"--quantize {quantize} must be 2 to 16 bits, or 0 for float32. Use for example --quantize 8.")
    sections = _sections(model, quantize)
    sections["checksums"] = np.concatenate([checksums(values) for values in sections.values()])
    rows: dict[str, list[Any]] = {}
    offset = 0
    for name, values in sections.items():
        rows[name] = [offset, values.dtype.str, values.size]
        offset += padded(values.nbytes)
    said = {"version": VERSION, "order": model.order, "sections": rows, "xxh3": _digest(*blocks(sections["checksums"]))}
    with whole(path) as file:
        file.write(MAGIC + _header(said))
        for values in sections.values():
            for block in blocks(values):
                file.write(block)


def _digest(*parts: Any) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return str(digest.hexdigest())


def _header(said: dict[str, Any]) -> bytes:
    """Length and JSON; there is one way to write them, so a header with any byte changed is none."""
    text = json.dumps({**said, "crc32": zlib.crc32(json.dumps(said, sort_keys=True).encode())}).encode()
    head = len(MAGIC) + 4
    text = text.ljust(padded(len(text) + head) - head)
    return len(text).to_bytes(4, "little") + text


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
class StoredWords:
    """The words of a compiled file."""

    table: Table
    of_slot: Any
    ends: Any
    """Where each word's letters end."""

    def numbers(self, words: Any) -> Numbers:
        """The number of each word, by the table of hashes; a word that only shares another's hash and differs in length is UNKNOWN."""
        encoded = words.dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        slots = self.table.find(hashes_of(texts))
        found = np.full(slots.size, UNKNOWN, np.uint32)
        known = slots != MISSING
        found[known] = self.of_slot[slots[known]]
        ends = self.ends[found]
        begins = np.where(found > 0, self.ends[np.maximum(found.astype(np.int64) - 1, 0)], 0)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        found[ends - begins != sizes] = UNKNOWN
        return found[encoded.indices.to_numpy(zero_copy_only=False)]


@dataclass(frozen=True)
class _Quantised:
    """Quantised values: an array of indices into a small array of values, indexed like a plain array."""

    numbers: LazyArray
    values: LazyArray

    def __getitem__(self, at: Any) -> Array:
        return self.values[self.numbers[at]]


def open_binary(path: Path, *, verify: bool = False) -> NgramModel:
    """The model of a compiled file. verify: read all and compare checksums, as of every small file.

    Raises BinaryError for another version, a truncated file, or damage, and OSError; of large files also when the model is used.
    """
    file = ModelFile(path)
    said, start = _head(file)
    try:
        counts = _counts(said)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise BinaryError(f"{path} is damaged: its header says what no model has. Compile it again.") from None
    size, end = file.size, start + sum(padded(nbytes) for nbytes in counts.values())
    if size != end:
        how = "is cut short" if size < end else "has more than a model"
        raise BinaryError(f"{path} {how}: it has {size:,} bytes, and by its header {end:,}. Compile it again.")
    sections = _lazy(file, said, counts, start)
    if verify or size <= AT_ONCE:
        for section in sections.values():
            section.verify()

    def numbers(name: str) -> Any:
        values = sections.get(f"{name}_values")
        return sections[name] if values is None else _Quantised(sections[name], values)

    def table(name: str) -> Table:
        keys: Any = sections[name]
        return Table(keys, str(path))

    orders = [
        Order(table(f"{k}.keys") if k > 1 else None, numbers(f"{k}.log10"), numbers(f"{k}.backoff"))
        for k in range(1, said["order"] + 1)
    ]
    return NgramModel(orders, StoredWords(table("word_keys"), sections["word_numbers"], sections["word_ends"]))


def _head(file: ModelFile) -> tuple[dict[str, Any], int]:
    """The header of a file, and the offset where its sections begin."""
    path, begin = file.path, np.empty(min(file.size, len(MAGIC) + 4 + _LONGEST_HEADER), np.uint8)
    file.read(0, begin)
    head, rest = begin[: len(MAGIC) + 4].tobytes(), begin[len(MAGIC) + 4 :]
    length = int.from_bytes(head[len(MAGIC) :], "little")
    text = rest[:length].tobytes()
    if head[: len(MAGIC)] != MAGIC or len(text) != length:
        why = pointer((head + text)[:HEAD_BYTES]) or "it is no compiled n-gram model, or is cut short"
        raise BinaryError(f"{path}: {why}")
    try:
        said = json.loads(text)
        version = said["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BinaryError(f"{path} is damaged: its header cannot be read. Compile it again.") from None
    if version != VERSION:
        raise BinaryError(
            f"{path} is of version {brief(str(version)[:20])}, and this release reads version {VERSION}, all of which has checksums. "
            f"Compile its ARPA file again: megatrain ngram compile M.arpa {path.name}"
        )
    said.pop("crc32", None)
    if _header(said) != head[len(MAGIC) :] + text:
        raise BinaryError(f"{path} is damaged: its header is not as it was written. Compile it again.")
    return said, len(MAGIC) + 4 + length


def _counts(said: dict[str, Any]) -> dict[str, int]:
    """Name -> bytes of each section, in the order of the file. Raises ValueError, TypeError or KeyError unless they are a model's."""
    rows, order = said["sections"], said["order"]
    if not (type(order) is int and order >= 1 and type(said["xxh3"]) is str):
        raise ValueError("order")
    wanted: dict[str, tuple[str, ...]] = {
        "words": ("|u1",),
        "word_ends": _INTEGERS,
        "word_keys": _HASHES,
        "word_numbers": ("<u4",),
    }
    slots = {"word_numbers": "word_keys"}
    tables = ["word_keys"]
    for k in range(1, min(order, len(rows)) + 1):
        if k > 1:
            wanted[f"{k}.keys"] = _HASHES
            tables.append(f"{k}.keys")
        for name in (f"{k}.log10", f"{k}.backoff"):
            quantised = f"{name}_values" in rows
            wanted[name] = _INDICES if quantised else _FLOATS
            if quantised:
                wanted[f"{name}_values"] = _FLOATS
            if k < order or name.endswith("log10"):
                slots[name] = f"{k}.keys" if k > 1 else "word_ends"
    wanted["checksums"] = _HASHES
    if list(rows) != list(wanted):
        raise ValueError("names")
    sizes: dict[str, int] = {}
    for name, dtypes in wanted.items():
        offset, dtype, count = rows[name]
        if dtype not in dtypes or type(count) is not int or not 0 <= count < 1 << 48:
            raise ValueError(name)
        if offset != sum(padded(nbytes) for nbytes in sizes.values()):
            raise ValueError(name)
        sizes[name] = count * np.dtype(dtype).itemsize
    most = sum(block_count(sizes[name]) for name in wanted if name != "checksums")
    powers = all(0 < rows[name][2] <= MOST_SLOTS and rows[name][2] & (rows[name][2] - 1) == 0 for name in tables)
    same = all(rows[name][2] == rows[of][2] for name, of in slots.items())
    if not (powers and same and rows["checksums"][2] == most and rows["word_ends"][2] > END):
        raise ValueError("counts")
    return sizes


def _lazy(file: ModelFile, said: dict[str, Any], sizes: dict[str, int], start: int) -> dict[str, LazyArray]:
    """The sections of a file, but for that of checksums, which is verified. Raises BinaryError."""
    rows = said["sections"]
    kept = np.empty(padded(sizes["checksums"]), np.uint8)
    file.read(start + rows["checksums"][0], kept)
    if _digest(kept.data) != said["xxh3"]:
        raise BinaryError(f"{file.path} is damaged: its checksums are not those that it was written with. Compile it again.")
    sums = kept[: sizes["checksums"]].view(np.uint64)
    found: dict[str, LazyArray] = {}
    first = 0
    for name in list(rows)[:-1]:
        (offset, dtype, count), last = rows[name], first + block_count(sizes[name])
        found[name] = LazyArray(file, name, start + offset, dtype, count, sums[first:last], _wrong(name, rows))
        first = last
    return found


def _wrong(name: str, rows: dict[str, Any]) -> Callable[[Array], npt.NDArray[np.bool_]]:
    """Which values of a section no model has: they would point out of another section, or be no log10 of a probability or weight."""
    kind = name.partition(".")[2] or name
    if rows[name][1] == "<f4":
        highest = 0.0 if kind.startswith("log10") else np.inf
        return lambda values: ~(np.isfinite(values) & (values <= highest))
    if kind == "word_ends":
        return lambda values: (values < 0) | (values > rows["words"][2])
    if kind == "word_numbers" or kind in ("log10", "backoff"):
        most = rows["word_ends" if kind == "word_numbers" else f"{name}_values"][2]
        return lambda values: values >= most
    return lambda values: np.zeros(values.size, bool)
