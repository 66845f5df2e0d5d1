"""Gradients rounded to bfloat16 on their way over the data axis: how far that is from one process, what is moved, and what it keeps."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from zero_grid import config_of, reference

from megatrain.parallel.zero import FlatParameters
from megatrain.plan.memory import sending_bytes
from megatrain.testing import simulate
from megatrain.testing.trace import mesh_shape, trace_run
from megatrain.transport.wrappers import RecordedWorld, Recorder

STEPS = 2
LAYOUTS = [(0, None), (1, None), (2, None), (3, None), (1, 2), (3, 2)]
"""ZeRO stage, and how many of four ranks share the shards; None: there are two."""


@cache
def trained(stage, zero_ranks, reduce_dtype, overlap=True):
    """Of each rank its trace and what it has sent; and the bytes of the rounded copies that the first one keeps, and of the formula."""
    ranks = 4 if zero_ranks else 2
    config = config_of((stage, ("1f1b", 1, 1), (1, False), ranks, 1 if stage == 1 else 3, True, "none", 500), "fp32")
    parallel = replace(config.parallel, zero_ranks=zero_ranks, reduce_dtype=reduce_dtype, overlap=overlap)
    config, kept, recorders = replace(config, parallel=parallel), [], [Recorder() for _ in range(ranks)]
    real = FlatParameters.reduce

    def reduce(self):
        real(self)
        if self.ctx.world.rank == 0:
            rooms = [b for (_, dtype), free in self._pool._free.items() if dtype == torch.bfloat16 for b in free]
            largest = max(local.bucket.size for local in self.trained)
            shards, replicas = self.trained[0].shards.size, self.trained[0].replicas.size
            kept[:] = sum(b.nbytes for b in rooms), sending_bytes(largest, shards, replicas, overlap), largest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatParameters, "reduce", reduce)
        wrap = lambda world: RecordedWorld(world, recorders[world.rank])  # noqa: E731
        traces = simulate(mesh_shape(config, ranks), trace_run, config, STEPS, wrap=wrap)
    return traces, [recorder.totals() for recorder in recorders], tuple(kept)


def deviations(traces):
    """Of each gradient of the first step from one process: max|a-b| / max(max|b|, RMS of all)."""
    exact = reference(True, "fp32").gradients
    rms = torch.cat([g.flatten() for g in exact.values()]).square().mean().sqrt()
    return {name: float((traces[0].gradients[name] - g).abs().max() / max(g.abs().max(), rms)) for name, g in exact.items()}


@pytest.mark.parametrize(("stage", "zero_ranks"), LAYOUTS)
def test_each_gradient_is_off_by_roundings_and_half_the_bytes_are_moved(stage, zero_ranks):
    """Each of d ranks adds no more than 2^-8 of what is largest; what comes first, and has no gradient yet, is the same to the bit."""
    exact, whole, _ = trained(stage, zero_ranks, "fp32")
    rounded, half, _ = trained(stage, zero_ranks, "bf16")
    assert max(deviations(exact).values()) < 2e-5
    found = deviations(rounded)
    assert max(found.values()) < len(rounded) * 2**-8
    assert all(off > 2**-14 for name, off in found.items() if not name.endswith("key.bias")), "every gradient is rounded"
    assert rounded[0].losses[0] == exact[0].losses[0]
    assert rounded[0].grad_norms[0] == pytest.approx(exact[0].grad_norms[0], rel=2**-8)
    reductions = {("shards", "reduce_scatter")} if stage else {("dp_cp", "all_reduce")}
    reductions |= {("replicas", "all_reduce")} if zero_ranks else set()
    for before, after in zip(whole, half, strict=True):
        assert before.keys() == after.keys() >= reductions
        for key, total in before.items():
            wide = 8 * STEPS if key == ("dp_cp", "all_reduce") else 0  # the weight of a batch goes the same way
            assert after[key].bytes == ((total.bytes - wide) // 2 + wide if key in reductions else total.bytes), key


@pytest.mark.parametrize(("stage", "zero_ranks"), [(0, None), (2, None), (1, 2)])
def test_copies_stay_equal_and_overlap_changes_no_bit(stage, zero_ranks):
    ranks, _, _ = trained(stage, zero_ranks, "bf16")
    without, _, _ = trained(stage, zero_ranks, "bf16", overlap=False)
    for trace in (*ranks, *without):
        assert (trace.losses, trace.grad_norms) == (ranks[0].losses, ranks[0].grad_norms)
        assert all(torch.equal(trace.weights[name], weight) for name, weight in ranks[0].weights.items())


@pytest.mark.parametrize(
    ("stage", "zero_ranks", "overlap", "buckets"),
    [(0, None, True, 2), (0, None, False, 1), (1, None, True, 2), (3, None, True, 2), (1, 2, True, 4), (1, 2, False, 1)],
)
def test_rounded_copies_are_of_few_buckets(stage, zero_ranks, overlap, buckets):
    kept, formula, largest = trained(stage, zero_ranks, "bf16", overlap)[2]
    assert kept == formula == 2 * buckets * largest
    assert trained(stage, zero_ranks, "fp32")[2][0] == 0
