"""Texts to a token store as they come: constant memory, the same bytes for any number of workers.

The caller's thread cuts what it adds into batches of about BATCH_CHARACTERS; `workers` threads encode them in a library that releases
Python's lock; the results are written in the order of the text by the caller's thread, with at most a few batches in flight.

Threads, not processes: the work that needs the lock (parsing JSON, turning ids into arrays) is a twentieth of all, so threads keep
about 20 cores busy, start at once and copy nothing between processes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatrain.data.boundaries import TokenizerError, shown
from megatrain.data.indexed import TokenStoreWriter, best_dtype
from megatrain.data.origins import FilePlace, OriginsWriter
from megatrain.data.prepare.read import TextPiece, pieces_of
from megatrain.data.store_record import record_of
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizers.fast_engine import EngineDiffersError, FastTokenizer
from megatrain.data.tokenizers.token_ids import EncodedTexts

BATCH_CHARACTERS = 1 << 18
BATCHES_PER_WORKER = 3
"""Batches in flight for each worker: one being encoded, one waiting, one done and waiting to be written."""
LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class TokenizeReport:
    """Figures of a store that was written; `str()` of it is a line of text."""

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
    engine: str = ""
    """The library that has encoded, and why, as text."""

    def __str__(self) -> str:
        rate = self.text_bytes / 1e6 / max(self.seconds, 1e-9)
        empty = f" ({self.empty:,} empty ones left out)" if self.empty else ""
        return (
            f"{self.output}: {self.documents:,} documents{empty}, {self.text_bytes:,} bytes of text, {self.tokens:,} tokens "
            f"in {self.seconds:.1f} s ({rate:.1f} MB/s){self.around}{self.engine and '; encoded '}{self.engine}"
        )


@dataclass(frozen=True)
class Around:
    """The tokens put around each document."""

    begin: int | None
    end: int | None
    shown: str
    """Both tokens as text, for the report."""


def tokens_around(tokenizer: Tokenizer, append_eod: bool) -> Around:
    """The tokens to put around the documents of a store. Raises TokenizerError."""
    end = tokenizer.eod if append_eod else None
    if append_eod and end is None:
        raise TokenizerError(
            f"--append-eod: no token of {tokenizer.label} is known to end a document. Say which: --eod TOKEN, a name or an id out of "
            f"0..{tokenizer.vocab_size - 1}; or leave the option out."
        )
    begin = tokenizer.beginning.first
    words = [f"begins with {shown(tokenizer, (begin,))}, by {tokenizer.beginning.origin}"] if begin is not None else []
    words += [f"ends in {shown(tokenizer, (end,))}, by {tokenizer.ending.origin}"] if end is not None else []
    return Around(begin, end, f"; each document {', and '.join(words)}" if words else "")


class _Batch:
    """Pieces of documents that are encoded together."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.first: list[bool] = []
        """Whether each piece is the first of its document."""
        self.last: list[bool] = []
        self.origins: list[FilePlace] = []
        """Where the document of each piece comes from."""
        self.files: list[int] = []
        """Numbers of the pieces that begin a file."""
        self.characters = 0


@dataclass(frozen=True)
class _Encoded:
    """A batch of pieces as token ids."""

    tokens: npt.NDArray[np.integer]
    """All ids, back to back, document ends included."""
    lengths: npt.NDArray[np.int64]
    """[pieces] number of ids of each piece."""
    last: npt.NDArray[np.bool_]
    """[pieces] whether the piece ends its document."""
    origins: list[FilePlace]
    text_bytes: int


class TextStoreWriter:
    """Writes documents, added in order, to the token store `prefix`; publishes it whole, on a clean exit, or not at all.

        with TextStoreWriter("data/train", tokenizer, workers=2, append_eod=True) as store:
            store.add_document("a text", FilePlace("a.jsonl", 1, "line"))
        print(store.report)

    `append_eod` ends each document with the tokenizer's separator; each begins with the token that the tokenizer puts first
    (data/boundaries.py). The store's record keeps these tokens, and PREFIX.documents where documents come from. Without any text nothing
    is published, and `documents` is 0. Raises TokenizerError, EngineDiffersError, TokenStoreError, OSError and ValueError, at `add`
    those of batches before.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        workers: int = 1,
        append_eod: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(
                f"--workers {workers}: at least 1 is needed, e.g. {os.cpu_count() or 1}, the cores of this machine."
            )
        self._around = tokens_around(tokenizer, append_eod)
        self._prefix, self._tokenizer, self._workers = str(prefix), tokenizer, workers
        self._batch, self._flying = _Batch(), deque[Future[_Encoded]]()
        self._file: str | None = None
        """The file of the last piece."""
        self._between = True
        """Whether the last piece has ended its document."""
        self._documents, self._origins = _Documents(), OriginsWriter()
        self._text_bytes, self._started = 0, time.monotonic()
        self._writer: TokenStoreWriter
        self._pool: ThreadPoolExecutor
        self._stack = ExitStack()
        self.report: TokenizeReport
        """The figures, once the store is published."""

    @property
    def documents(self) -> int:
        """Documents written; those in flight do not count."""
        return self._writer.documents

    def add_document(self, text: str, origin: FilePlace) -> None:
        """Append a document."""
        for piece in pieces_of(text, origin) if self._tokenizer.divisible else (TextPiece(text, True, origin),):
            self.add(*piece)

    def add(self, text: str, last: bool, origin: FilePlace) -> None:
        """Append a piece of a document, which goes on with the next one unless it is the `last` (data/prepare/read.py)."""
        batch = self._batch
        if origin.file != self._file:
            batch.files.append(len(batch.texts))
            self._file = origin.file
        batch.texts.append(text)
        batch.first.append(self._between)
        batch.last.append(last)
        batch.origins.append(origin)
        self._between = last
        batch.characters += len(text) + 1
        if batch.characters >= BATCH_CHARACTERS:
            if len(self._flying) == self._workers * BATCHES_PER_WORKER:
                self._write(self._flying.popleft().result())
            self._submit()

    def _submit(self) -> None:
        batch, self._batch = self._batch, _Batch()
        self._flying.append(self._pool.submit(_encode, self._tokenizer, batch, self._around))

    def _write(self, encoded: _Encoded) -> None:
        self._writer.write(encoded.tokens)
        lengths, kept = self._documents.close(encoded)
        self._writer.end_documents(lengths)
        for number in np.flatnonzero(kept):
            self._origins.add(encoded.origins[number])
        self._text_bytes += encoded.text_bytes

    def __enter__(self) -> TextStoreWriter:
        """The writer itself."""
        self._writer = TokenStoreWriter(self._prefix, best_dtype(self._tokenizer.vocab_size))
        self._stack.enter_context(_one_thread_a_call())
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._workers, thread_name_prefix="tokenize"))
        self._stack.callback(self._drop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Publish, or remove everything where the block, or publishing, failed."""
        try:
            with self._stack:
                if kind is None:
                    self._flush()
            if kind is None:
                self._publish()
        finally:
            self._writer.abort()  # of what is published, nothing is left to remove

    def _flush(self) -> None:
        """Write all that was added."""
        if self._batch.texts:
            self._submit()
        while self._flying:
            self._write(self._flying.popleft().result())

    def _drop(self) -> None:
        """Drop the batches that wait, after an error."""
        for future in self._flying:
            future.cancel()

    def _publish(self) -> None:
        writer, around = self._writer, self._around
        if writer.documents:
            writer.record = record_of(self._tokenizer, around.end, around.begin, writer.documents, writer.tokens).text()
            writer.origins = self._origins.contents(writer.tokens)
            writer.publish()
        seconds = time.monotonic() - self._started
        counts = (writer.documents, self._documents.empty, writer.tokens, self._text_bytes)
        self.report = TokenizeReport(self._prefix, *counts, seconds, around.shown)


def _encode(tokenizer: Tokenizer, batch: _Batch, around: Around) -> _Encoded:
    """The ids of a batch. A document without text gets no tokens around it, as there is nothing to separate."""
    try:
        if isinstance(tokenizer, FastTokenizer):
            ids, lengths = tokenizer.encode_batch(batch.texts, batch.files)
        else:
            ids, lengths = tokenizer.encode_batch(batch.texts)
    except EngineDiffersError as error:
        raise error if error.text is None else EngineDiffersError(f"{error}, in {batch.origins[error.text]}") from None
    filled, first, last = np.array([bool(text) for text in batch.texts]), np.array(batch.first), np.array(batch.last)
    begins, ends = filled & first & (around.begin is not None), filled & last & (around.end is not None)
    if begins.any() or ends.any():
        ids, lengths = _put_around(ids, lengths, begins, ends, around)
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in batch.texts)
    return _Encoded(ids, lengths, last, list(compress(batch.origins, batch.last)), text_bytes)


def _put_around(
    ids: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.int64],
    begins: npt.NDArray[np.bool_],
    ends: npt.NDArray[np.bool_],
    around: Around,
) -> EncodedTexts:
    """Ids with the tokens around documents put in. begins, ends: [pieces], before and behind which one comes."""
    longer = lengths + begins + ends
    edges = np.cumsum(longer)
    places = (edges - longer)[begins], edges[ends] - 1
    old = np.ones(int(edges[-1]), np.bool_)
    all_ids = np.empty(old.size, ids.dtype)
    for place, token in zip(places, (around.begin, around.end), strict=True):
        old[place] = False
        all_ids[place] = token or 0  # where there is none, there is no place
    all_ids[old] = ids
    return EncodedTexts(all_ids, longer)


class _Documents:
    """Adds lengths of pieces up to lengths of documents, across batches."""

    def __init__(self) -> None:
        self.empty = 0
        self._open = 0

    def close(self, encoded: _Encoded) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(lengths of the documents that end in this batch, without empty ones; which of those that end are not empty)."""
        ends = np.cumsum(encoded.lengths)[encoded.last]
        lengths = np.diff(ends, prepend=0)
        if not lengths.size:
            self._open += int(encoded.lengths.sum())
            return lengths, lengths > 0
        lengths[0] += self._open
        self._open = int(encoded.lengths.sum() - ends[-1])
        kept = lengths > 0
        self.empty += int((~kept).sum())
        return lengths[kept], kept


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Prevents the library from starting threads of its own inside each call; it reads this variable at every call."""
    before = os.environ.get(LIBRARY_THREADS)
    os.environ[LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(LIBRARY_THREADS, None)
        else:
            os.environ[LIBRARY_THREADS] = before
