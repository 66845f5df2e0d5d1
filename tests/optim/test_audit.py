"""The replica audit sees one changed bit in any copy, names tensor and ranks, and is silent otherwise."""

import pytest
import torch
from zero_grid import config_of, shape_of

from megatrain.optim.audit import ReplicaError, audit, digest
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run
from megatrain.training import train_step


def point(stage, schedule=("1f1b", 1, 1), tp=(2, True), dp=2):
    return (stage, schedule, tp, dp, 1, True, "none", 500)


def audited(where, change=None, at=1, precision="bf16", master="fp32"):
    """Take a step on every rank, change something on world rank `at`, and audit."""

    def rank(ctx):
        def prepare(run):
            train_step(run)
            audit(run.flat, run.optimizer, ctx)
            run.flat.settle()
            if change is not None and ctx.world.rank == at:
                with torch.no_grad():
                    change(run)
            audit(run.flat, run.optimizer, ctx)

        trace_run(ctx, config_of(where, precision, master), 1, prepare=prepare)

    return simulate(shape_of(where), rank)


def flip(tensor):
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def parameter(run, name):
    return next(p for p in run.flat.parameters if p.spec.name == name)


PIPELINE, ALONE = ("fp32", ("zb_h1", 1, 2)), ("split", ("1f1b", 1, 1))
COPIES = [(0, *ALONE), (1, *PIPELINE), (2, *ALONE), (3, *PIPELINE)]
MORE_COPIES = [(0, *PIPELINE), (1, *ALONE), (2, *PIPELINE), (3, *ALONE)]


@pytest.mark.parametrize(
    ("stage", "master", "schedule"), [*COPIES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_COPIES)], ids=str
)
def test_equal_copies_pass(stage, master, schedule):
    audited(point(stage, schedule), master=master)


def test_a_parameter_that_drifted_over_the_replicas():
    with pytest.raises(ReplicaError, match=r"parameter layers\.1\.mlp\.down\.weight, axis dp_cp: rank 2 drifted from rank 0"):
        audited(point(1), lambda run: flip(parameter(run, "layers.1.mlp.down.weight").data), at=2)


def test_the_odd_one_of_four_is_named():
    with pytest.raises(ReplicaError, match=r"embedding\.positions, axis dp_cp: rank 3 drifted from ranks 0, 1, 2"):
        audited(point(2, tp=(1, False), dp=4), lambda run: flip(parameter(run, "embedding.positions").data), at=3)


def test_a_norm_that_drifted_over_tensor_parallel_ranks():
    """BLOOM: "LayerNorm weights drift across TP ranks"."""
    with pytest.raises(ReplicaError, match=r"parameter layers\.0\.mlp_norm\.weight, axis tp: rank 1 drifted from rank 0"):
        audited(point(0, dp=2), lambda run: flip(parameter(run, "layers.0.mlp_norm.weight").data))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq"])
def test_masters_and_states_of_norms(stage, kind):
    def change(run):
        for index, held in enumerate(run.flat.trained):
            if not held.bucket.decay:
                flip(run.optimizer.masters[index].masters if kind == "master" else run.optimizer.states[index][kind])
                return

    with pytest.raises(ReplicaError, match=rf"{kind} [\w.]+, axis (tp|dp_cp): rank"):
        audited(point(stage), change)


def test_a_tied_copy_that_drifted_over_the_ends_of_a_pipeline():
    where = point(1, ("1f1b", 1, 2), (1, False), 2)
    with pytest.raises(ReplicaError, match=r"embedding\.tokens, axis ends: rank 2 drifted from rank 0"):
        audited(
            where,
            lambda run: flip(next(h.own_weights for h in run.flat.trained if "tokens" in str(h.bucket.parameters[0].spec))),
            2,
        )


def test_what_is_cut_may_differ():
    audited(point(3), lambda run: flip(next(h.own_weights for h in run.flat.trained if h.bucket.decay)))


def test_digests_see_every_bit_and_every_place():
    x = torch.arange(1000, dtype=torch.float32)
    assert digest(x) == digest(x.clone())
    swapped = x.clone()
    swapped[3], swapped[700] = x[700], x[3]
    assert digest(swapped) != digest(x)
    for bit in range(32):
        y = x.clone()
        y.view(torch.int32)[500] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert digest(y) != digest(x)
    odd = torch.zeros(3, dtype=torch.bfloat16)
    assert digest(odd) != digest(torch.tensor([0, 0, 1], dtype=torch.bfloat16))
