"""Faults patched into the sharding, the optimizer and the schedules are caught, and the tensor or quantity at fault is named."""

import re
from dataclasses import replace

import pytest
import torch
from zero_grid import STEPS, compare, config_of, reference, shape_of

from megatrain.models.gpt import Stack
from megatrain.optim import optimizer
from megatrain.optim.optimizer import Optimizer
from megatrain.parallel import flat as flat_buffers
from megatrain.parallel import param, zero
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import Disagreement, agree, simulate
from megatrain.testing.trace import trace_run

ONE, TWO, ZB = ("1f1b", 1, 1), ("1f1b", 1, 2), ("zb_h1", 1, 2)


def run(stage, schedule=ONE, tp=(1, False), dp=2, tied=True, change=None):
    point = (stage, schedule, tp, dp, 3, tied, "none", 500)
    config = config_of(point)
    config = change(config) if change else config
    compare(simulate(shape_of(point), trace_run, config, STEPS), point)


def caught(monkeypatch, patches, expected, *arguments, error=Disagreement, **keywords):
    """Run unharmed, then with the patches, and hold what is said against `expected`."""
    reference(keywords.get("tied", True), "fp64")
    run(*arguments, **keywords)
    for where, name, fault in patches:
        monkeypatch.setattr(where, name, fault)
    with pytest.raises(error, match=expected):
        run(*arguments, **keywords)


# --- gradients ----------------------------------------------------------------------------------------------------------


def test_a_tied_gradient_summed_twice(monkeypatch):
    real = FlatParameters._sum_tied
    twice = lambda self: (real(self), real(self))  # noqa: E731
    caught(monkeypatch, [(FlatParameters, "_sum_tied", twice)], r"gradient of step 0: embedding\.tokens", 1, TWO)


def test_a_bucket_that_is_not_reduced(monkeypatch):
    real = FlatParameters._start_reduction

    def forget_one(self, held, last):
        if "layers.2.mlp.down.weight" in {p.spec.name for p in held.bucket.parameters}:
            held.reduced = True
        else:
            real(self, held, last)

    expected = r"gradient of step 0: layers\.2\.mlp\.down\.weight"
    caught(monkeypatch, [(FlatParameters, "_start_reduction", forget_one)], expected, 1)


def test_gradients_averaged_over_the_replicas_instead_of_summed(monkeypatch):
    real = Axis.start_all_reduce

    def mean(axis, x):
        made = real(axis, x)
        if axis.name == "dp_cp":
            made[1].wait()
            x.div_(axis.size)
        return made

    caught(monkeypatch, [(Axis, "start_all_reduce", mean)], r"gradient of step 0: embedding\.tokens", 0)


def test_micro_batches_that_replace_each_other_at_stage_2(monkeypatch):
    def land(self, flying):
        while len(self._flying) > flying:
            held, grads, reducing, *_ = self._flying.pop(0)
            reducing.wait()
            held.own_grads.copy_(grads[held.own])
            self._pool.give(grads)

    caught(monkeypatch, [(FlatParameters, "_land", land)], "gradient of step 0: embedding", 2)


def test_a_reduction_before_the_last_weight_gradient(monkeypatch):
    real = Schedule.program

    def first_is_last(self, stage):
        program = [i._replace(last=False) for i in real(self, stage)]
        first = next(n for n, i in enumerate(program) if i.frees)
        program[first] = program[first]._replace(last=True)
        return program

    expected = r"a gradient for the bucket of [\w., ]+ \.\.\. came after it was reduced"
    caught(monkeypatch, [(Schedule, "program", first_is_last)], expected, 1, ZB, error=ValueError)


def test_a_missing_sum_over_the_ranks_of_a_sequence(monkeypatch):
    expected = r"gradient of step 0: ([\w.]*norm\.(weight|bias)|embedding\.positions|[\w.]+\.bias)"
    caught(monkeypatch, [(zero, "_sum_partial", lambda segments, ctx: None)], expected, 3, ONE, (2, True))


# --- weights and states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stale_parameter_that_is_not_gathered_again(monkeypatch, stage):
    caught(monkeypatch, [(FlatParameters, "publish", lambda self, held: None)], "step 1, loss", stage)


def test_a_stale_parameter_that_is_not_let_go_at_stage_3(monkeypatch):
    caught(monkeypatch, [(FlatParameters, "_let_go", lambda self, mine: None)], "step 1, loss", 3)


def test_a_bucket_gathered_one_element_off(monkeypatch):
    real = FlatParameters.publish

    def off_by_one(self, held):
        real(self, held)
        self._fetch([held])
        held.weights.copy_(held.weights.roll(1))

    caught(monkeypatch, [(FlatParameters, "publish", off_by_one)], "step 1, loss", 1)


def test_a_shard_of_the_masters_updated_twice(monkeypatch):
    real = Optimizer._update

    def twice_on_one(self, index, rates, decay):
        real(self, index, rates, decay)
        names = [p.spec.name for p in self.flat.trained[index].bucket.parameters]
        if "layers.1.mlp.up.weight" in names and self.flat.ctx.shards.rank == 1 and float(self.updates) == STEPS:
            real(self, index, rates, decay)

    caught(monkeypatch, [(Optimizer, "_update", twice_on_one)], r"weight after step 1: layers\.1\.[\w.]+\.weight\[", 1)


def test_weight_decay_on_norms(monkeypatch):
    """BLOOM's embedding norm got into the group with weight decay."""
    point = (1, ONE, (1, False), 2, 3, True, "none", 500)
    alone = trace_run(ParallelContext.single(), config_of((0, ONE, (1, False), 1, *point[4:])), 1)
    ranks = lambda: simulate(shape_of(point), trace_run, config_of(point), 1)  # noqa: E731
    agree(alone, ranks()[0])
    monkeypatch.setattr(Optimizer, "step", with_decay_everywhere(Optimizer.step, monkeypatch))
    with pytest.raises(Disagreement, match=r"weight after step 0: [\w.]*norm\.weight"):
        agree(alone, ranks()[0])


def with_decay_everywhere(real, monkeypatch):
    def step(self, *given):
        with monkeypatch.context() as patch:
            patch.setattr(flat_buffers.Bucket, "decay", True)
            real(self, *given)

    return step


# --- norm, clipping, scale --------------------------------------------------------------------------------------------------


def test_the_norm_counts_replicated_keys_and_values_twice(monkeypatch):
    four = (4, False)
    grouped = lambda config: replace(config, model=replace(config.model, num_query_groups=2))  # noqa: E731
    real = param.ParamSpec.owned

    def owned(self, ctx):
        return True if re.search(r"\.(key|value)\.", self.name) else real(self, ctx)

    def on_four(stage):
        point = (stage, ONE, four, 1, 3, True, "none", 500)
        compare(simulate(shape_of(point), trace_run, grouped(config_of(point)), STEPS), point)

    reference(True, "fp64")
    on_four(1)
    with monkeypatch.context() as patch:
        patch.setattr("megatrain.training.local_squared_norm", doubly_counting(owned))
        with pytest.raises(Disagreement, match="step 0, grad_norm"):
            on_four(1)


def doubly_counting(owned):
    def norm(flat, ctx):
        squares = [s.gradient.double().square().sum() * float(owned(s.parameter.spec, ctx)) for s in flat.owned]
        return torch.stack(squares).sum()

    return norm


def test_shards_left_out_of_the_norm(monkeypatch):
    reference(True, "fp64")
    run(2)

    def norm(flat, ctx):
        with monkeypatch.context() as patch:
            patch.setattr(flat, "owned", flat.owned if ctx.shards.rank == 0 else [])
            return optimizer.local_squared_norm(flat, ctx)

    monkeypatch.setattr("megatrain.training.local_squared_norm", norm)
    with pytest.raises(Disagreement, match="step 0, grad_norm"):
        run(2)


def test_clipping_skipped_on_one_replica(monkeypatch):
    real = Optimizer.step

    def unclipped(self, lr, divisor, *rest):
        real(self, lr, torch.ones_like(divisor) if self.flat.ctx.shards.rank == 1 else divisor, *rest)

    sharp = lambda config: replace(config, optim=replace(config.optim, clip_grad=0.1))  # noqa: E731
    point = (1, ONE, (1, False), 2, 3, True, "none", 500)
    alone = (0, ONE, (1, False), 1, 3, True, "none", 10**6)
    lone = trace_run(ParallelContext.single(), sharp(config_of(alone)), STEPS)
    ranks = lambda: simulate(shape_of(point), trace_run, sharp(config_of(point)), STEPS)  # noqa: E731
    agree(lone, ranks()[0])
    monkeypatch.setattr(Optimizer, "step", unclipped)
    with pytest.raises(Disagreement, match=r"state \(exp_avg\)|step 1, (loss|grad_norm)|weight after"):
        agree(lone, ranks()[0])


# --- pipeline -----------------------------------------------------------------------------------------------------------


def test_a_dropped_layer(monkeypatch):
    real = Stack.__init__
    short = lambda self, layers, *given: real(self, layers[:-1] if 2 in layers else layers, *given)  # noqa: E731
    caught(monkeypatch, [(Stack, "__init__", short)], r"num_layers=5|built 4 layers", 1, TWO, error=ValueError)


def test_a_layer_that_is_built_and_not_run(monkeypatch):
    real = Stack.forward

    def without_the_last(self, x, batch, caches=None):
        blocks = self.blocks
        self.blocks = blocks[:-1]
        try:
            return real(self, x, batch, caches)
        finally:
            self.blocks = blocks

    caught(monkeypatch, [(Stack, "forward", without_the_last)], "step 0, loss", 1, TWO)
