"""Blends: no corpus drifts from its share, and sample n is found without counting to it."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data.blend import Blend

positive = st.floats(1e-4, 1e4, allow_nan=False)


def worst(blend, weights, steps):
    """Largest distance of a count from its share over the first `steps` samples, exactly, checking each place on the way."""
    shares = [Fraction(repr(float(w))) for w in weights]
    total = sum(shares)
    counts, distance = [0] * len(weights), Fraction(0)
    for n in range(steps):
        corpus, place = blend.place(n)
        assert place == counts[corpus]
        counts[corpus] += 1
        distance = max(distance, *(abs(c - s / total * (n + 1)) for c, s in zip(counts, shares, strict=True)))
    assert counts == blend.counts(steps)
    return distance


@given(positive, positive)
def test_two_corpora_are_never_a_sample_off(a, b):
    blend = Blend([a, b])
    assert worst(blend, [a, b], 200) <= Fraction(1, 2)
    assert blend.bound == 0.5


@given(st.lists(positive, min_size=1, max_size=12))
def test_any_number_of_corpora_stay_within_the_bound(weights):
    blend = Blend(weights)
    assert float(worst(blend, weights, 150)) <= blend.bound + 1e-12
    assert blend.bound < (1 if len(weights) <= 4 else 2)


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=60))
def test_the_bound_is_below_two_for_any_weights(weights):
    assert Blend(weights).bound < 2


@given(st.lists(positive, min_size=1, max_size=8), st.integers(0, 10**15))
def test_far_places_follow_from_the_counts(weights, n):
    blend = Blend(weights)
    before, after = blend.counts(n), blend.counts(n + 1)
    corpus, place = blend.place(n)
    assert place == before[corpus]
    assert [y - x for x, y in zip(before, after, strict=True)] == [int(i == corpus) for i in range(len(weights))]
    total = sum(Fraction(repr(w)) for w in weights)
    assert all(abs(c - Fraction(repr(w)) / total * n) < 2 for c, w in zip(before, weights, strict=True))


def test_only_ratios_matter():
    one, other = Blend([0.7, 0.2, 0.1]), Blend([7, 2, 1])
    assert [one.place(n) for n in range(50)] == [other.place(n) for n in range(50)]


def test_weights_are_read_as_written():
    """0.1 is a tenth: after any multiple of ten samples the counts are exact."""
    blend = Blend([0.1, 0.9])
    assert all(blend.counts(10 * k) == [k, 9 * k] for k in (1, 7, 10**12))


def test_one_corpus_gets_everything():
    assert [Blend([3.0]).place(n) for n in (0, 5)] == [(0, 0), (0, 5)]


@pytest.mark.parametrize("weights", [[1, 0], [1, -2], [float("nan")], [float("inf"), 1]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="it must be greater than 0"):
        Blend(weights)


def test_an_empty_blend_is_refused():
    with pytest.raises(ValueError, match="at least one corpus"):
        Blend([])
