"""Deals of samples over a run: weights that change, corpora that end, and runs that go on, to the sample."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.load import from_dict
from megatrain.config.pieces import Weighting
from megatrain.data.blend import Blend
from megatrain.data.blended import BlendedSamples
from megatrain.data.loader import Loader
from megatrain.data.terms import Deal, NothingLeftError, Terms, UsedUpError, endless, restored, state_of, terms_of


def terms(pieces, end, most=None, even=None, **more):
    corpora = len(pieces[0][1])
    weightings = tuple(Weighting(first, weights) for first, weights in pieces)
    return Terms(weightings, end, tuple(most or [None] * corpora), tuple(even or [False] * corpora), **more)


def firsts(deal):
    return [stretch.first for stretch in deal.stretches]


def test_weights_change_at_a_sample():
    deal = Deal(terms([(0, (0.7, 0.3)), (10, (0.0, 1.0))], 20))
    assert deal.counts(10) == (7, 3) and deal.counts(20) == (7, 13)
    assert [deal.place(n) for n in (8, 9, 10, 11, 19)] == [(1, 2), (0, 6), (1, 3), (1, 4), (1, 12)]


def test_without_a_schedule_it_is_the_blend():
    deal, blend = Deal(endless([0.5, 0.3, 0.2])), Blend([0.5, 0.3, 0.2])
    assert [deal.place(n) for n in range(200)] == [blend.place(n) for n in range(200)]
    assert deal.place(10**15) == blend.place(10**15)


def test_a_corpus_leaves_when_it_has_been_seen_often_enough():
    deal = Deal(terms([(0, (1, 1))], 100, most=(None, 20)))
    assert firsts(deal) == [0, 40] and deal.counts(40) == (20, 20) and deal.counts(100) == (80, 20)
    assert [deal.place(n) for n in (38, 39, 40, 41)] == [(0, 19), (1, 19), (0, 20), (0, 21)]


def test_a_corpus_that_has_left_comes_back_in_no_later_piece():
    deal = Deal(terms([(0, (1, 1)), (60, (1, 9))], 100, most=(None, 20)))
    assert deal.counts(100) == (80, 20) and [stretch.shares[1] for stretch in deal.stretches] == [Fraction(1, 2), 0, 0]


def test_epochs_are_spread_over_the_run_and_over_its_pieces():
    deal = Deal(terms([(0, (0.7, 0.3, 0)), (50, (0.3, 0.7, 0))], 100, most=(None, None, 40), even=(False, False, True)))
    assert [deal.counts(n) for n in (25, 50, 75, 100)] == [(11, 4, 10), (21, 9, 20), (25, 20, 30), (30, 30, 40)]
    assert deal.stretches[0].shares == (Fraction(42, 100), Fraction(18, 100), Fraction(40, 100))


def test_epochs_of_all_corpora_set_their_proportions():
    short = Deal(terms([(0, (0, 0))], 30, most=(20, 40), even=(True, True)))
    assert short.counts(30) == (10, 20)
    whole = Deal(terms([(0, (0, 0))], 60, most=(20, 40), even=(True, True)))
    assert whole.counts(60) == (20, 40)
    assert firsts(whole) == [0, 59, 60] and whole.counts(66) == (22, 44), "samples beyond the end, as where some were left out"


def test_corpora_that_end_before_the_run_are_an_error_with_their_counts():
    with pytest.raises(UsedUpError) as raised:
        Deal(terms([(0, (0.5, 0.5))], 100, most=(10, 30)))
    assert (raised.value.sample, raised.value.given) == (40, (10, 30))
    with pytest.raises(UsedUpError) as raised:
        Deal(terms([(0, (1, 1)), (50, (0, 1))], 100, most=(None, 40)))
    assert (raised.value.sample, raised.value.given) == (65, (25, 40))


def test_epochs_that_leave_nothing_to_weights_are_an_error():
    with pytest.raises(NothingLeftError) as raised:
        Deal(terms([(0, (1, 0))], 100, most=(None, 100), even=(False, True)))
    assert raised.value.share == 1


def test_a_run_that_is_over_has_a_deal_nonetheless():
    deal = Deal(terms([(0, (1,))], 100, most=(100,), first=100, before=(100,)))
    assert deal.counts(100) == (100,) and firsts(deal) == [100] and deal.place(101) == (0, 101)


def test_samples_before_the_terms_are_refused():
    with pytest.raises(ValueError, match="sample 9 lies before sample 10, from which on the run has these terms"):
        Deal(terms([(0, (1,))], 100, first=10, before=(4,))).place(9)


# --- any blend ------------------------------------------------------------------------------------------------------------

WEIGHT = st.sampled_from([0.0, 0.0, 0.1, 0.25, 0.7, 1.0, 3.0, 1e-3])


@st.composite
def any_terms(draw):
    """Terms of a run of 160 samples, whose first corpus is endless and always has a share."""
    corpora = draw(st.integers(1, 5))
    places = sorted({0, *draw(st.lists(st.integers(1, 170), max_size=3))})
    pieces = [(first, (draw(st.sampled_from([0.2, 1.0])), *(draw(WEIGHT) for _ in range(corpora - 1)))) for first in places]
    most = (None, *(draw(st.none() | st.integers(1, 25)) for _ in range(corpora - 1)))
    even = tuple(bound is not None and draw(st.booleans()) for bound in most)
    weightings = [(first, tuple(w * (not e) for w, e in zip(weights, even, strict=True))) for first, weights in pieces]
    return terms(weightings, 160, most, even)


@given(any_terms())
@settings(max_examples=60)
def test_every_sample_of_a_corpus_comes_once_in_its_order_and_no_corpus_drifts(of):
    deal, counts = Deal(of), [0] * len(of.most)
    bounds = [Blend([share for share in stretch.shares if share]).bound for stretch in deal.stretches]
    at = -1
    for n in range(160):
        if n in firsts(deal):
            at += 1
            assert tuple(counts) == deal.stretches[at].before == deal.counts(n)
        corpus, place = deal.place(n)
        assert place == counts[corpus]
        counts[corpus] += 1
        stretch, done = deal.stretches[at], n + 1 - deal.stretches[at].first
        for i, share in enumerate(stretch.shares):
            drift = counts[i] - stretch.before[i] - share / sum(stretch.shares) * done
            assert abs(drift) <= bounds[at] + 1e-9 and (share or not drift)
        assert all(most is None or count <= most for most, count in zip(of.most, counts, strict=True))
    assert tuple(counts) == deal.counts(160)
    for count, most, even in zip(counts, of.most, of.even, strict=True):
        assert not even or most - count < 2


class Pairs:
    """Samples of a corpus that are (corpus, number)."""

    samples_per_epoch = tokens_per_sample = 1

    def __init__(self, corpus):
        self.corpus = corpus

    def sample(self, n):
        return np.array([self.corpus, n, 0])


def batch(of, consumed, dp, micro):
    """The samples of a global batch of 12, in their order, as `dp` ranks read them."""
    shares = []
    for rank in range(dp):
        with Loader(BlendedSamples([Pairs(i) for i in range(len(of.most))], of), 12, micro, rank, dp) as loader:
            loader.goes_on = bool
            made = loader.batch(consumed)
            shares += zip(made.places.flat, made.tokens.reshape(-1, 2).tolist(), strict=True)
    return [tuple(pair) for _, pair in sorted(shares)]


@given(any_terms(), st.integers(0, 150), st.sampled_from([(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]))
@settings(max_examples=40)
def test_a_batch_is_a_function_of_the_samples_consumed(of, consumed, layout):
    deal = Deal(restored(json.loads(json.dumps(state_of(of, 16)))))
    assert batch(of, consumed, *layout) == [deal.place(consumed + n) for n in range(12)]


# --- the terms of a config ------------------------------------------------------------------------------------------------


def config(data, **train):
    train = {"steps": 100, "global_batch_size": 8, "micro_batch_size": 1} | train
    if "tokens" in train:
        del train["steps"]
    return from_dict({"model": {"seq_length": 16, "vocab_size": 9}, "data": data, "train": train})


BOTH = [{"path": "w", "weight": 0.7, "max_epochs": 2.5}, {"path": "c", "epochs": 2}]


def test_epochs_become_samples():
    found = terms_of(config({"train": BOTH}), [9, Fraction(7, 2)])
    assert found == terms([(0, (0.7, 0.0))], 800, most=(22, 7), even=(False, True))


def test_epochs_of_less_than_a_sample_are_refused():
    with pytest.raises(
        ValueError, match=r"^data\.train\[0\]\.epochs=0\.2 of w, which is seen once in 3 samples, is less"
    ) as raised:
        terms_of(config({"train": [{"path": "w", "epochs": 0.2}]}), [3])
    assert "Use data.train[0].epochs=0.34 or more." in str(raised.value)
    assert terms_of(config({"train": [{"path": "w", "epochs": 0.34}]}), [3]).most == (1,)


SCHEDULE = {"train": ["a", "b"], "schedule": [{"from_share": 0.75, "weights": {"a": 1, "b": 3}}]}


@pytest.mark.parametrize(
    "train", [{}, {"batch_ramp": [2, 2, 200]}, {"tokens": 10_000}, {"tokens": 9_999, "batch_ramp": [2, 2, 200]}]
)
def test_a_run_that_goes_on_asks_for_the_same(train):
    of = config(SCHEDULE, **train)
    from megatrain.config.budget import budget_of

    whole, budget = terms_of(of, [50, 60]), budget_of(of)
    for step in range(budget.total_steps() + 1):
        consumed = budget.consumed(step)
        for left_out in (0, 24):
            n = consumed + left_out
            before = Deal(whole).counts(n)
            again = terms_of(of, [50, 60], step, consumed, n, before)
            assert whole.agrees(again, n) and again.end == whole.end, (step, left_out)


def test_what_differs_ahead_is_no_agreement():
    of = terms_of(config(SCHEDULE), [50, 60])
    later = {**SCHEDULE, "schedule": [{"from_share": 0.8, "weights": {"a": 1, "b": 3}}]}
    other = terms_of(config(later), [50, 60])
    assert not of.agrees(other, 100) and not of.agrees(other, 620) and of.agrees(other, 700)
    bounded = [{"path": "a", "max_epochs": 3}, "b"]
    longer = [terms_of(config({"train": bounded}, steps=steps), [50, 60]) for steps in (100, 101)]
    assert not longer[0].agrees(longer[1], 0), "epochs hang on the length of the run"
    assert terms_of(config({"train": ["a"]}), [50]).agrees(terms_of(config({"train": ["a"]}, steps=7), [50]), 8)
