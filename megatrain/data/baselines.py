"""Baselines from counts of tokens and pairs, to compare a trained model's held-out loss with.

    unigram              p(y)   = (c(y) + 1) / (N + V)
    interpolated bigram  p(y|x) = l c(xy) / c(x) + (1 - l) (c(y) + 1) / (N + V),   l the best of 0.5 .. 0.9 on the held-out text

c counts the N positions that the run trained on: pairs of a token x and the next token y within a sample. V is the vocabulary size. For
a token x that was never seen p(y|x) is the unigram's (l = 0), so that it sums to 1.
Every cross-entropy is in nats per token, over exactly the positions that the model is evaluated on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatrain.data.held_out import HeldOut
from megatrain.data.loader import Samples

MIXTURES = (0.5, 0.6, 0.7, 0.8, 0.9)
CHUNK = 512

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairCounts:
    """Counts over the positions that a run trained on."""

    vocab_size: int
    total: int
    """N, the number of positions trained on."""
    contexts: Ids
    """[V] c(x): number of trained positions whose input is each token."""
    labels: Ids
    """[V] c(y): number of trained positions whose label is each token."""
    pairs: Ids
    """[distinct] x V + y of every pair seen, ascending."""
    pair_counts: Ids
    """[distinct] c(xy)."""


@dataclass(frozen=True)
class Unigram:
    """Entropies of the held-out text by unigrams, nats per token."""

    cross_entropy: float
    """Cross-entropy under the add-one unigram of the training text: what a model without context can reach."""
    own_entropy: float
    """Entropy of the held-out text's own token frequencies: a lower bound for any unigram."""


@dataclass(frozen=True)
class Bigram:
    """Cross-entropy of the held-out text under the interpolated bigram."""

    cross_entropy: float
    """Nats per token."""
    mixture: float
    """The l of MIXTURES with this cross-entropy, the lowest."""


def consumed_rows(samples: Samples, consumed: int) -> Iterator[Ids]:
    """The samples [n, s+1] that a run of `consumed` samples trained on, a chunk at a time."""
    for start in range(0, consumed, CHUNK):
        yield np.stack([samples.sample(n) for n in range(start, min(start + CHUNK, consumed))])


def held_out_pairs(held_out: HeldOut, sequences: int = 0) -> tuple[Ids, Ids]:
    """(x, y), each [positions]: the pairs that evaluation scores in the first `sequences` held-out sequences (0: all)."""
    contexts, labels = [], []
    for n in range(min(len(held_out), sequences) if sequences else len(held_out)):
        tokens, labelled = held_out.sample(n)
        contexts.append(tokens[:labelled])
        labels.append(tokens[1 : labelled + 1])
    return np.concatenate(contexts), np.concatenate(labels)


def count_pairs(rows: Iterable[Ids] | Ids, vocab_size: int) -> PairCounts:
    """Counts of the pairs within samples [n, s+1], given as one array or in chunks. Raises ValueError for ids >= vocab_size."""
    contexts, labels = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    parts: list[tuple[Ids, Ids]] = []
    for chunk in [rows] if isinstance(rows, np.ndarray) else rows:
        if chunk.size and not 0 <= int(chunk.min()) <= int(chunk.max()) < vocab_size:
            raise ValueError(f"a sample has token id {int(chunk.max())}, but the vocabulary has {vocab_size} ids.")
        x, y = chunk[:, :-1].ravel().astype(np.int64), chunk[:, 1:].ravel().astype(np.int64)
        contexts += np.bincount(x, minlength=vocab_size)
        labels += np.bincount(y, minlength=vocab_size)
        parts.append(_distinct(x * vocab_size + y, np.ones(x.size, np.int64)))
        if sum(keys.size for keys, _ in parts[1:]) > parts[0][0].size:  # merging sorts, so merge only when the size has doubled
            parts = [_merged(parts)]
    pairs, pair_counts = _merged(parts)
    return PairCounts(vocab_size, int(labels.sum()), contexts, labels, pairs, pair_counts)


def unigram_entropy(counts: PairCounts, labels: Ids) -> Unigram:
    """Entropies of held-out `labels` [positions] by unigrams."""
    own = np.bincount(labels, minlength=counts.vocab_size)
    share = own[own > 0] / labels.size
    return Unigram(float(-np.log(_unigram(counts, labels)).mean()), float(-(share * np.log(share)).sum()))


def interpolated_bigram(counts: PairCounts, contexts: Ids, labels: Ids, mixtures: Sequence[float] = MIXTURES) -> Bigram:
    """The bigram's cross-entropy on held-out pairs: `contexts` [positions], each followed by `labels` [positions]."""
    pair = contexts * counts.vocab_size + labels
    place = np.minimum(np.searchsorted(counts.pairs, pair), max(counts.pairs.size - 1, 0))
    together = np.where(counts.pairs[place] == pair, counts.pair_counts[place], 0) if counts.pairs.size else np.zeros(pair.size)
    before = counts.contexts[contexts]
    conditional = together / np.maximum(before, 1)
    unigram = _unigram(counts, labels)

    def cross_entropy(mixture: float) -> float:
        weight = np.where(before > 0, mixture, 0.0)
        return float(-np.log(weight * conditional + (1 - weight) * unigram).mean())

    best = min(mixtures, key=cross_entropy)
    return Bigram(cross_entropy(best), best)


def _unigram(counts: PairCounts, labels: Ids) -> npt.NDArray[np.float64]:
    """[positions] the add-one unigram's probability of each label."""
    return np.asarray((counts.labels[labels] + 1) / (counts.total + counts.vocab_size))


def _distinct(keys: Ids, values: Ids) -> tuple[Ids, Ids]:
    """The distinct keys, ascending, with the sums of their values."""
    if not keys.size:
        return keys, values
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return keys[starts], np.add.reduceat(values[order], starts)


def _merged(parts: Sequence[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    """Several lists of distinct keys with their sums, merged into one."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return _distinct(np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts]))
