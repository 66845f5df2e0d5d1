r"""Token stores: Megatron's `PREFIX.bin` + `PREFIX.idx`, written and read byte for byte.

`PREFIX.bin` is every token of every sequence back to back, little-endian, no header. `PREFIX.idx` has the places of sequences in it:

    offset            bytes   content
    0                 9       magic b"MMIDIDX\0\0"
    9                 8       <Q version, always 1
    17                1       <B dtype code (1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16)
    18                8       <Q S, number of sequences
    26                8       <Q D, number of documents + 1
    34                4 S     int32 length of each sequence, in tokens
    34 +  4 S         8 S     int64 byte offset of each sequence in .bin
    34 + 12 S         8 D     int64 first sequence of each document, followed by S

(Megatron-LM, `megatron/core/datasets/indexed_dataset.py`.) The arrays start at byte 34 and are therefore not aligned: they are
read through `frombuffer`, never through a cast pointer. A document written here is one sequence; one that is read may be several.

fairseq's index (MMapIndexedDataset, from which Megatron's was made) has no documents: neither D nor the last array, so its arrays start at
byte 26. It is read with every sequence as a document.

Tokens are read from the open file with `pread`, not through a map, and every one that is used is compared with the vocabulary: a file that
is cut, or overwritten, under a run is an error with its name, where a map would end the process with SIGBUS. The index is mapped, since
its arrays are read as wholes by all ranks of a node; its size is asked for before each use.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from megatrain.data.unchanged import Unchanged
from megatrain.files import HEAD_BYTES, OneLine, doing, head_of, make_folder, opened_plain, pointer

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
FAIRSEQ = "   (fairseq's index: a sequence is a document)"
FAIRSEQ_HEADER = struct.Struct("<9sQBQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
OTHER_CODES = {
    6: "floating point, which token ids are not",
    7: "floating point, which token ids are not",
    9: "uint32 of fairseq, which megatrain does not read",
    10: "uint64 of fairseq, which megatrain does not read",
}
"""Dtype codes that other programs write, and why they are refused; 6 and 7 are float32 and float64, in either order."""
VERIFY_AT_OPEN = 1 << 24
"""Stores up to this many tokens have every id checked when they are opened (tens of milliseconds)."""
CHECK_CHUNK = 1 << 22

Tokens = Sequence[int] | npt.NDArray[np.integer]


class TokenStoreError(OneLine, ValueError):
    """A token store that cannot be used; the message names the file, the numbers and what to do."""


def best_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: uint16 for fewer than 65,500 ids, int32 otherwise. Raises ValueError below 1."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} has no token ids; it must be at least 1.")
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def store_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The two files of a store: (PREFIX.bin, PREFIX.idx). Dots inside the prefix are kept."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def record_path(prefix: str | Path) -> Path:
    """The file that records how a store was made (data/store_record.py)."""
    return Path(f"{prefix}.meta.json")


def origins_path(prefix: str | Path) -> Path:
    """The file that records where documents come from (data/origins.py)."""
    return Path(f"{prefix}.documents")


def _fsync_directory(path: Path) -> None:
    """Makes renames inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TokenStoreWriter:
    """Writes a store document by document, and publishes it whole or not at all.

    Tokens go to temporary files beside the target; `publish` syncs them to disk and renames .bin, then .idx, so a store exists
    exactly when its .idx does. As a context manager it publishes on a clean exit, and removes its files on an exception.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            known = ", ".join(d.name for d in DTYPES.values())
            raise TokenStoreError(
                f"{prefix}: a token store cannot hold {self.dtype.name}. Use one of {known} (see best_dtype)."
            )
        self._code = codes[0]
        self._bin, self._idx = store_paths(prefix)
        make_folder(self._bin.parent)
        beside = (record_path(prefix), origins_path(prefix))
        self._temporary = {p: p.with_name(f"{p.name}.tmp.{os.getpid()}") for p in (self._bin, *beside, self._idx)}
        self.record: str | None = None
        """Text of the record of how the store was made, to be written beside it; None for none."""
        self.origins: Iterable[bytes] | None = None
        """Contents of the file that says where its documents come from; None for none."""
        with doing("writing", self._bin):
            self._file = self._temporary[self._bin].open("wb")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self.documents = 0
        self.tokens = 0
        self._closed = 0

    def add_document(self, tokens: Tokens) -> None:
        """Appends one document [length] of ids. Raises TokenStoreError when an id does not fit the dtype."""
        array = np.asarray(tokens)
        self.add_documents(array.astype(self.dtype) if array.size == 0 else array, [array.size])

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: Tokens) -> None:
        """Appends documents of `lengths` [n] (tokens each) whose ids lie back to back in `tokens` [sum of lengths]."""
        self.write(tokens)
        self.end_documents(lengths)

    def write(self, tokens: npt.NDArray[np.integer]) -> None:
        """Appends ids [n] of a document that a later `end_documents` ends: for documents too long for memory."""
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            kind = f"{tokens.dtype}{list(tokens.shape)}"
            raise TokenStoreError(f"{self.prefix}: tokens must be a flat array of integers, not {kind}.")
        narrow = self._narrow(tokens).data
        with doing("writing", self._bin):
            self._file.write(narrow)
        self.tokens += tokens.size

    def end_documents(self, lengths: Tokens) -> None:
        """Divides the tokens written since the last document's end into documents of `lengths` [n]; the rest belongs to the next
        document.
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.size == 0:
            return
        if int(sizes.max()) > np.iinfo(np.int32).max:
            document = self.documents + int(sizes.argmax())
            raise TokenStoreError(
                f"{self.prefix}: document {document} has {int(sizes.max())} tokens; the format counts "
                f"at most {np.iinfo(np.int32).max} a document. Split it."
            )
        if int(sizes.min()) < 0 or self._closed + int(sizes.sum()) > self.tokens:
            raise TokenStoreError(
                f"{self.prefix}: document lengths add up to {int(sizes.sum())}; {self.tokens - self._closed} were written."
            )
        self._lengths.append(sizes.astype("<i4"))
        self.documents += sizes.size
        self._closed += int(sizes.sum())

    def _narrow(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """`tokens` in the store's dtype, contiguous. Raises TokenStoreError for ids that do not fit it."""
        if tokens.dtype != self.dtype and tokens.size:
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                bad = high if high > limits.max else low
                raise TokenStoreError(
                    f"{self.prefix}: token id {bad} does not fit {self.dtype.name} ({limits.min}..{limits.max}). "
                    f"Open the writer with best_dtype(vocab_size)."
                )
        return np.ascontiguousarray(tokens, dtype=self.dtype)

    def publish(self) -> None:
        """Makes the store visible under its name, replacing an older one. Raises OSError (disk full ...), nothing published."""
        if self._closed != self.tokens:
            raise TokenStoreError(
                f"{self.prefix}: the last {self.tokens - self._closed} tokens belong to no document. End it first."
            )
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, "<i4")
        offsets = np.zeros(lengths.size, "<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        with doing("writing", self._bin), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        with doing("writing", self._idx), self._temporary[self._idx].open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, lengths.size, lengths.size + 1))
            for part in (lengths, offsets, np.arange(lengths.size + 1, dtype="<i8")):
                index.write(part.data)
            index.flush()
            os.fsync(index.fileno())
        record = None if self.record is None else (self.record.encode(),)
        beside = {record_path(self.prefix): record, origins_path(self.prefix): self.origins}
        for path, contents in beside.items():
            if contents is not None:
                with doing("writing", path), self._temporary[path].open("wb") as file:
                    file.writelines(contents)
        # An older index must never be beside the new tokens.
        self._idx.unlink(missing_ok=True)
        for path, temporary in self._temporary.items():
            if beside.get(path, ()) is None:
                path.unlink(missing_ok=True)
            else:
                temporary.replace(path)
        _fsync_directory(self._bin.parent)

    def abort(self) -> None:
        """Removes what was written; a published store of the same name stays as it is."""
        with contextlib.suppress(OSError):  # on a full disk closing fails too; the file is removed anyway
            self._file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> TokenStoreWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Publishes, or removes everything when the block (or publishing) failed."""
        if kind is not None:
            self.abort()
            return
        try:
            self.publish()
        except BaseException:
            self.abort()
            raise


class TokenStore:
    """A store, kept open: opening maps and checks the index; tokens are read when they are used.

    `len(store)` is the number of sequences. Raises TokenStoreError when the files are missing, damaged or of another format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = store_paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise TokenStoreError(_missing(self.prefix, path))
        index = _map(self.idx_path)
        self.dtype, start, sequences, document_rows = _read_header(self.idx_path, index)
        self.lengths: npt.NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, start)
        """[S] tokens of each sequence."""
        self.byte_offsets: npt.NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, start + 4 * sequences)
        """[S] byte offset of each sequence in .bin."""
        self.document_indices: npt.NDArray[np.int64] = (
            np.arange(sequences + 1)
            if document_rows is None
            else np.frombuffer(index, "<i8", document_rows, start + 12 * sequences)
        )
        """[documents + 1] first sequence of each document; the last entry is S."""
        self._index = index
        self.documents = self.document_indices.size - 1
        self.without_documents = document_rows is None
        """Whether the index has no documents, as fairseq writes it."""
        with doing("reading", self.bin_path):
            self._file = os.open(self.bin_path, os.O_RDONLY)
            self._index_file = os.open(self.idx_path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        weakref.finalize(self, os.close, self._index_file)
        self._unchanged: Unchanged | None = None
        """Looks whether the files are as they were; from the first read on."""
        self.nbytes = os.fstat(self._file).st_size
        """Bytes of .bin."""
        self._check_index()

    @property
    def tokens(self) -> int:
        """Tokens in the store."""
        return self.nbytes // self.dtype.itemsize

    def __len__(self) -> int:
        return int(self.lengths.size)

    def read(self, first: int, end: int, vocab_size: int | None = None) -> npt.NDArray[np.integer]:
        """Tokens [end - first] of the store, first .. end - 1, in the order of the file and its dtype.

        Raises TokenStoreError, naming file, offset and document, where the file has become shorter, or has a token outside of
        0 .. vocab_size - 1, and naming the file where it was overwritten; OSError where it cannot be read.
        """
        self._require_unchanged()
        tokens = np.empty(end - first, self.dtype)
        room, begin, done = tokens.view(np.uint8).data, first * self.dtype.itemsize, 0
        with doing("reading", self.bin_path):
            while done < len(room) and (got := os.preadv(self._file, [room[done:]], begin + done)):
                done += got
        if done < len(room):
            raise _cut(
                self.bin_path, os.fstat(self._file).st_size, self.nbytes, f"tokens {first} to {end - 1}{self._of(first)}"
            )
        if vocab_size is not None and tokens.size:
            # As unsigned numbers negative ids are huge, so one maximum checks both ends.
            ids = tokens.view(f"<u{self.dtype.itemsize}")
            if int(ids.max()) >= vocab_size:
                self._refuse(first + int(np.argmax(ids >= vocab_size)), int(tokens[np.argmax(ids >= vocab_size)]), vocab_size)
        return tokens

    def sequence(self, i: int) -> npt.NDArray[np.integer]:
        """Tokens [lengths[i]] of sequence i, in the store's dtype. Raises IndexError, and errors as `read` does."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.prefix}: sequence {i} is not in 0..{len(self) - 1}")
        require_whole(self.idx_path, self._index)
        return self.read(*self._within(f"sequence {i}", self._token_offset(i), self._token_offset(i + 1)))

    def document_bounds(self, i: int) -> tuple[int, int]:
        """(first, end): document i is `read(first, end)`. Raises IndexError, and TokenStoreError if the index was changed meanwhile."""
        if not 0 <= i < self.documents:
            raise IndexError(f"{self.prefix}: document {i} is not in 0..{self.documents - 1}")
        require_whole(self.idx_path, self._index)
        ends = (self._token_offset(int(self.document_indices[at])) for at in (i, i + 1))
        return self._within(f"document {i}", *ends)

    def document(self, i: int) -> npt.NDArray[np.integer]:
        """Tokens of document i, all its sequences. Raises IndexError, and errors as `read` does."""
        return self.read(*self.document_bounds(i))

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """[documents] tokens of each document."""
        require_whole(self.idx_path, self._index)
        ends = np.append(self.byte_offsets, self.nbytes)[self.document_indices]
        return np.diff(ends) // self.dtype.itemsize

    def identity(self) -> str:
        """Hash (hex) of the index and the sizes of both files, on which an index of samples depends."""
        require_whole(self.idx_path, self._index)
        digest = hashlib.sha256(self._index)
        digest.update(struct.pack("<QQ", len(self._index), self.nbytes))
        return digest.hexdigest()

    def verify_ids(self, vocab_size: int | None) -> None:
        """Checks every id if that is cheap, so that one outside of the vocabulary is told at the start. Raises TokenStoreError."""
        if vocab_size is not None and self.tokens <= VERIFY_AT_OPEN:
            for start in range(0, self.tokens, CHECK_CHUNK):
                self.read(start, min(start + CHECK_CHUNK, self.tokens), vocab_size)

    def changed(self, what: str) -> TokenStoreError:
        """The error for an index that no longer says what it said when it was opened."""
        return TokenStoreError(
            f"{self.idx_path} was changed while it was in use: {what}. Leave the files of a run as they are."
        )

    def _require_unchanged(self) -> None:
        """Raise TokenStoreError if a file has other contents than at the first read."""
        with doing("reading", self.bin_path):
            if self._unchanged is None:
                self._unchanged = Unchanged({self.bin_path: self._file, self.idx_path: self._index_file})
            path = self._unchanged.overwritten()
        if path is None:
            return
        require_whole(self.idx_path, self._index)
        if (size := os.fstat(self._file).st_size) < self.nbytes:
            raise _cut(self.bin_path, size, self.nbytes, "its end")
        raise TokenStoreError(
            f"{path} was overwritten while it was in use. Go on from a checkpoint with the text that the run began with; a new "
            "version of a store needs a name of its own, or `mv`, which leaves runs that have the old one open alone."
        )

    def _within(self, what: str, first: int, end: int) -> tuple[int, int]:
        """Bounds that the index gives. Raises TokenStoreError unless they lie in the store."""
        if not 0 <= first <= end <= self.tokens:
            raise self.changed(f"{what} is said to be tokens {first} to {end - 1} of {self.tokens}")
        return first, end

    def document_of(self, token: int) -> int:
        """The document that a token belongs to. token: its place in the store. Raises TokenStoreError if the index was cut meanwhile."""
        require_whole(self.idx_path, self._index)
        sequence = int(np.searchsorted(self.byte_offsets, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1

    def _of(self, place: int) -> str:
        return f" of document {self.document_of(place)}"

    def _refuse(self, place: int, token: int, vocab_size: int) -> NoReturn:
        raise TokenStoreError(
            f"{self.bin_path}: token id {token} at token {place} (byte {place * self.dtype.itemsize}){self._of(place)} is outside the "
            f"vocabulary, model.vocab_size={vocab_size} (ids 0..{vocab_size - 1}). Use the tokenizer that made this store, or a larger "
            "model.vocab_size; if the file was good when the run began, it was overwritten: copy it again."
        )

    def _token_offset(self, sequence: int) -> int:
        """Index in `data` at which `sequence` starts; the end of `data` for the sequence after the last."""
        return int(self.byte_offsets[sequence]) // self.dtype.itemsize if sequence < len(self) else self.tokens

    def _check_index(self) -> None:
        """Raises TokenStoreError unless the arrays of the index agree with each other and with the size of .bin."""
        if self.lengths.size and int(self.lengths.min()) < 0:
            bad = int(self.lengths.argmin())
            raise _damaged(self.idx_path, f"sequence {bad} has length {int(self.lengths[bad])}")
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        wrong = np.flatnonzero(self.byte_offsets != np.concatenate([[0], ends[:-1]])[: len(self)])
        if wrong.size:
            bad = int(wrong[0])
            said, right = int(self.byte_offsets[bad]), int(ends[bad - 1]) if bad else 0
            what = f"sequence {bad} is said to start at byte {said} of .bin, but the lengths before it put it at byte {right}"
            raise _damaged(self.idx_path, what)
        edges = self.document_indices
        if int(edges[0]) != 0 or int(edges[-1]) != len(self) or (np.diff(edges) < 0).any():
            found = f"{edges[:3].tolist()} ... {edges[-3:].tolist()}"
            raise _damaged(self.idx_path, f"document boundaries must rise from 0 to {len(self)} sequences; they are {found}")
        needed, size = int(ends[-1]) if ends.size else 0, self.nbytes
        if size != needed:
            if lfs := pointer(head_of(self.bin_path)):
                raise TokenStoreError(f"{self.bin_path}: {lfs}")
            raise TokenStoreError(
                f"{self.bin_path} is {'shorter' if size < needed else 'longer'} than its index says: {size} bytes, but "
                f"{self.idx_path} describes {needed // self.dtype.itemsize} tokens of {self.dtype.name} = {needed} bytes. "
                f"One of the two was truncated or belongs to another store; copy both again or tokenise again."
            )


def _map(path: Path) -> mmap.mmap | bytes:
    """The file as read-only memory; empty bytes for an empty file, which cannot be mapped."""
    with opened_plain(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def require_whole(path: Path, mapped: mmap.mmap | bytes) -> None:
    """Raise TokenStoreError if a mapped file has become shorter than its map: what lies behind its end is no memory (SIGBUS)."""
    if isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped):
        raise _cut(path, mapped.size(), len(mapped), "what follows")


def _cut(path: Path, size: int, was: int, lost: str) -> TokenStoreError:
    """The error for a file that has become shorter since it was opened."""
    return TokenStoreError(
        f"{path} was truncated while it was in use: it has {size} bytes, and had {was}, so that {lost} cannot be read. Copy the store "
        "again; a new version of a store needs a name of its own, or `mv`, which leaves runs that have the old one open alone."
    )


def _missing(prefix: str, path: Path) -> str:
    """The message if the file `path` of a store is missing."""
    hint = f"`megatrain data tokenize --output {prefix}` writes it."
    if prefix.endswith((".bin", ".idx")):
        hint = f"A store is named by its prefix: use {prefix[:-4]}."
    return f"token store {prefix}: there is no file {path}. {hint}"


def _damaged(path: Path, what: str) -> TokenStoreError:
    """The error for an index that contradicts itself."""
    return TokenStoreError(f"{path} is damaged: {what}. Copy the store again or tokenise again.")


def _read_header(path: Path, index: mmap.mmap | bytes) -> tuple[np.dtype, int, int, int | None]:
    """(dtype, offset of the arrays, sequences S, document rows D or None for fairseq's format) of an index whose size agrees with
    them. Raises TokenStoreError."""
    if said := pointer(index[:HEAD_BYTES]):
        raise TokenStoreError(f"{path}: {said}")
    if index[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise TokenStoreError(
            f"{path} is a legacy index (magic TNTIDX), as fairseq and Megatron-LM write it for `lazy` and `cached` datasets. megatrain "
            f"does not read it: fairseq adds 1 to every id there and Megatron-LM does not, which the file does not tell. "
            f"Tokenise the text again with `megatrain data tokenize`."
        )
    if len(index) < FAIRSEQ_HEADER.size:
        raise TokenStoreError(
            f"{path} is truncated: {len(index)} bytes, but the header alone has {HEADER.size}. "
            f"Copy the store again or tokenise again."
        )
    magic, version, code, sequences = FAIRSEQ_HEADER.unpack(index[: FAIRSEQ_HEADER.size])
    if magic != MAGIC:
        raise TokenStoreError(
            f"{path} is not a Megatron index: it starts with {magic!r}, not {MAGIC!r}. Is this the right prefix?"
        )
    if version != VERSION:
        raise TokenStoreError(f"{path} has index version {version}; only version {VERSION} is known. Tokenise the text again.")
    if code not in DTYPES:
        why = OTHER_CODES.get(code, "unknown")
        known = ", ".join(f"{c} {d.name}" for c, d in DTYPES.items())
        raise TokenStoreError(f"{path} has dtype code {code}: {why}. Token stores use {known}. Tokenise the text again.")
    bare = FAIRSEQ_HEADER.size + 12 * sequences
    if len(index) == bare:
        return DTYPES[code], FAIRSEQ_HEADER.size, sequences, None
    if len(index) < HEADER.size:
        raise TokenStoreError(
            f"{path} is truncated: {len(index)} bytes, but {sequences} sequences need {HEADER.size + 12 * sequences} and more (with "
            f"fairseq's header {bare}). Copy the store again or tokenise again."
        )
    *_, document_rows = HEADER.unpack(index[: HEADER.size])
    expected = HEADER.size + 12 * sequences + 8 * document_rows
    if len(index) == expected + sequences and sequences:
        raise TokenStoreError(
            f"{path} holds a mode per sequence (Megatron's multimodal data); megatrain reads text stores only. Tokenise the text alone."
        )
    if len(index) != expected or document_rows < 1:
        state = "truncated" if len(index) < expected else "damaged"
        rows = f"{document_rows} document rows make {expected} (without documents, as fairseq writes it, {bare})"
        if document_rows > len(index):  # fairseq's format: two lengths were read as D
            rows = f"fairseq's header of {FAIRSEQ_HEADER.size} bytes make {bare}"
            state = "truncated" if len(index) < bare else "damaged"
        raise TokenStoreError(
            f"{path} is {state}: {len(index)} bytes, but {sequences} sequences and {rows}. Copy the store again or tokenise again."
        )
    return DTYPES[code], HEADER.size, sequences, document_rows


def describe(prefix: str | Path) -> str:
    """A description of a store's contents (`megatrain data inspect`). Raises TokenStoreError as opening does."""
    store = TokenStore(prefix)
    rows = [
        f"token store {store.prefix}",
        f"  {store.bin_path}: {store.nbytes:,} bytes; {store.idx_path}: {store.idx_path.stat().st_size:,} bytes",
        f"  dtype      {store.dtype.name}",
        f"  documents  {store.documents:,}   sequences  {len(store):,}{store.without_documents * FAIRSEQ}",
        f"  tokens     {store.tokens:,}",
    ]
    if store.tokens:
        lengths = store.document_lengths()
        rows.append(f"  per document: {lengths.min():,} to {lengths.max():,} tokens, median {np.median(lengths):,.0f}")
        pieces = [store.read(at, min(at + CHECK_CHUNK, store.tokens)) for at in range(0, store.tokens, CHECK_CHUNK)]
        ids = [int(piece.min()) for piece in pieces], [int(piece.max()) for piece in pieces]
        rows.append(f"  ids {min(ids[0])} to {max(ids[1])}; the first: {pieces[0][:12].tolist()}")
    return "\n".join(rows)
