"""In bfloat16 a layout is no further from a float32 run of the same weights than twice what one process is."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from layout_grid import config_of

from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import Disagreement, Trace, agree_in_bf16, simulate
from megatrain.testing.trace import mesh_shape, round_weights, trace_run

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(12)

# tp, sequence parallel, dp, query groups
LAYOUTS = {
    "tp 2": (2, False, 1, 4),
    "tp 2, sequence parallel": (2, True, 1, 4),
    "dp 2": (1, False, 2, 4),
}
PIPELINES = {
    "1f1b": {"pipeline_parallel_size": 2},
    "zb_h1": {"pipeline_parallel_size": 2, "schedule": "zb_h1"},
    "zb_v": {"virtual_pipeline_size": 2, "schedule": "zb_v"},
}
# tied, vocabulary, micro-batches, dropout
MODELS = {"gpt": (True, 101, 4, 0.1), "llama": (False, 101, 1, 0.0)}


def alternating(names):
    """Each with one of the models; with the other one it is slow, as that takes 24 more runs of two ranks."""
    pairs = list(product(names, MODELS))
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (i % 4 in (1, 2))) for i, pair in enumerate(pairs)]


def config(layout, model, precision, seed=1234):
    whole = config_of(layout, (*MODELS[model], precision))
    return replace(whole, train=replace(whole.train, seed=seed))


@cache
def one_process(model: str, seed: int) -> tuple[Trace, Trace]:
    """The first step in float32 and in bfloat16, from the same weights."""
    lone, ctx = (1, False, 1, 4), ParallelContext.single()
    exact = trace_run(ctx, config(lone, model, "fp32", seed), 1, prepare=round_weights)
    return exact, trace_run(ctx, config(lone, model, "bf16", seed), 1)


def check(layout, model, **pipeline) -> None:
    """Raise Disagreement unless the layout agrees with one process, over all seeds."""
    seeds = [one_process(model, seed) for seed in SEEDS]
    others = []
    for seed in SEEDS:
        bf16 = config(layout, model, "bf16", seed)
        bf16 = replace(bf16, parallel=replace(bf16.parallel, **pipeline))
        ranks = simulate(mesh_shape(bf16, layout[2]), trace_run, bf16, 1)
        assert len({(trace.losses[0], trace.grad_norms[0]) for trace in ranks}) == 1, "ranks differ"
        others.append(ranks[0])
    agree_in_bf16([exact for exact, _ in seeds], [alone for _, alone in seeds], others)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_first_step_on_four_ranks(model):
    check((2, True, 2, 4), model)


@pytest.mark.parametrize(("layout", "model"), alternating(LAYOUTS), ids=str)
def test_first_step(layout, model):
    check(LAYOUTS[layout], model)


def test_first_step_with_gradients_rounded_on_their_way():
    check(LAYOUTS["dp 2"], "llama", reduce_dtype="bf16")


@pytest.mark.parametrize(("pipeline", "model"), alternating(PIPELINES), ids=str)
def test_first_step_of_a_pipeline(pipeline, model):
    check((1, False, 1, 4), model, **PIPELINES[pipeline])


def unscaled(run, micro_batches):
    """The weight of one replica's tokens."""
    return sum(run.objective.weight(m) for m in micro_batches)


FAULTS = {
    "tp 2, sequence parallel": ("megatrain.parallel.zero._sum_partial", lambda parameters, tp: None),
    "dp 2": ("megatrain.training.global_weights", unscaled),
}


@pytest.mark.parametrize("layout", FAULTS)
def test_the_band_shows_a_missing_sum(layout, monkeypatch):
    for seed in SEEDS:
        one_process("gpt", seed)  # kept from before the fault
    monkeypatch.setattr(*FAULTS[layout])
    with pytest.raises(Disagreement):
        check(LAYOUTS[layout], "gpt")


def test_masters_add_up_what_bfloat16_would_lose():
    """Steps of 1e-7 are far below bfloat16's spacing at 1, where norm weights start: masters move, their rounded copy does not."""
    small = config((1, False, 1, 4), "gpt", "bf16")
    small = replace(small, optim=replace(small.optim, lr=1e-5, min_lr=1e-5, lr_schedule="constant", warmup_steps=0))
    kept = []
    trace = trace_run(ParallelContext.single(), small, 5, prepare=kept.append)
    (run,) = kept
    weights = {name: tensor for name, tensor in trace.weights.items() if name.endswith("norm.weight")}
    assert all(weight.dtype == torch.float32 and bool((weight != 1).any()) for weight in weights.values())
    copies = {p.spec.name: p for p in run.flat.parameters if p.spec.name in weights}
    assert all(p.dtype == torch.bfloat16 and bool((p == 1).all()) for p in copies.values())
