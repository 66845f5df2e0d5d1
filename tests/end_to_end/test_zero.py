"""ZeRO trains to the same numbers as one process, whatever it is combined with; and a world of one changes nothing."""

from dataclasses import replace

import pytest
import torch
from zero_grid import COVERING, GLOO, POINTS, STEPS, TRIPLES, compare, config_of, reference, shape_of

from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import simulate, spawn
from megatrain.testing.trace import trace_run


def name(point):
    return "-".join(map(str, point)).replace(" ", "")


@pytest.mark.parametrize("point", COVERING, ids=name)
def test_simulated_ranks_agree_with_one_process(point):
    compare(simulate(shape_of(point), trace_run, config_of(point), STEPS), point)


@pytest.mark.slow
@pytest.mark.parametrize("point", TRIPLES, ids=name)
def test_simulated_ranks_agree_in_more_of_the_grid(point):
    compare(simulate(shape_of(point), trace_run, config_of(point), STEPS), point)


@pytest.mark.parametrize("point", GLOO, ids=name)
def test_gloo_processes_agree_with_one_process(point):
    compare(spawn(shape_of(point), trace_run, config_of(point), STEPS), point)


@pytest.mark.parametrize("point", COVERING[::5], ids=name)
def test_simulated_ranks_agree_in_float32(point):
    compare(simulate(shape_of(point), trace_run, config_of(point, "fp32"), STEPS), point, "fp32")


def test_the_covering_set_holds_every_pair():
    for i in range(8):
        for j in range(i):
            assert len({(p[i], p[j]) for p in COVERING}) == len({(p[i], p[j]) for p in POINTS})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_world_of_one_changes_nothing(stage):
    point = (stage, ("1f1b", 1, 1), (1, False), 1, 3, True, "none", 500)
    trace, plain = trace_run(ParallelContext.single(), config_of(point), STEPS), reference(True, "fp64")
    assert trace.losses == plain.losses and trace.grad_norms == plain.grad_norms
    assert all(torch.equal(trace.weights[name], plain.weights[name]) for name in plain.weights)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", [("1f1b", 1, 2), ("zb_h1", 1, 2)], ids=lambda s: s[0])
def test_without_overlap_the_numbers_are_the_same_to_the_bit(stage, schedule):
    point = (stage, schedule, (1, False), 2, 3, True, "none", 500)
    config = config_of(point)
    plain = replace(config, parallel=replace(config.parallel, overlap=False))
    with_overlap, without = (simulate(shape_of(point), trace_run, c, STEPS)[0] for c in (config, plain))
    assert with_overlap.losses == without.losses and with_overlap.grad_norms == without.grad_norms
    assert all(torch.equal(with_overlap.weights[name], without.weights[name]) for name in without.weights)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_in_halves_train_as_whole_ones_do(stage):
    point = (stage, ("zb_h1", 1, 2), (2, True), 2, 3, True, "none", 500)
    whole, halves = (simulate(shape_of(point), trace_run, config_of(point, "bf16", m), STEPS)[0] for m in ("fp32", "split"))
    assert whole.losses == halves.losses and whole.grad_norms == halves.grad_norms
    for name, weight in whole.weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, halves.weights[name])
