"""Training in BF16 on numba's kernels: layouts agree, runs resume bit for bit."""

from dataclasses import replace
from functools import cache

import pytest
from layout_grid import config_of

from megatrain.kernels import cpu_gated, cpu_heads, cpu_norm, cpu_softmax, dispatch
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import agree_in_bf16, simulate
from megatrain.testing.resumed import interrupted, require_same_bits
from megatrain.testing.trace import mesh_shape, round_weights, trace_run

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = range(4)
LAYOUTS = {
    "tp 2, sequence parallel": ((2, True, 1, 4), {}),
    "pp 2": ((1, False, 1, 4), {"pipeline_parallel_size": 2}),
    "zero 3": ((1, False, 2, 4), {"zero_stage": 3}),
}


@pytest.fixture(autouse=True)
def for_all_sizes(monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST", 0)
    monkeypatch.setattr("megatrain.kernels.norm.NARROWEST", 1)


def config(layout, model, precision, seed):
    whole = config_of(layout, (model == "gpt", 101, 2, 0.0, precision))
    return replace(whole, train=replace(whole.train, seed=seed, kernels="auto" if precision == "fp32" else "numba"))


@cache
def one_process(model, seed):
    """The first steps in float32 and on numba's kernels in bfloat16, from the same weights."""
    lone, ctx = (1, False, 1, 4), ParallelContext.single()
    exact = trace_run(ctx, config(lone, model, "fp32", seed), 1, prepare=round_weights)
    return exact, trace_run(ctx, config(lone, model, "bf16", seed), 1)


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_agree(layout, model):
    shape, parallel = layout
    alone = [one_process(model, seed) for seed in SEEDS]
    others = []
    for seed in SEEDS:
        bf16 = config(shape, model, "bf16", seed)
        bf16 = replace(bf16, parallel=replace(bf16.parallel, **parallel))
        others.append(simulate(mesh_shape(bf16, shape[2]), trace_run, bf16, 1)[0])
    agree_in_bf16([exact for exact, _ in alone], [bf16 for _, bf16 in alone], others)


def test_a_run_on_them_resumes_bit_for_bit(monkeypatch, tmp_path):
    called = []
    for module, name in (
        (cpu_gated, "activate_back"),
        (cpu_norm, "backward"),
        (cpu_softmax, "softmax"),
        (cpu_softmax, "gradient"),
        (cpu_heads, "place"),
    ):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, own=own, name=name: (called.append(name), own(*given))[1])
    small, ctx = config((1, False, 1, 4), "gpt", "bf16", 1), ParallelContext.single()
    require_same_bits(trace_run(ctx, small, 3), interrupted(ctx, small, 3, 2, tmp_path), "interrupted")
    assert set(called) == {"activate_back", "backward", "softmax", "gradient", "place"}
