"""GPT samples: seq_length + 1 tokens across documents, in an order that is a pure function of (seed, epoch).

An epoch lays all documents end to end in a shuffled order and cuts this line every seq_length tokens; the samples are then visited
in another shuffled order (Megatron's document, sample and shuffle index):

    documents, shuffled   [ doc 7 ............ ][ doc 2 ][ doc 0 ..... ][ doc 5 ...
    samples               |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|   sample i: tokens i s .. i s + s, one shared with i + 1
    visited               2, 0, 3, 1

So every token of an epoch is an input exactly once, except a tail shorter than a sample, which differs from epoch to epoch. A
document longer than a sample continues in the next one. Epochs never end: sample n belongs to epoch n // samples_per_epoch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.data.draws import permutation
from megatrain.data.indexed import TokenStore, TokenStoreError, store_paths
from megatrain.data.left_out import Origin
from megatrain.data.samples.cache import Arrays, cached_arrays, intact

DOCUMENTS, SAMPLES = 1, 2
"""Part of the key of a permutation: of an epoch's documents, of its samples."""
SMALL_INDEX = 1 << 12
"""An index with fewer rows takes less time to compute than to open from files, and is not cached."""
KEPT_EPOCHS = 2
"""Number of epochs whose index is kept: two, as the prefetched batch may be of the next epoch."""


@dataclass(frozen=True)
class EpochIndex:
    """The start of each sample of one epoch."""

    documents: npt.NDArray[np.integer]
    """[D] number in the store of the document at each place of the shuffled line."""
    starts: npt.NDArray[np.int64]
    """[samples, 2] start of each sample: index in `documents`, token within that document."""
    shuffle: npt.NDArray[np.integer]
    """[samples] number of the sample visited at each place of the epoch."""


def build_epoch(document_lengths: npt.NDArray[np.int64], seq_length: int, seed: int, epoch: int) -> Arrays:
    """The arrays of an `EpochIndex`, in whole-array operations. `document_lengths` [D], in tokens."""
    order = permutation(document_lengths.size, seed, epoch, DOCUMENTS)
    line = np.zeros(order.size + 1, np.int64)
    np.cumsum(document_lengths[order], out=line[1:])
    cuts = np.arange((int(line[-1]) - 1) // seq_length, dtype=np.int64) * seq_length
    position = np.searchsorted(line, cuts, side="right") - 1  # "right" steps over empty documents
    shuffle = permutation(cuts.size, seed, epoch, SAMPLES)
    return {
        "documents": order.astype(_index_dtype(order.size)),
        "starts": np.stack([position, cuts - line[position]], axis=1),
        "shuffle": shuffle.astype(_index_dtype(shuffle.size)),
    }


def _index_dtype(count: int) -> np.dtype:
    """int32, or int64 if `count` does not fit it."""
    return np.dtype("<i4") if count <= np.iinfo(np.int32).max else np.dtype("<i8")


class GptSamples:
    """The endless sequence of samples of one store.

    `cache_dir` None means `index_cache` beside the store. `vocab_size` None leaves ids unchecked. Raises TokenStoreError when
    the store has fewer than seq_length + 1 tokens, or an id outside the vocabulary (at once if that is cheap to check, and with a sample).
    """

    def __init__(
        self,
        store: TokenStore,
        seq_length: int,
        seed: int,
        cache_dir: str | Path | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if seq_length < 1:
            raise ValueError(f"model.seq_length={seq_length} must be at least 1.")
        if store.tokens < seq_length + 1:
            raise TokenStoreError(
                f"{store.prefix} holds {store.tokens} tokens, fewer than a sample: model.seq_length + 1 = {seq_length + 1}. "
                f"Add text{f', or set model.seq_length to at most {store.tokens - 1}' if store.tokens > 1 else ''}."
            )
        self.store, self.seq_length, self.seed = store, seq_length, seed
        self.samples_per_epoch = (store.tokens - 1) // seq_length
        self._cache_dir = Path(cache_dir) if cache_dir else Path(store.prefix).parent / "index_cache"
        self._vocab_size = vocab_size
        store.verify_ids(vocab_size)
        self._epochs: OrderedDict[int, EpochIndex] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of a sample, without the one that it shares with the next."""
        return self.seq_length

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Tokens [seq_length + 1] of sample n, counted from the start of training, n >= 0."""
        tokens = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for first, end in self._pieces(n):
            tokens[filled : filled + end - first] = self.store.read(first, end, self._vocab_size)
            filled += end - first
        return tokens

    def document_numbers(self, n: int) -> npt.NDArray[np.int64]:
        """[seq_length + 1] number of each token's document, counted within sample n, ascending."""
        lengths = [end - first for first, end in self._pieces(n)]
        return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)

    def pairs(self, n: int) -> None:
        """None: the samples are text."""

    def pieces(self, n: int) -> list[Origin]:
        """Where the tokens of sample n are."""
        file = str(store_paths(self.store.prefix)[0])
        return [Origin(file, number, first, end - first) for number, first, end in self._documents(n) if end > first]

    def _pieces(self, n: int) -> Iterator[tuple[int, int]]:
        """(first, end) in the store of the part of each document that sample n contains."""
        return ((first, end) for _, first, end in self._documents(n))

    def _documents(self, n: int) -> Iterator[tuple[int, int, int]]:
        """(number, first, end) in the store of each document that sample n contains a part of."""
        epoch, place = divmod(n, self.samples_per_epoch)
        index = self.epoch_index(epoch)
        position, begin = (int(x) for x in index.starts[index.shuffle[place]])
        left = self.seq_length + 1
        while left:
            if position == index.documents.size:
                raise self.store.changed(f"its documents end before sample {n} does")
            number = int(index.documents[position])
            first, end = self.store.document_bounds(number)
            first += begin
            if first > end:
                raise self.store.changed(f"document {index.documents[position]} ends before sample {n}, which begins in it")
            end = min(end, first + left)
            yield number, first, end
            left -= end - first
            position, begin = position + 1, 0

    def epoch_index(self, epoch: int) -> EpochIndex:
        """The index of an epoch: from memory, from the cache, or built."""
        with self._lock:  # the loader's thread and an evaluation may both ask
            if epoch in self._epochs and not all(map(intact, vars(self._epochs[epoch]).values())):
                del self._epochs[epoch]  # somebody has cut a file of the cache
            if epoch not in self._epochs:
                self._epochs[epoch] = EpochIndex(**self._arrays(epoch))
                if len(self._epochs) > KEPT_EPOCHS:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _arrays(self, epoch: int) -> Arrays:
        """The arrays of an epoch's index, from the cache if that saves time."""

        def build() -> Arrays:
            return build_epoch(self.store.document_lengths(), self.seq_length, self.seed, epoch)

        if self.store.documents + self.samples_per_epoch < SMALL_INDEX:
            return build()
        key: dict[str, str | int] = {
            "format": "gpt-samples-1",
            "store": self.store.identity(),
            "seq_length": self.seq_length,
            "seed": self.seed,
            "epoch": epoch,
        }
        return cached_arrays(self._cache_dir, key, ("documents", "starts", "shuffle"), build)
