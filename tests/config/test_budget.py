"""The samples of each update: ramps, token budgets, and what both say about how long a run is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.config.budget import Budget, WarmUp, budget_of, warmup_of, warmup_steps
from megatrain.config.schema import Config, ModelConfig, OptimConfig, TrainConfig


def config(**train):
    return Config(model=ModelConfig(seq_length=10), train=TrainConfig(global_batch_size=16, **train))


def sizes(budget):
    """Of every update."""
    found, consumed = [], 0
    for _ in range(budget.total_steps()):
        found.append(budget.batch_size(consumed))
        consumed += found[-1]
    return found


def test_without_a_ramp_all_updates_are_alike():
    budget = budget_of(config(steps=5))
    assert sizes(budget) == [16] * 5


def test_a_ramp_grows_evenly_over_its_samples():
    budget = budget_of(config(steps=12, batch_ramp=(4, 4, 48)))
    assert sizes(budget) == [4, 4, 4, 4, 8, 8, 12, 12, 16, 16, 16, 16]  # each size for a third of 48 samples, then the full one


def test_a_token_budget_ends_with_the_update_that_reaches_it():
    assert budget_of(config(tokens=1600.0)).total_steps() == 10
    assert budget_of(config(tokens=1601.0)).total_steps() == 11
    assert budget_of(config(tokens=1.0)).total_steps() == 1
    assert sizes(budget_of(config(tokens=500.0, batch_ramp=(4, 4, 48)))) == [4, 4, 4, 4, 8, 8, 12, 12]


def test_a_token_budget_ends_there_whatever_the_batch_was_before():
    budget = budget_of(config(tokens=1600.0))
    assert budget.total_steps(done=10, consumed=80) == 15  # ten updates of 8, then 5 of 16
    assert budget.total_steps(done=4, consumed=128) == 6
    assert budget.total_steps(done=9, consumed=168) == 9  # it is over
    assert budget_of(config(steps=20)).total_steps(done=10, consumed=80) == 20


def test_what_token_budgets_are_measured_by():
    """first and full update, and the warm-up, in tokens of ten a sample."""
    given = OptimConfig(warmup_steps=6)
    assert warmup_of(replace(config(steps=5), optim=given)) == WarmUp(160, 160, 6, 960)
    assert warmup_of(replace(config(steps=5, batch_ramp=(4, 4, 48)), optim=given)) == WarmUp(40, 160, 6, 320)  # 4 4 4 4 8 8


@given(
    full=st.integers(1, 40),
    start=st.integers(1, 40),
    increment=st.integers(1, 50),
    samples=st.integers(0, 400),
    steps=st.integers(0, 60),
)
def test_sums_and_their_inverse(full, start, increment, samples, steps):
    budget = Budget(full, min(start, full), increment, samples, steps)
    each = sizes(budget)
    for done in range(0, steps + 1, 7):
        assert budget.consumed(steps - done, sum(each[:done])) == sum(each)
        assert budget.steps_to(sum(each), sum(each[:done])) == steps - done
    assert budget.consumed(steps) == sum(each)
    assert each == sorted(each)
    assert all(min(start, full) <= size <= full for size in each)
    assert budget.steps_to(sum(each)) == steps
    if steps:
        assert budget.steps_to(sum(each) - each[-1] + 1) == steps
        assert budget.steps_to(sum(each) + 1) == steps + 1


def test_a_ramp_that_jumps_over_the_full_batch_stops_there():
    budget = budget_of(config(steps=4, batch_ramp=(10, 10, 20)))
    assert sizes(budget) == [10, 10, 16, 16]
    assert budget.batch_size(10**9) == pytest.approx(16)


@pytest.mark.parametrize(
    ("train", "optim", "steps"),
    [
        ({"steps": 1}, {}, 0),
        ({"steps": 3}, {}, 0),
        ({"steps": 300}, {}, 30),
        ({"steps": 1000}, {}, 100),
        ({"steps": 50_000}, {}, 100),
        ({"tokens": 16 * 10 * 450.0}, {}, 45),
        ({"steps": 100}, {"lr_schedule": "wsd", "decay_fraction": 0.95}, 5),
        ({"steps": 100}, {"lr_schedule": "wsd", "decay_fraction": 1.0}, 0),
        ({"steps": 3}, {"warmup_steps": 100}, 100),  # validate refuses it
    ],
)
def test_a_warm_up_that_is_not_given_suits_the_length_of_the_run(train, optim, steps):
    assert warmup_steps(replace(config(**train), optim=OptimConfig(**optim))) == steps


@given(
    full=st.integers(1, 40), start=st.integers(1, 40), increment=st.integers(1, 9), ramp=st.integers(0, 500),
    since=st.integers(0, 300), steps=st.integers(0, 60),
)  # fmt: skip
def test_long_ramps_are_counted_as_if_one_by_one(full, start, increment, ramp, since, steps):
    budget, samples = Budget(full, min(start, full), increment, ramp, 10), since
    for _ in range(steps):
        samples += budget.batch_size(samples)
    assert budget.consumed(steps, since) == samples
    if steps:
        assert budget.steps_to(samples, since) == steps and budget.steps_to(samples + 1, since) == steps + 1


def test_a_ramp_over_a_billion_samples_is_counted_at_once():
    budget = Budget(1024, 32, 32, 10**9, 10**8)
    assert budget.batch_size(10**9 - 1) == 992 and budget.batch_size(10**9) == 1024
    assert budget.consumed(10**8) == 99_242_841_728  # of updates of 32, 64 ... 992 and 1024 sequences
