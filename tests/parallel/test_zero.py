"""What each ZeRO stage keeps, opens, gathers and lets go; exact bytes; frozen parameters; gradients that come too late."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from thinned import thinned
from torch import nn
from zero_grid import config_of, shape_of

from megatrain.config.schema import OptimConfig
from megatrain.optim.optimizer import Optimizer
from megatrain.parallel.flat import ALIGNMENT, Unit
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.parallel.zero import FlatParameters
from megatrain.plan.memory import state_bytes
from megatrain.runtime.flops import parameter_count
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run
from megatrain.training import train_step

SINGLE = ParallelContext.single()
ONE = (0, ("1f1b", 1, 1), (1, False), 2, 3, True, "none", 500)


def point(stage, **changes):
    names = ("stage", "schedule", "tp", "dp", "micro_batches", "tied", "recompute", "bucket_size")
    values = dict(zip(names, ONE, strict=True)) | {"stage": stage} | changes
    return tuple(values[name] for name in names)


def on_ranks(where, use, precision="fp64", **options):
    """use(run) on every rank, before the first step."""

    def rank(ctx):
        found = []
        trace_run(ctx, config_of(where, precision, **options), 2, prepare=lambda run: found.append(use(run)))
        return found[0]

    return simulate(shape_of(where), rank)


# --- flat buffers -------------------------------------------------------------------------------------------------------


def test_flat_buffers_are_what_the_parameters_see():
    made = [
        Parameter(torch.ones(3, 2), ParamSpec("q", (3, 2))),
        Parameter(torch.full((1, 2), 2.0), ParamSpec("k", (1, 2)), follows=True),
        Parameter(torch.full((4,), 3.0), ParamSpec("frozen", (4,), trainable=False)),
        Parameter(torch.full((5,), 4.0), ParamSpec("norm", (5,), decay=False)),
    ]
    flat = FlatParameters([Unit(tuple(made))], SINGLE)
    assert flat.weights[:8].tolist() == [1.0] * 6 + [2.0] * 2 and flat.weights[ALIGNMENT] == 4
    assert flat.weights[2 * ALIGNMENT :].tolist() == [3.0] * 4 + [0.0] * (ALIGNMENT - 4)
    assert flat.grads.numel() == 2 * ALIGNMENT
    assert made[2].main_grad is None and not made[2].requires_grad
    flat.weights[6] = 9
    flat.grads[ALIGNMENT] = 5
    assert made[1][0, 0] == 9 and made[3].main_grad[0] == 5
    (made[3] * 2).sum().backward()
    assert made[3].grad is None and made[3].main_grad.tolist() == [7, 2, 2, 2, 2]


def test_there_must_be_something_to_train():
    frozen = Parameter(torch.ones(2), ParamSpec("w", (2,), trainable=False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatParameters([Unit((frozen,))], SINGLE)


# --- bytes --------------------------------------------------------------------------------------------------------------


def measured(run):
    run.flat.settle()
    distinct = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept_tensors(run)}
    said = {**run.flat.nbytes(), "optimizer": run.optimizer.nbytes}
    return said, sum(distinct.values()), sum(b.bucket.size for b in run.flat.buckets)


def kept_tensors(run):
    """Every tensor that a run keeps between steps: what parameters and the optimizer refer to."""
    for p in run.flat.parameters:
        yield from (p.detach(), p._main_grad) if p._main_grad is not None else (p.detach(),)
    for held, masters in zip(run.flat.trained, run.optimizer.masters, strict=True):
        yield from (t for t in (held.own_weights, held.own_grads, masters.masters, masters.low) if t is not None)
    for states in run.optimizer.states:
        yield from states.values()


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer", "master", "dp"),
    thinned((0, 1, 2, 3), ("bf16", "fp32"), ("adamw", "sgd"), ("fp32", "split"), (1, 2, 4), strength=3),
)
def test_bytes_are_those_of_the_formula(stage, precision, optimizer, master, dp):
    config = config_of(point(stage, dp=dp), precision, master)
    model = replace(config.model, hidden_size=256, num_layers=1, vocab_size=256, num_query_groups=None)  # nothing to align
    optim = replace(config.optim, name=optimizer)
    config = replace(config, model=model, optim=optim)
    count = parameter_count(model, 256)

    def rank(ctx):
        found = []
        trace_run(ctx, config, 1, prepare=found.append)
        return measured(found[0])

    expected = state_bytes(stage if dp > 1 else 0, dp, precision, optimizer, master)
    for said, distinct, elements in simulate(MeshShape(dp=dp), rank):
        assert elements == count
        assert said["parameters"] == expected.parameters * count
        assert said["gradients"] == expected.gradients * count
        assert said["optimizer"] == expected.optimizer * count
        scalars = 64  # at stage 3 each parameter that is away refers to one NaN
        assert distinct <= expected.total * count + scalars * 40


def test_between_steps_nothing_is_open_or_gathered():
    def look(run):
        train_step(run)
        flat = run.flat
        assert all(held.weights is None and held.grads is None for held in flat.buckets)
        assert all(bool(p.isnan().all()) for p in flat.parameters)
        return True

    assert all(on_ranks(point(3), look))


@pytest.mark.parametrize("schedule", [("1f1b", 1, 1), ("1f1b", 1, 2), ("zb_h1", 1, 2), ("zb_v", 2, 2)], ids=str)
def test_at_most_two_units_are_gathered_at_a_time(schedule):
    def watch(run):
        most = [0]
        flat = run.flat
        real = flat._fetch

        def fetch(mine):
            real(mine)
            gathered = [h.bucket.size for h in flat.buckets if h.weights is not None and h.bucket.decay]
            most[0] = max(most[0], len(gathered))

        flat._fetch = fetch
        return most

    for most in on_ranks(point(3, schedule=schedule, micro_batches=3, bucket_size=10**6, tied=False), watch):
        assert most[0] == 2


def test_opened_gradients_are_those_of_few_buckets():
    def watch(run):
        most = [0]
        flat = run.flat
        real = flat._open

        def open_(number):
            real(number)
            most[0] = max(most[0], sum(h.grads is not None for h in flat.trained))

        flat._open = open_
        return most, len(flat.trained)

    for most, buckets in on_ranks(point(2, tied=False, micro_batches=3), watch):
        assert most[0] <= 6 < buckets  # of one layer, and of norms and biases


def test_buffers_go_with_the_run_without_a_collection_of_garbage():
    def one_run(ctx):
        seen = []
        trace_run(ctx, config_of(point(3)), 1, prepare=lambda run: seen.append(weakref.ref(run.flat)))
        return seen[0]() is None

    gc.disable()
    try:
        assert simulate(shape_of(point(3)), one_run) == [True, True]
    finally:
        gc.enable()


# --- frozen parameters ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, number, trainable):
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.weight = Parameter(matrix, ParamSpec(f"{number}.weight", (6, 6), trainable=trainable))
        self.bias = Parameter(matrix[0].clone(), ParamSpec(f"{number}.bias", (6,), decay=False, trainable=trainable))

    def forward(self, x):
        return torch.tanh(x @ self.weight + self.bias)


def trained_with_frozen(ctx, stage, trainable):
    layers = [Layer(i, t) for i, t in enumerate(trainable)]
    units = [Unit((layer.weight, layer.bias), module=layer) for layer in layers]
    flat = FlatParameters(units, ctx, stage=stage, bucket_size=1)
    optimizer = Optimizer(flat, OptimConfig(lr=0.1))
    for step in range(3):
        x = torch.full((2, 6), 0.1 * (1 + ctx.dp.rank + 2 * step), dtype=torch.float64)
        flat.zero_grad()
        for layer in layers:
            x = layer(x)
        x.square().sum().backward()
        flat.reduce()
        optimizer.step(0.1, torch.ones((), dtype=torch.float64), torch.zeros(()))
    tensors = optimizer.tensors()
    states = {name: t.clone() for name, (_, t) in tensors["exp_avg"].items()}
    return {name: t.clone() for name, (_, t) in tensors["weights"].items()}, states, flat.nbytes(), optimizer.nbytes


@pytest.mark.parametrize("trainable", [(True, False, True), (False, True, False), (False, False, True)])
def test_frozen_parameters_have_no_gradient_and_no_state_at_any_stage(trainable):
    names = {f"{i}.{kind}" for i, t in enumerate(trainable) if t for kind in ("weight", "bias")}
    plain = simulate(MeshShape(dp=2), trained_with_frozen, 0, trainable)[0]
    start = [Layer(i, t) for i, t in enumerate(trainable)]
    for stage in (0, 1, 2, 3):
        for weights, states, flat_bytes, optimizer_bytes in simulate(MeshShape(dp=2), trained_with_frozen, stage, trainable):
            assert set(states) == names and len(weights) == 6
            for i, layer in enumerate(start):
                changed = not torch.equal(weights[f"{i}.weight"], layer.weight.detach())
                assert changed == trainable[i]
            assert all(torch.allclose(weights[n], plain[0][n], rtol=1e-12, atol=1e-12) for n in weights)
            buckets = sum(trainable) + 1  # a matrix each, and all biases
            of_trained = buckets * 2 * ALIGNMENT * 8
            assert flat_bytes["gradients"] == of_trained // (2 if stage >= 2 else 1)
            assert optimizer_bytes == 2 * of_trained // (2 if stage else 1)


# --- errors -------------------------------------------------------------------------------------------------------------


def test_a_gradient_after_the_reduction_is_an_error():
    def late(ctx):
        layer = Layer(0, True)
        flat = FlatParameters([Unit((layer.weight, layer.bias), module=layer)], ctx, stage=1)
        flat._start_reduction(flat.trained[0], last=True)
        layer(torch.ones(2, 6, dtype=torch.float64)).sum().backward()

    with pytest.raises(ValueError, match=r"a gradient for the bucket of 0\.\w+ .* came after it was reduced"):
        simulate(2, late)


def test_parameters_that_are_away_read_as_nan():
    def look(ctx):
        layer = Layer(0, True)
        FlatParameters([Unit((layer.weight, layer.bias))], ctx, stage=3)
        return bool(layer.weight.isnan().all()), layer.weight.shape

    assert simulate(2, look) == [(True, (6, 6))] * 2
