"""Schedules of whole runs: under any ramp the rate rises to lr in its warm-up, never exceeds it, and falls to min_lr."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatrain.config.budget import Position, budget_of, learning_rate, position, warmup_of, weight_decay
from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate

SHAPES = ("cosine", "linear", "wsd", "constant")


def course(config, began=None):
    """[(learning rate, weight decay, samples before, sequences)] of every update; began: a config of before, and its updates."""

    warmup, rows = warmup_of(config if began is None else began[0]), []
    step, samples = (0, 0) if began is None else (began[1], budget_of(began[0]).consumed(began[1]))
    while step < budget_of(config).total_steps(step, samples):
        at, size = position(config, warmup, step, samples), budget_of(config).batch_size(samples)
        rows.append((learning_rate(config.optim, at), weight_decay(config.optim, at), samples, size))
        step, samples = step + 1, samples + size
    return rows


def config_of(optim, train):
    data = {"train": "store"}
    return from_dict({"model": {"seq_length": 16, "vocab_size": 101}, "data": data, "optim": optim, "train": train})


@settings(deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.integers(0, 40),
    fraction=st.floats(0.05, 1.0),
    full=st.integers(1, 8),
    start=st.integers(1, 8),
    increment=st.integers(1, 4),
    ramp=st.integers(0, 400),
    length=st.one_of(st.integers(2, 60), st.floats(1e3, 2e4)),
)
def test_what_passes_validation_reaches_its_peak_and_its_end(shape, warmup, fraction, full, start, increment, ramp, length):
    """The unit is a step of ten sequences; length: updates, or tokens as a float."""
    optim = {"lr": 1e-2, "min_lr": 1e-3, "lr_schedule": shape, "warmup_steps": warmup, "decay_fraction": fraction}
    train = {"global_batch_size": 4 * full, "micro_batch_size": 4, "batch_ramp": [4 * start, 4 * increment, ramp]}
    train |= {"steps": length} if isinstance(length, int) else {"tokens": length}
    train = train if ramp and start < full else train | {"batch_ramp": None}
    idle = {"constant": {"min_lr", "decay_fraction"}, "wsd": set()}.get(shape, {"decay_fraction"})
    config = config_of({k: v for k, v in optim.items() if k not in idle}, train)
    try:
        validate(config, 1)
    except ConfigError:
        assume(False)
    rows = course(config)
    rates = [rate for rate, *_ in rows]
    assert max(rates) <= 1e-2
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup] == pytest.approx(1e-2) or (shape == "wsd" and fraction == 1.0)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert shape != "wsd" or rates[-1] < 1e-2
    if warmup and isinstance(length, int):
        assert rates[0] == pytest.approx(1e-2 / warmup) and rates[warmup - 1] == pytest.approx(1e-2)
    total = config.train.tokens or config.train.steps
    end = Position(total, total, *_measures(config, warmup))
    assert learning_rate(config.optim, end) == pytest.approx(1e-2 if shape == "constant" else 1e-3)


def _measures(config, warmup):
    """Warm-up, first and full update in the run's unit."""
    if config.train.tokens is None:
        return warmup, 1, 1
    found = warmup_of(config)
    return found.warmup, found.first, found.full


def test_a_ramp_does_not_lengthen_the_warm_up():
    """Its 8 updates take 4, 4, 4, 4, 8, 8, 12, 12 sequences; the peak is reached and not exceeded."""
    optim = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 8}
    ramped = {"global_batch_size": 16, "micro_batch_size": 4, "batch_ramp": [4, 4, 48]}
    rates = [rate for rate, *_ in course(config_of(optim, ramped | {"steps": 20}))]
    assert rates[:9] == pytest.approx([1.25e-3 * n for n in range(1, 9)] + [1e-2])
    assert rates[-1] == pytest.approx(1.153e-3, rel=1e-3)
    rates = [rate for rate, *_ in course(config_of(optim, ramped | {"tokens": 16.0 * 248}))]
    assert len(rates) == 20
    assert rates[:9] == pytest.approx([1e-2 * n / 56 for n in (4, 8, 12, 16, 20, 28, 36, 48)] + [1e-2])


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_another_batch_bends_nothing(batch):
    """Ten updates of 8 sequences, then others: rates by step, or by token where the length is given so."""
    optim = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 8, "weight_decay_end": 0.5}
    before = config_of(optim, {"global_batch_size": 8, "micro_batch_size": 4, "steps": 20})
    after = replace(before, train=replace(before.train, global_batch_size=batch))
    plain, changed = course(before), course(after, (before, 10))
    assert [row[:2] for row in changed] == [row[:2] for row in plain[10:]]
    assert plain[10][0] == pytest.approx(9.397e-3, rel=1e-4) and plain[19][0] == pytest.approx(1.153e-3, rel=1e-3)

    def in_tokens(config):
        return replace(config, train=replace(config.train, tokens=16.0 * 160))

    plain, changed = course(in_tokens(before)), course(in_tokens(after), (in_tokens(before), 10))
    by_samples = {samples: row for *row, samples, _ in plain}
    assert changed[0][:2] == plain[10][:2]
    assert all(row == by_samples[samples] for *row, samples, _ in changed if samples in by_samples)
    assert changed[-1][2] + changed[-1][3] == {4: 160, 16: 160, 32: 176}[batch]  # the update that reaches 160
    assert len(changed) == {4: 20, 16: 5, 32: 3}[batch]
