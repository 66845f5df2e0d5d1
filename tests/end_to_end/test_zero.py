"""ZeRO trains to the same numbers as one process, whatever it is combined with; and a world of one changes nothing."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from zero_grid import COVERING, GLOO, POINTS, STEPS, TRIPLES, compare, config_of, reference, shape_of

from megatrain.models.batch import NextToken
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import simulate, spawn
from megatrain.testing.trace import trace_run
from megatrain.training import train_step


def name(point):
    return "-".join(map(str, point)).replace(" ", "")


SIMULATED = [point for point in COVERING if point not in GLOO]
"""The rest runs on gloo processes, which is the harder way; --all simulates it too."""


@pytest.mark.parametrize("point", SIMULATED, ids=name)
def test_simulated_ranks_agree_with_one_process(point):
    compare(simulate(shape_of(point), trace_run, config_of(point), STEPS), point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [*TRIPLES, *GLOO], ids=name)
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
    """To the bit; buckets of another size would add the squares of the norm in another order."""
    point = (stage, ("1f1b", 1, 1), (1, False), 1, 3, True, "none", 10**6)
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


@dataclass(frozen=True)
class NoNumberOn(NextToken):
    """Next token, but at step 1 the loss of one replica is not a number."""

    replica: int
    place: int

    def __call__(self, head, hidden, batch):
        loss = super().__call__(head, hidden, batch)
        bad = batch.step == 1 and self.place == self.replica
        return loss._replace(total=loss.total * math.nan) if bad else loss


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_replica_without_a_number_makes_all_ranks_skip(stage):
    point = (stage, ("1f1b", 1, 2), (1, False), 2, 3, True, "none", 500)

    def rank(ctx):
        kept = []

        def steps(run):
            reports = [train_step(run)]
            before = {name: tensor.clone() for name, (_, tensor) in run.optimizer.tensors()["weights"].items()}
            reports.append(train_step(run))
            after = run.optimizer.tensors()["weights"]
            assert all(torch.equal(before[name], after[name][1]) for name in before)
            reports.append(train_step(run))
            kept.extend(reports)

        trace_run(ctx, config_of(point), 1, objective=NoNumberOn(1, ctx.dp.rank), prepare=steps)
        return [(r.skipped, math.isfinite(r.loss), r.step) for r in kept]

    expected = [(False, True, 1), (True, False, 2), (False, True, 3)]
    assert simulate(shape_of(point), rank) == [expected] * 4
