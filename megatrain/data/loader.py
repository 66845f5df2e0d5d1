"""Batches as a pure function of the number of samples consumed, so that a run resumes from one integer under any layout.

The global batch after `consumed` samples is samples consumed .. consumed + G - 1; the place of a sequence is its number within
the batch. Places are dealt to data-parallel ranks micro-batch by micro-batch:

    G = 8, micro-batch 2, two ranks          rank 0      rank 1
                          micro-batch 0      0 1         2 3
                          micro-batch 1      4 5         6 7

so any data-parallel size trains on the same sequences, and each carries its place, which dropout masks are a function of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatrain.data.ahead import Ahead

Ints = npt.NDArray[np.int64]


class Samples(Protocol):
    """An endless sequence of training samples."""

    def sample(self, n: int) -> Ints:
        """Tokens [seq_length + 1] of sample n >= 0."""

    def document_numbers(self, n: int) -> Ints:
        """[seq_length + 1] number of each token's document within sample n, not decreasing; used where documents are isolated."""

    def pairs(self, n: int) -> list[tuple[Ints, Ints]] | None:
        """(prompt, answer) pairs if sample n consists of those; None if it is text."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: m micro-batches of b sequences of s tokens."""

    tokens: Ints
    """[m, b, s] token ids."""
    labels: Ints
    """[m, b, s] the id that each position predicts; arbitrary where the weight is 0."""
    loss_weights: npt.NDArray[np.float32]
    """[m, b, s] weight of each position in the loss; 0 where it does not count."""
    positions: Ints
    """[m, b, s] place of each token in its sequence."""
    places: Ints
    """[m, b] place of each sequence in the global batch."""
    documents: Ints | None = None
    """[m, b, s] number of each token's document in its sequence; None unless documents are isolated from each other."""
    block_positions: Ints | None = None
    """[m, b, s] second position: place within the text of a blank, from 1; 0 in part A."""
    prefix: Ints | None = None
    """[m, b] number of first tokens that all see. With documents [m, b, s]: for each token the place after those of its document."""
    kinds: Ints | None = None
    """[m, b] number of the objective that each sequence is for."""


Compose = Callable[[Samples, int, Ints], Batch]
"""Function: (samples, consumed, places [m, b]) -> the batch of samples consumed + places."""


def next_token(samples: Samples, consumed: int, places: Ints) -> Batch:
    """A batch in which every position predicts the next token."""
    return batch_of(_rows(samples.sample, consumed, places), places)


def isolated_documents(samples: Samples, consumed: int, places: Ints) -> Batch:
    """As `next_token`, but documents do not see each other, and no position predicts across documents."""
    return isolated(next_token(samples, consumed, places), _rows(samples.document_numbers, consumed, places))


def _rows(read: Callable[[int], Ints], consumed: int, places: Ints) -> Ints:
    """[m, b, n] `read(consumed + place)` for every place [m, b]."""
    return np.stack([read(consumed + int(place)) for place in places.flat]).reshape(*places.shape, -1)


def batch_of(rows: Ints, places: Ints, labelled: Ints | None = None) -> Batch:
    """The batch of samples `rows` [m, b, s + 1] at places [m, b]: each token predicts the next.

    labelled: [m, b] number of first labels that count in each sequence; None: all of them.
    """
    tokens, labels = np.ascontiguousarray(rows[..., :-1]), np.ascontiguousarray(rows[..., 1:])
    positions = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape).copy()
    counted = tokens.shape[-1] if labelled is None else labelled[..., None]
    return Batch(tokens, labels, (positions < counted).astype(np.float32), positions, places)


def isolated(batch: Batch, numbers: Ints) -> Batch:
    """The batch with its documents, numbered by `numbers` [m, b, s + 1], isolated from each other."""
    documents, following = numbers[..., :-1], numbers[..., 1:]
    starts = np.diff(documents, axis=-1, prepend=documents[..., :1] - 1) > 0
    first = np.maximum.accumulate(np.where(starts, batch.positions, 0), axis=-1)
    weights, positions = batch.loss_weights * (documents == following), batch.positions - first
    return replace(batch, positions=positions, loss_weights=weights, documents=np.ascontiguousarray(documents))


def batch_places(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Ints:
    """[m, b] one data-parallel rank's places in the global batch. Raises ValueError when the sizes do not divide."""
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


class Loader(AbstractContextManager["Loader"]):
    """One data-parallel rank's batches; the next one is prepared while the caller works on this one."""

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int | Callable[[int], int],
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        *,
        compose: Compose = next_token,
    ) -> None:
        """Sizes count sequences; that of the global batch may be a function of the samples consumed.

        Raises ValueError when sizes do not divide.
        """
        self.samples, self.compose = samples, compose
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.batch_size = global_batch_size if callable(global_batch_size) else lambda _: global_batch_size
        self.places(0)  # a size that does not divide is an error at once
        self.waited = 0.0
        """Seconds that the caller waited for the last batch."""
        self.thread: int | None = None
        """The thread that builds the batch which the caller waits for; None: the caller's own."""
        self.goes_on: Callable[[], bool] = lambda: True
        """Whether a batch is to follow that which is asked for."""
        self._next: tuple[int, Ahead[Batch]] | None = None
        """The batch being built in a thread, and the samples consumed before it."""

    def places(self, consumed: int) -> Ints:
        """[m, b] this rank's places in the global batch after `consumed` samples."""
        return batch_places(self.batch_size(consumed), self.micro_batch_size, self.dp_rank, self.dp_size)

    def batch(self, consumed: int) -> Batch:
        """The batch after `consumed` samples of the whole run (all ranks). Then starts to build the next one, if it goes on.

        Raises TokenStoreError for a token outside the vocabulary, and any error of reading, in whichever thread it happened.
        """
        began = time.perf_counter()
        if self._next is not None and self._next[0] != consumed:  # the caller jumped: a resume, a rollback
            self.settle()
        coming, self._next = self._next, None
        self.thread = None if coming is None else coming[1].ident
        batch = self.build(consumed) if coming is None else coming[1].result()
        if self.goes_on():
            following = consumed + self.batch_size(consumed)
            self._next = following, Ahead(f"batch after {following} samples", partial(self.build, following))
        self.waited = time.perf_counter() - began
        return batch

    def build(self, consumed: int) -> Batch:
        """The batch after `consumed` samples, built in the calling thread."""
        if consumed < 0:
            raise ValueError(f"a run cannot have consumed {consumed} samples")
        return self.compose(self.samples, consumed, self.places(consumed))

    def settle(self) -> None:
        """Wait for the background thread, and drop its batch."""
        if self._next is not None:
            self._next[1].wait()
            self._next = None

    def close(self) -> None:
        """Drop the next batch, without waiting for its reads; the loader can still be used afterwards."""
        self._next = None

    def __exit__(self, *_error: object) -> None:
        self.close()
