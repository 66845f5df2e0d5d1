"""The counting baselines against counting by hand."""

from collections import Counter
from itertools import pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data import baselines
from megatrain.data.baselines import consumed_rows, count_pairs, held_out_pairs, interpolated_bigram, unigram_entropy
from megatrain.data.held_out import HeldOut, evaluation_batches
from megatrain.data.indexed import TokenStore, TokenStoreWriter

rows_of = st.integers(1, 6).flatmap(
    lambda s: st.lists(st.lists(st.integers(0, 5), min_size=s + 1, max_size=s + 1), min_size=1, max_size=12)
)


def by_hand(train, pairs, vocab_size):
    """(unigram cross-entropy, own entropy, {l: bigram cross-entropy}) by loops over the formulas."""
    together = Counter((x, y) for row in train for x, y in pairwise(row))
    before = Counter(x for row in train for x in row[:-1])
    after = Counter(y for row in train for y in row[1:])
    total = sum(after.values())

    def unigram(y):
        return (after[y] + 1) / (total + vocab_size)

    def bigram(x, y, mixture):
        if not before[x]:
            return unigram(y)
        return mixture * together[x, y] / before[x] + (1 - mixture) * unigram(y)

    own = Counter(y for _, y in pairs)
    count = len(pairs)
    return (
        -sum(log(unigram(y)) for _, y in pairs) / count,
        -sum(c / count * log(c / count) for c in own.values()),
        {m: -sum(log(bigram(x, y, m)) for x, y in pairs) / count for m in (0.5, 0.6, 0.7, 0.8, 0.9)},
    )


@given(rows_of, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30), st.integers(1, 4))
def test_against_counting_by_hand(train, pairs, chunk):
    array = np.array(train)
    counts = count_pairs((array[i : i + chunk] for i in range(0, len(array), chunk)), 7)
    contexts, labels = (np.array(column) for column in zip(*pairs, strict=True))
    cross, own, mixtures = by_hand(train, pairs, 7)
    unigram = unigram_entropy(counts, labels)
    bigram = interpolated_bigram(counts, contexts, labels)
    assert unigram.cross_entropy == pytest.approx(cross, rel=1e-12)
    assert unigram.own_entropy == pytest.approx(own, rel=1e-12, abs=1e-12)
    assert bigram.cross_entropy == pytest.approx(min(mixtures.values()), rel=1e-12)
    assert mixtures[bigram.mixture] == pytest.approx(bigram.cross_entropy, rel=1e-12)
    whole = count_pairs(array, 7)
    assert (whole.pairs == counts.pairs).all() and (whole.pair_counts == counts.pair_counts).all()


def test_probabilities_sum_to_one():
    counts = count_pairs(np.array([[0, 1, 2, 1], [1, 1, 0, 2]]), 5)
    for context in range(5):
        total = sum(
            np.exp(-interpolated_bigram(counts, np.array([context]), np.array([y]), mixtures=[0.7]).cross_entropy)
            for y in range(5)
        )
        assert total == pytest.approx(1)


def test_nothing_seen_is_the_uniform_distribution():
    counts = count_pairs([], 8)
    labels = np.arange(8)
    assert unigram_entropy(counts, labels).cross_entropy == pytest.approx(log(8))
    assert interpolated_bigram(counts, labels, labels).cross_entropy == pytest.approx(log(8))


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="token id 9, but the vocabulary has 9 ids"):
        count_pairs(np.array([[1, 9]]), 9)


def test_fitted_on_what_the_run_consumed(monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", 4)

    class Numbered:
        def sample(self, n):
            return np.array([n, n + 1, n + 2])

    assert np.concatenate(list(consumed_rows(Numbered(), 10)))[:, 0].tolist() == list(range(10))


def test_scored_where_the_evaluation_scores(tmp_path):
    with TokenStoreWriter(tmp_path / "v", "u2") as writer:
        writer.add_document(range(50))
    held_out = HeldOut([TokenStore(tmp_path / "v")], 8)
    for limit in (0, 1):
        scored = [
            (int(x), int(y))
            for batch in evaluation_batches(held_out, 4, 2, 0, 1, limit)
            for x, y, w in zip(batch.tokens.flat, batch.labels.flat, batch.loss_weights.flat, strict=True)
            if w
        ]
        contexts, labels = held_out_pairs(held_out, sequences=4 * limit)
        assert scored == list(zip(contexts.tolist(), labels.tolist(), strict=True))
