"""Batches as a pure function of the number of samples consumed, so that a run resumes from one integer under any layout.

The global batch after `consumed` samples is samples consumed .. consumed + G - 1; the place of a sequence is its number within
the batch. Places are dealt to data-parallel ranks micro-batch by micro-batch:

    G = 8, micro-batch 2, two ranks          rank 0      rank 1
                          micro-batch 0      0 1         2 3
                          micro-batch 1      4 5         6 7

so any data-parallel size trains on the same sequences, and each carries its place, which dropout masks are a function of.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatrain.config.schema import CorpusConfig
from megatrain.data.batches import Batch, Compose, Samples, batch_places, next_token
from megatrain.data.blend import Blend
from megatrain.data.indexed import TokenStore
from megatrain.data.samples.gpt import GptSamples
from megatrain.data.samples.pairs import PairSamples


class _Pending:
    """A batch being built in a thread of its own; an error is raised when the batch is asked for."""

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
        """Block until the thread has ended."""
        self._thread.join()

    def result(self) -> Batch:
        """The batch. Raises the error that building it raised."""
        self._thread.join()
        if self._batch is None:
            raise self._error or RuntimeError(f"the batch after {self.consumed} samples was never built")
        return self._batch


class Loader:
    """One data-parallel rank's batches; the next one is prepared while the caller works on this one.

    `global_batch_size` and `micro_batch_size` count sequences; the first may be a function of the samples consumed. Raises ValueError when
    sizes do not divide.
    """

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
        """compose: turns samples into batches."""
        self.samples, self.compose = samples, compose
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.batch_size = global_batch_size if callable(global_batch_size) else lambda _: global_batch_size
        self.places(0)  # a size that does not divide is an error at once
        self.waited = 0.0
        """Seconds that the caller waited for the last batch."""
        self._pending: _Pending | None = None

    def places(self, consumed: int) -> npt.NDArray[np.int64]:
        """[m, b] this rank's places in the global batch after `consumed` samples."""
        return batch_places(self.batch_size(consumed), self.micro_batch_size, self.dp_rank, self.dp_size)

    def batch(self, consumed: int) -> Batch:
        """The batch after `consumed` samples of the whole run (all ranks). Then starts to build the next one in a thread.

        Raises TokenStoreError for a token outside the vocabulary, and any error of reading, in whichever thread it happened.
        """
        began = time.perf_counter()
        pending, self._pending = self._pending, None
        if pending is not None and pending.consumed != consumed:  # the caller jumped: a resume, a rollback
            pending.wait()
            pending = None
        batch = pending.result() if pending is not None else self.build(consumed)
        self._pending = _Pending(self, consumed + self.batch_size(consumed))
        self.waited = time.perf_counter() - began
        return batch

    def build(self, consumed: int) -> Batch:
        """The batch after `consumed` samples, built in the calling thread."""
        if consumed < 0:
            raise ValueError(f"a run cannot have consumed {consumed} samples")
        return self.compose(self.samples, consumed, self.places(consumed))

    def close(self) -> None:
        """Waits for the background thread; the loader can still be used afterwards."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def __enter__(self) -> Loader:
        """The loader itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the loader."""
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

    def pairs(self, n: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] | None:
        """Prompts and answers of sample n, if its corpus has them; else None."""
        corpus, place = self.blend.place(n)
        return self.corpora[corpus].pairs(place)


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
    samples: list[Samples] = []
    for corpus in corpora:
        store = TokenStore(corpus.path)
        if corpus.answers is None:
            samples.append(GptSamples(store, seq_length, seed, cache_dir, vocab_size))
        else:
            samples.append(PairSamples(store, TokenStore(corpus.answers), seq_length + 1, seed, vocab_size))
    return BlendedSamples(samples, [corpus.weight for corpus in corpora])
