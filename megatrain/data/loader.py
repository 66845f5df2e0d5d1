"""Batches: a pure function of how many samples were consumed, so that a run resumes from one integer on any layout.

The global batch after `consumed` samples is samples consumed .. consumed + G - 1; the place of a sequence is its number within
the batch. Places are dealt to data-parallel ranks micro-batch by micro-batch:

    G = 8, micro-batch 2, two ranks          rank 0      rank 1
                          micro-batch 0      0 1         2 3
                          micro-batch 1      4 5         6 7

so any data-parallel size trains on the same sequences, and each carries its place, which is what dropout is keyed by.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatrain.config.schema import CorpusConfig
from megatrain.data.blend import Blend
from megatrain.data.indexed import TokenStore, TokenStoreError
from megatrain.data.samples.gpt import GptSamples


class Samples(Protocol):
    """An endless sequence of training samples."""

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Tokens [seq_length + 1] of sample n >= 0."""

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """[seq_length + 1] number of each token's document within sample n, not falling; asked for where documents are isolated."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: m micro-batches of b sequences of s tokens."""

    tokens: npt.NDArray[np.int64]
    """[m, b, s] token ids."""
    labels: npt.NDArray[np.int64]
    """[m, b, s] the id that each position should predict; arbitrary where the weight is 0."""
    loss_weights: npt.NDArray[np.float32]
    """[m, b, s] 0 where a position does not count."""
    positions: npt.NDArray[np.int64]
    """[m, b, s] place of each token in its sequence."""
    places: npt.NDArray[np.int64]
    """[m, b] place of each sequence in the global batch."""
    documents: npt.NDArray[np.int64] | None = None
    """[m, b, s] number of each token's document in its sequence, where documents are isolated from each other."""


def batch_places(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> npt.NDArray[np.int64]:
    """[m, b] the places of the global batch that fall to one data-parallel rank. Raises ValueError when they do not divide."""
    if min(global_batch_size, micro_batch_size, dp_size) < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"train.global_batch_size={global_batch_size}, train.micro_batch_size={micro_batch_size} and the data-parallel "
            f"size {dp_size} must be at least 1, and the data-parallel rank {dp_rank} in 0..size - 1."
        )
    wave = micro_batch_size * dp_size
    if global_batch_size % wave:
        raise ValueError(
            f"train.global_batch_size={global_batch_size} is not a multiple of train.micro_batch_size={micro_batch_size} times "
            f"{dp_size} data-parallel ranks = {wave}. Use {max(global_batch_size // wave, 1) * wave}, or a smaller micro-batch."
        )
    return np.arange(global_batch_size, dtype=np.int64).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]


def _batch(
    rows: npt.NDArray[np.int64],
    loss_weights: npt.NDArray[np.float32],
    positions: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
) -> Batch:
    """A Batch from samples `rows` [m, b, s+1], their label weights [m, b, s], token positions [m, b, s] and places [m, b]."""
    return Batch(np.ascontiguousarray(rows[..., :-1]), np.ascontiguousarray(rows[..., 1:]), loss_weights, positions, places)


def _positions(places: npt.NDArray[np.int64], seq_length: int) -> npt.NDArray[np.int64]:
    """[m, b, s] 0..s-1 in each sequence."""
    return np.broadcast_to(np.arange(seq_length, dtype=np.int64), (*places.shape, seq_length)).copy()


def _isolated(batch: Batch, numbers: npt.NDArray[np.int64]) -> Batch:
    """The batch with its documents, `numbers` [m, b, s + 1], apart from each other."""
    documents, following = numbers[..., :-1], numbers[..., 1:]
    starts = np.diff(documents, axis=-1, prepend=documents[..., :1] - 1) > 0
    first = np.maximum.accumulate(np.where(starts, batch.positions, 0), axis=-1)
    return replace(
        batch,
        positions=batch.positions - first,
        loss_weights=batch.loss_weights * (documents == following),
        documents=np.ascontiguousarray(documents),
    )


class _Pending:
    """A batch being built on a thread of its own; an error waits there until the batch is asked for."""

    def __init__(self, loader: Loader, consumed: int) -> None:
        self.consumed = consumed
        self._loader = loader
        self._batch: Batch | None = None
        self._error: BaseException | None = None
        # A daemon: a read that hangs on a dead file system must not keep a failing run alive.
        self._thread = threading.Thread(target=self._build, name=f"batch after {consumed} samples", daemon=True)
        self._thread.start()

    def _build(self) -> None:
        try:
            self._batch = self._loader.build(self.consumed)
        except BaseException as error:  # raised again in the thread that asks for the batch
            self._error = error

    def wait(self) -> None:
        """Until the thread has ended."""
        self._thread.join()

    def result(self) -> Batch:
        """The batch. Raises what building it raised."""
        self._thread.join()
        if self._batch is None:
            raise self._error or RuntimeError(f"the batch after {self.consumed} samples was never built")
        return self._batch


class Loader:
    """One data-parallel rank's batches, the next one prepared while the caller works on this one.

    `global_batch_size` and `micro_batch_size` count sequences; the first may be a function of the samples consumed.
    isolate_documents: positions count from the start of each document, and its last token, whose label is another document's first,
    does not count. Raises ValueError when sizes do not divide.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int | Callable[[int], int],
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        *,
        isolate_documents: bool = False,
    ) -> None:
        self.samples, self.isolate_documents = samples, isolate_documents
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.batch_size = global_batch_size if callable(global_batch_size) else lambda _: global_batch_size
        self.places(0)  # a size that does not divide is an error at once
        self._pending: _Pending | None = None

    def places(self, consumed: int) -> npt.NDArray[np.int64]:
        """[m, b] this rank's places in the global batch after `consumed` samples."""
        return batch_places(self.batch_size(consumed), self.micro_batch_size, self.dp_rank, self.dp_size)

    def batch(self, consumed: int) -> Batch:
        """The batch after `consumed` samples of the whole run (all ranks), and starts on the one after it.

        Raises TokenStoreError for a token outside the vocabulary, and whatever reading raised, in whichever thread.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending.consumed != consumed:  # the caller jumped: a resume, a rollback
            pending.wait()
            pending = None
        batch = pending.result() if pending is not None else self.build(consumed)
        self._pending = _Pending(self, consumed + self.batch_size(consumed))
        return batch

    def build(self, consumed: int) -> Batch:
        """The batch after `consumed` samples, built in the calling thread."""
        if consumed < 0:
            raise ValueError(f"a run cannot have consumed {consumed} samples")
        places = self.places(consumed)
        rows = np.stack([self.samples.sample(consumed + int(place)) for place in places.flat])
        rows = rows.reshape(*places.shape, -1)
        positions = _positions(places, rows.shape[-1] - 1)
        batch = _batch(rows, np.ones(positions.shape, np.float32), positions, places)
        if not self.isolate_documents:
            return batch
        numbers = np.stack([self.samples.document_numbers(consumed + int(place)) for place in places.flat])
        return _isolated(batch, numbers.reshape(rows.shape))

    def close(self) -> None:
        """Waits for the background thread; the loader can still be used afterwards."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def __enter__(self) -> Loader:
        """The loader itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes."""
        self.close()


class BlendedSamples:
    """The samples of several corpora, mixed by weight."""

    def __init__(self, corpora: Sequence[Samples], weights: Sequence[float]) -> None:
        self.corpora = tuple(corpora)
        self.blend = Blend(weights)

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Tokens [seq_length + 1] of sample n."""
        corpus, place = self.blend.place(n)
        return self.corpora[corpus].sample(place)

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """[seq_length + 1] number of each token's document within sample n."""
        corpus, place = self.blend.place(n)
        return self.corpora[corpus].document_numbers(place)


def build_samples(
    corpora: Sequence[CorpusConfig],
    seq_length: int,
    seed: int,
    cache_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> BlendedSamples:
    """The training samples of `data.train`: opens every store and checks what is cheap to check.

    Raises TokenStoreError (missing or damaged store, too short, ids out of range) and ValueError (no corpora, bad weight).
    """
    if not corpora:
        raise ValueError("data.train is empty: give the prefix of a token store, e.g. data.train=runs/demo/data/train.")
    stores = [TokenStore(corpus.path) for corpus in corpora]
    samples = [GptSamples(store, seq_length, seed, cache_dir, vocab_size) for store in stores]
    return BlendedSamples(samples, [corpus.weight for corpus in corpora])


class HeldOut:
    """Held-out text, each token predicted once and in order: sample i is tokens i s .. i s + s of a store, the last one short.

    Several stores are interleaved in proportion to their sizes, so that an evaluation cut short has seen a part of each; their
    weights play no role. Raises TokenStoreError when there is nothing to predict, or an id lies outside the vocabulary (of a
    large store at the batch).
    """

    def __init__(
        self, stores: Sequence[TokenStore], seq_length: int, vocab_size: int | None = None, isolate_documents: bool = False
    ) -> None:
        self.stores, self.seq_length, self.isolate_documents = tuple(stores), seq_length, isolate_documents
        counts = [max(-(-(store.tokens - 1) // seq_length), 0) for store in stores]
        if not sum(counts):
            names = ", ".join(store.prefix for store in stores) or "data.valid"
            raise TokenStoreError(f"{names}: no held-out store has 2 tokens or more, so there is nothing to predict. Add text.")
        self._checked_vocabs = [None if vocab_size is None or s.verify_ids(vocab_size) else vocab_size for s in stores]
        owner = np.repeat(np.arange(len(counts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((within + 0.5) / np.asarray(counts)[owner], kind="stable")
        self._owner, self._within = owner[order], within[order]
        self._ends = [np.cumsum(store.document_lengths()) for store in self.stores] if isolate_documents else []

    def __len__(self) -> int:
        return int(self._owner.size)

    def sample(self, n: int) -> tuple[npt.NDArray[np.int64], int]:
        """Tokens [seq_length + 1] of sample n, zeros past the end of the text, and how many of its labels are text."""
        corpus, begin = int(self._owner[n]), int(self._within[n]) * self.seq_length
        store, vocab_size = self.stores[corpus], self._checked_vocabs[corpus]
        piece = store.data[begin : begin + self.seq_length + 1]
        if vocab_size is not None:
            store.check_ids(begin, begin + piece.size, vocab_size)
        tokens = np.zeros(self.seq_length + 1, np.int64)
        tokens[: piece.size] = piece
        return tokens, piece.size - 1

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """[seq_length + 1] number of each token's document within sample n; made with isolate_documents."""
        corpus, begin = int(self._owner[n]), int(self._within[n]) * self.seq_length
        return np.searchsorted(self._ends[corpus], np.arange(begin, begin + self.seq_length + 1), side="right")


def build_held_out(
    corpora: Sequence[CorpusConfig], seq_length: int, vocab_size: int | None = None, isolate_documents: bool = False
) -> dict[str, HeldOut]:
    """The held-out text of `data.valid`, by name of the set. Raises TokenStoreError as `HeldOut` and `TokenStore` do."""
    stores: dict[str, list[TokenStore]] = {}
    for corpus in corpora:
        stores.setdefault(corpus.set, []).append(TokenStore(corpus.path))
    return {name: HeldOut(of, seq_length, vocab_size, isolate_documents) for name, of in stores.items()}


def evaluation_batches(
    held_out: HeldOut, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int = 0
) -> Iterator[Batch]:
    """One rank's batches over the held-out text, once and in order, at most `limit` global batches of it (0: all).

    Every rank gets the same number of batches, all of one shape; places past the end carry zeros with loss weight 0. Raises
    ValueError when the sizes do not divide.
    """
    places = batch_places(global_batch_size, micro_batch_size, dp_rank, dp_size)
    positions = _positions(places, held_out.seq_length)
    batches = -(-len(held_out) // global_batch_size)
    for number in range(min(batches, limit) if limit else batches):
        rows = np.zeros((places.size, held_out.seq_length + 1), np.int64)
        numbers = np.zeros_like(rows)
        labelled = np.zeros(places.size, np.int64)
        for row, place in enumerate(places.flat):
            sample = number * global_batch_size + int(place)
            if sample < len(held_out):
                rows[row], labelled[row] = held_out.sample(sample)
                if held_out.isolate_documents:
                    numbers[row] = held_out.document_numbers(sample)
        weights = (positions < labelled.reshape(*places.shape, 1)).astype(np.float32)
        batch = _batch(rows.reshape(*places.shape, -1), weights, positions.copy(), places)
        yield _isolated(batch, numbers.reshape(*places.shape, -1)) if held_out.isolate_documents else batch
