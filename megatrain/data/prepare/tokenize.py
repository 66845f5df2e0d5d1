"""Text files to a token store: one pass, constant memory, the same bytes for any number of workers.

The reading thread cuts the text into batches of about BATCH_CHARACTERS; `workers` threads encode them in the `tokenizers`
library, which releases Python's lock; the results are written in the order of the text, with at most a few batches in flight.
Long documents do not hold up the others: with a divisible tokenizer (bytes, or GPT-2's kind, as `data tokenizer` trains) they
are cut where no token can reach across, and their pieces are encoded side by side. Other tokenizers get each document whole.

Threads, not processes: what holds the lock (parsing JSON, turning ids into arrays) is a twentieth of the work, so threads keep
about 20 cores busy, start at once and ship nothing.
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

import numpy as np
import numpy.typing as npt

from megatrain.data.bar import bar
from megatrain.data.indexed import TokenStoreWriter, best_dtype
from megatrain.data.prepare.read import Piece, read_pieces, total_bytes
from megatrain.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer

BATCH_CHARACTERS = 1 << 18
BATCHES_PER_WORKER = 3
"""In flight: one being encoded, one waiting, one done and waiting for its turn to be written."""
LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class TokenizeReport:
    """What a run of `tokenize_files` did; `str()` of it is a line for people."""

    output: str
    documents: int
    empty: int
    """Documents without text, which are left out."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes of text."""
    seconds: float

    def __str__(self) -> str:
        rate = self.text_bytes / 1e6 / max(self.seconds, 1e-9)
        empty = f" ({self.empty:,} empty ones left out)" if self.empty else ""
        return (
            f"{self.output}: {self.documents:,} documents{empty}, {self.text_bytes:,} bytes of text, {self.tokens:,} tokens "
            f"in {self.seconds:.1f} s ({rate:.1f} MB/s)"
        )


@dataclass(frozen=True)
class _Encoded:
    """A batch of pieces as ids."""

    tokens: npt.NDArray[np.integer]
    """All ids, back to back, document ends included."""
    lengths: npt.NDArray[np.int64]
    """[pieces] ids of each piece."""
    last: npt.NDArray[np.bool_]
    """[pieces] whether the piece ends its document."""
    text_bytes: int


def tokenize_files(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    workers: int = 1,
    append_eod: bool = False,
    key: str = "text",
) -> TokenizeReport:
    """Writes the documents of `inputs` to the token store `output` (a prefix), one document each, in order.

    `workers` threads encode; `append_eod` ends each document with the tokenizer's separator. On failure nothing is published
    and no temporary file stays. Raises ReadError, TokenizerError, TokenStoreError, ValueError.
    """
    started = time.monotonic()
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed, e.g. {os.cpu_count() or 1}, the cores of this machine.")
    encoder = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
    eod = encoder.eod if append_eod else None
    if append_eod and eod is None:
        raise TokenizerError(f"--append-eod: the tokenizer {tokenizer} has no <|endoftext|> token. Leave the option out.")
    if not inputs:
        raise ValueError("there is nothing to tokenise: give --input FILE...")
    size = total_bytes(inputs)

    def encode(pieces: list[Piece]) -> _Encoded:
        return _encode(encoder, pieces, eod)

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
    seconds = time.monotonic() - started
    return TokenizeReport(str(output), writer.documents, documents.empty, writer.tokens, text_bytes, seconds)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of about BATCH_CHARACTERS."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, pieces: list[Piece], eod: int | None) -> _Encoded:
    """The ids of a batch. A document of no text gets no separator: there is nothing to separate."""
    arrays = tokenizer.encode_batch([piece.text for piece in pieces])
    lengths = np.array([array.size for array in arrays], np.int64)
    last = np.array([piece.last for piece in pieces])
    if eod is not None:
        end = np.array([eod], arrays[0].dtype)
        closing = [i for i, piece in enumerate(pieces) if piece.last and piece.text]
        for i in closing:
            arrays[i] = np.concatenate([arrays[i], end])
        lengths[closing] += 1
    text_bytes = sum(len(piece.text) if piece.text.isascii() else len(piece.text.encode()) for piece in pieces)
    return _Encoded(np.concatenate(arrays), lengths, last, text_bytes)


class _Documents:
    """Adds the lengths of pieces up to lengths of documents, across batches."""

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
    pool: ThreadPoolExecutor, work: Callable[[list[Piece]], _Encoded], batches: Iterator[list[Piece]], window: int
) -> Iterator[_Encoded]:
    """Results in the order of the batches, at most `window` batches in flight; on an error the waiting ones are dropped."""
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
    """Keeps the library from starting threads of its own inside each call; it reads this variable at every call."""
    before = os.environ.get(LIBRARY_THREADS)
    os.environ[LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIBRARY_THREADS]
        else:
            os.environ[LIBRARY_THREADS] = before
