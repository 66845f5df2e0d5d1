"""Text files to a token store: one pass, constant memory, the same bytes for any number of workers.

The reading thread cuts the text into batches of about BATCH_CHARACTERS; `workers` threads encode them in the `tokenizers`
library, which releases Python's lock; the results are written in the order of the text, with at most a few batches in flight.
Long documents do not delay others: with a divisible tokenizer (bytes, or GPT-2's kind, as `data tokenizer` trains) they are cut at
places that no token crosses, and their pieces are encoded in parallel. Other tokenizers get each document whole.

Threads, not processes: the work that needs the lock (parsing JSON, turning ids into arrays) is a twentieth of all, so threads keep
about 20 cores busy, start at once and copy nothing between processes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatrain.data.bar import bar
from megatrain.data.boundaries import NONE, TokenizerError, TokenRequest, shown
from megatrain.data.indexed import TokenStoreWriter, best_dtype
from megatrain.data.prepare.read import Lines, TextPiece, read_pieces, total_bytes
from megatrain.data.store_record import record_of
from megatrain.data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 18
BATCHES_PER_WORKER = 3
"""Batches in flight for each worker: one being encoded, one waiting, one done and waiting to be written."""
LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class TokenizeReport:
    """Figures of a call of `tokenize_files`; `str()` of it is a line of text."""

    output: str
    documents: int
    empty: int
    """Number of documents without text, which are left out."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes of text."""
    seconds: float
    around: str = ""
    """The tokens that each document begins and ends with, as text."""

    def __str__(self) -> str:
        rate = self.text_bytes / 1e6 / max(self.seconds, 1e-9)
        empty = f" ({self.empty:,} empty ones left out)" if self.empty else ""
        return (
            f"{self.output}: {self.documents:,} documents{empty}, {self.text_bytes:,} bytes of text, {self.tokens:,} tokens "
            f"in {self.seconds:.1f} s ({rate:.1f} MB/s){self.around}"
        )


@dataclass(frozen=True)
class _Encoded:
    """A batch of pieces as token ids."""

    tokens: npt.NDArray[np.integer]
    """All ids, back to back, document ends included."""
    lengths: npt.NDArray[np.int64]
    """[pieces] number of ids of each piece."""
    last: npt.NDArray[np.bool_]
    """[pieces] whether the piece ends its document."""
    text_bytes: int


def tokenize_files(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    workers: int = 1,
    append_eod: bool = False,
    key: str | Lines = "text",
    eod: TokenRequest = None,
    bos: TokenRequest = None,
) -> TokenizeReport:
    """Writes the documents of `inputs` to the token store `output` (a prefix), one document each, in order.

    `workers` threads encode. `append_eod` ends each document with the tokenizer's separator, `eod` with that token; each begins with
    `bos`, or with the token that the tokenizer puts first (data/boundaries.py). The store's record keeps these tokens. On failure
    nothing is published and no temporary file stays. Raises ReadError, TokenizerError, TokenStoreError, ValueError.
    """
    started = time.monotonic()
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed, e.g. {os.cpu_count() or 1}, the cores of this machine.")
    encoder = load_tokenizer(tokenizer, eod, bos) if isinstance(tokenizer, (str, Path)) else tokenizer
    around = _around(encoder, append_eod, eod)
    if not inputs:
        raise ValueError("there is nothing to tokenise: give --input FILE...")
    size = total_bytes(inputs)

    def encode(pieces: list[_PlacedPiece]) -> _Encoded:
        return _encode(encoder, pieces, around)

    text_bytes = 0
    documents = _Documents()
    with (
        TokenStoreWriter(output, best_dtype(encoder.vocab_size)) as writer,
        bar("tokenize", size, in_bytes=True) as advance,
        _one_thread_a_call(),
        ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool,
    ):
        pieces = read_pieces(inputs, key, encoder.divisible, advance)
        for encoded in _in_order(pool, encode, _batches(pieces), workers * BATCHES_PER_WORKER):
            writer.write(encoded.tokens)
            writer.end_documents(documents.close(encoded))
            text_bytes += encoded.text_bytes
        if not writer.documents:
            raise ValueError(
                f"there is no document in {', '.join(map(str, inputs))}: no store is written. Give files with text."
            )
        writer.record = record_of(encoder, around.end, around.begin, writer.documents, writer.tokens).text()
    seconds = time.monotonic() - started
    return TokenizeReport(str(output), writer.documents, documents.empty, writer.tokens, text_bytes, seconds, around.shown)


class _PlacedPiece(NamedTuple):
    """A piece, and whether it is the first of its document."""

    piece: TextPiece
    first: bool


def _batches(pieces: Iterable[TextPiece]) -> Iterator[list[_PlacedPiece]]:
    """Pieces in batches of about BATCH_CHARACTERS."""
    batch: list[_PlacedPiece] = []
    characters = 0
    first = True
    for piece in pieces:
        batch.append(_PlacedPiece(piece, first))
        first = piece.last
        characters += len(piece.text) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Around:
    """The tokens put around each document."""

    begin: int | None
    end: int | None
    shown: str
    """Both tokens as text, for the report."""


def _around(tokenizer: Tokenizer, append_eod: bool, eod: TokenRequest) -> _Around:
    """The tokens to put around the documents of a store. Raises TokenizerError."""
    ends = (append_eod or eod is not None) and eod != NONE
    end = tokenizer.eod if ends else None
    if append_eod and end is None:
        raise TokenizerError(
            f"--append-eod: no token of {tokenizer.label} is known to end a document. Say which: --eod TOKEN, a name or an id out of "
            f"0..{tokenizer.vocab_size - 1}; or leave the option out."
        )
    begin = tokenizer.beginning.first
    words = [f"begins with {shown(tokenizer, (begin,))}, by {tokenizer.beginning.origin}"] if begin is not None else []
    words += [f"ends in {shown(tokenizer, (end,))}, by {tokenizer.ending.origin}"] if end is not None else []
    return _Around(begin, end, f"; each document {', and '.join(words)}" if words else "")


def _encode(tokenizer: Tokenizer, pieces: list[_PlacedPiece], around: _Around) -> _Encoded:
    """The ids of a batch. A document without text gets no tokens around it, as there is nothing to separate."""
    arrays = tokenizer.encode_batch([place.piece.text for place in pieces])
    last = np.array([place.piece.last for place in pieces])
    for i, (piece, first) in enumerate(pieces):
        begins = first and around.begin is not None and piece.text
        ends = piece.last and around.end is not None and piece.text
        if begins or ends:
            before, behind = ([around.begin] if begins else []), ([around.end] if ends else [])
            arrays[i] = np.concatenate([np.array(before, arrays[i].dtype), arrays[i], np.array(behind, arrays[i].dtype)])
    lengths = np.array([array.size for array in arrays], np.int64)
    texts = (place.piece.text for place in pieces)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return _Encoded(np.concatenate(arrays), lengths, last, text_bytes)


class _Documents:
    """Adds lengths of pieces up to lengths of documents, across batches."""

    def __init__(self) -> None:
        self.empty = 0
        self._open = 0

    def close(self, encoded: _Encoded) -> npt.NDArray[np.int64]:
        """Lengths of the documents that end in this batch, without empty ones."""
        ends = np.cumsum(encoded.lengths)[encoded.last]
        lengths = np.diff(ends, prepend=0)
        if not lengths.size:
            self._open += int(encoded.lengths.sum())
            return lengths
        lengths[0] += self._open
        self._open = int(encoded.lengths.sum() - ends[-1])
        self.empty += int((lengths == 0).sum())
        return lengths[lengths > 0]


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[list[_PlacedPiece]], _Encoded], batches: Iterator[list[_PlacedPiece]], window: int
) -> Iterator[_Encoded]:
    """Results in the order of the batches, at most `window` batches in flight; after an error the waiting batches are dropped."""
    flying: deque[Future[_Encoded]] = deque(pool.submit(work, batch) for batch in islice(batches, window))
    try:
        while flying:
            yield flying.popleft().result()
            flying.extend(pool.submit(work, batch) for batch in islice(batches, 1))
    finally:
        for future in flying:
            future.cancel()


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Prevents the library from starting threads of its own inside each call; it reads this variable at every call."""
    before = os.environ.get(LIBRARY_THREADS)
    os.environ[LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIBRARY_THREADS]
        else:
            os.environ[LIBRARY_THREADS] = before
