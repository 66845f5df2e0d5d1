"""Held-out text: each token is evaluated once, in order, in batches of one shape on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatrain.config.schema import CorpusConfig
from megatrain.data.indexed import TokenStore, TokenStoreError
from megatrain.data.loader import Batch, batch_of, batch_places, isolated


class Evaluated(Protocol):
    """A validation set: samples to evaluate on."""

    stores: tuple[TokenStore, ...]

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, first: int, places: npt.NDArray[np.int64]) -> Batch:
        """Samples first + places [m, b]; those past the end have loss weight 0."""


class HeldOut:
    """Held-out text, each token predicted once and in order: sample i is tokens i s .. i s + s of a store; the last one is short.

    Several stores are interleaved in proportion to their sizes, so that an evaluation of few batches sees parts of all; corpus weights are
    not used. Raises TokenStoreError when there is nothing to predict, or an id lies outside the vocabulary (at once if that is cheap to
    check, and when a batch is made).
    """

    def __init__(
        self, stores: Sequence[TokenStore], seq_length: int, vocab_size: int | None = None, isolate_documents: bool = False
    ) -> None:
        self.stores, self.seq_length, self.isolate_documents = tuple(stores), seq_length, isolate_documents
        counts = [max(-(-(store.tokens - 1) // seq_length), 0) for store in stores]
        if not sum(counts):
            names = ", ".join(store.prefix for store in stores) or "data.valid"
            raise TokenStoreError(f"{names}: no held-out store has 2 tokens or more, so there is nothing to predict. Add text.")
        self._vocab_size = vocab_size
        for store in stores:
            store.verify_ids(vocab_size)
        owner = np.repeat(np.arange(len(counts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((within + 0.5) / np.asarray(counts)[owner], kind="stable")
        self._owner, self._within = owner[order], within[order]
        self._ends = [np.cumsum(store.document_lengths()) for store in self.stores] if isolate_documents else []

    def __len__(self) -> int:
        return int(self._owner.size)

    def sample(self, n: int) -> tuple[npt.NDArray[np.int64], int]:
        """Tokens [seq_length + 1] of sample n, zeros past the end of the text, and the number of its labels that are text."""
        corpus, begin = int(self._owner[n]), int(self._within[n]) * self.seq_length
        store = self.stores[corpus]
        piece = store.read(begin, min(begin + self.seq_length + 1, store.tokens), self._vocab_size)
        tokens = np.zeros(self.seq_length + 1, np.int64)
        tokens[: piece.size] = piece
        return tokens, piece.size - 1

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """[seq_length + 1] number of each token's document within sample n; only with isolate_documents."""
        corpus, begin = int(self._owner[n]), int(self._within[n]) * self.seq_length
        return np.searchsorted(self._ends[corpus], np.arange(begin, begin + self.seq_length + 1), side="right")

    def batch(self, first: int, places: npt.NDArray[np.int64]) -> Batch:
        """Samples first + places [m, b]; past the end tokens are 0, with loss weight 0."""
        rows = np.zeros((places.size, self.seq_length + 1), np.int64)
        numbers = np.zeros_like(rows)
        labelled = np.zeros(places.size, np.int64)
        for row, place in enumerate(places.flat):
            if first + int(place) < len(self):
                rows[row], labelled[row] = self.sample(first + int(place))
                if self.isolate_documents:
                    numbers[row] = self.document_numbers(first + int(place))
        batch = batch_of(rows.reshape(*places.shape, -1), places, labelled.reshape(places.shape))
        return isolated(batch, numbers.reshape(*places.shape, -1)) if self.isolate_documents else batch


def build_held_out(
    corpora: Sequence[CorpusConfig], seq_length: int, vocab_size: int | None = None, isolate_documents: bool = False
) -> dict[str, HeldOut]:
    """Name of each validation set of `data.valid` -> its held-out text. Raises TokenStoreError as `HeldOut` and `TokenStore` do."""
    stores: dict[str, list[TokenStore]] = {}
    for corpus in corpora:
        stores.setdefault(corpus.set, []).append(TokenStore(corpus.path))
    return {name: HeldOut(of, seq_length, vocab_size, isolate_documents) for name, of in stores.items()}


def evaluation_batches(
    held_out: Evaluated, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int = 0
) -> Iterator[Batch]:
    """One rank's batches over the held-out text, once and in order; at most `limit` global batches (0: all).

    Every rank gets the same number of batches, all of one shape; places past the end have tokens 0 with loss weight 0. Raises ValueError
    when the sizes do not divide.
    """
    places = batch_places(global_batch_size, micro_batch_size, dp_rank, dp_size)
    batches = -(-len(held_out) // global_batch_size)
    for number in range(min(batches, limit) if limit else batches):
        yield held_out.batch(number * global_batch_size, places)
