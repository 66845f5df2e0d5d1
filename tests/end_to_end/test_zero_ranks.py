"""Shards shared by some of the replicas (parallel.zero_ranks): the numbers of one process, equal copies, the bytes of the formula."""

from dataclasses import replace

import pytest
import torch
from zero_grid import STEPS, config_of, reference

from megatrain.checkpoint.save import Contents, save
from megatrain.config.load import dump
from megatrain.optim.audit import ReplicaError, audit
from megatrain.optim.portions import portions
from megatrain.parallel.zero import FlatParameters
from megatrain.plan.memory import state_bytes
from megatrain.resuming.resume import progress_of, restore
from megatrain.testing import Disagreement, simulate, spawn
from megatrain.testing.agree import agree
from megatrain.testing.resumed import interrupted, require_same_bits
from megatrain.testing.trace import mesh_shape, trace_run
from megatrain.training import train_step
from megatrain.transport.wrappers import RecordedWorld, Recorder
from megatrain.watch import traffic

ONE, ZB = ("1f1b", 1, 1), ("zb_h1", 1, 2)


def shared(stage, schedule=ONE, tp=(1, False), micro_batches=3, zero_ranks=2, tied=True, **parallel):
    """The config and the mesh of four replicas, of which so many share the shards."""
    config = config_of((stage, schedule, tp, 4, micro_batches, tied, "none", 500))
    config = replace(config, parallel=replace(config.parallel, zero_ranks=zero_ranks, **parallel))
    return config, mesh_shape(config, 4)


def traces(config, shape, steps=STEPS, **options):
    return simulate(shape, trace_run, config, steps, **options)


@pytest.mark.parametrize(
    ("stage", "schedule", "tp"),
    [*((stage, ONE, (1, False)) for stage in (1, 2, 3)), (3, ONE, (2, True)), (2, ZB, (1, False))],
    ids=str,
)
def test_two_by_two_replicas_agree_with_one_process(stage, schedule, tp):
    for trace in traces(*shared(stage, schedule, tp)):
        agree(reference(True, "fp64"), trace)


def test_gloo_processes_agree_with_one_process():
    config, shape = shared(3, micro_batches=1)
    for trace in spawn(shape, trace_run, config, STEPS):
        agree(reference(True, "fp64"), trace)


def test_without_overlap_the_numbers_are_the_same_to_the_bit():
    with_overlap, without = (traces(*shared(3, overlap=overlap))[3] for overlap in (True, False))
    assert with_overlap.losses == without.losses and with_overlap.grad_norms == without.grad_norms
    assert all(torch.equal(with_overlap.weights[name], without.weights[name]) for name in without.weights)


def test_one_rank_with_all_shards_is_stage_0_to_the_bit():
    apart, plain = (traces(*shared(stage, zero_ranks=ranks))[0] for stage, ranks in ((3, 1), (0, None)))
    assert apart.losses == plain.losses and all(torch.equal(apart.weights[name], plain.weights[name]) for name in plain.weights)


def test_replicas_that_are_not_summed_are_found(monkeypatch):
    def forget(self, held):
        real(self, held)
        self._end_sums(0)
        held.own_grads.div_(held.replicas.size)

    real = FlatParameters._sum_replicas
    monkeypatch.setattr(FlatParameters, "_sum_replicas", forget)
    with pytest.raises(Disagreement, match=r"gradient of step 0: embedding\.tokens"):
        agree(reference(True, "fp64"), traces(*shared(2))[0])


# --- copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "kind"), [(1, "exp_avg"), (2, "master"), (3, "exp_avg_sq"), (3, "parameter"), (3, "no"), (1, "no")]
)
def test_replicas_of_a_shard_are_equal_to_the_bit_and_one_changed_bit_is_named(stage, kind):
    config, shape = shared(stage, reduce_dtype="bf16" if kind == "no" else "fp32")
    config = replace(config, train=replace(config.train, precision="bf16"))

    def rank(ctx):
        def prepare(run):
            train_step(run)
            if kind != "no" and ctx.world.rank == 3:
                held, masters, states = run.flat.trained[0], run.optimizer.masters[0], run.optimizer.states[0]
                where = {"master": masters.masters, "parameter": held.own_weights}
                (states[kind] if kind in states else where[kind]).view(torch.uint8)[0] ^= 1
            audit(run.flat, run.optimizer, ctx)

        trace_run(ctx, config, 0, prepare=prepare)

    if kind == "no":
        simulate(shape, rank)
        return
    with pytest.raises(ReplicaError, match=rf"{kind} [\w.]+, axis replicas: rank 3 drifted from rank 1"):
        simulate(shape, rank)


# --- bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_of_a_step_are_those_of_the_table(stage):
    """In zero.py: within a node the stage's own, between nodes one all-reduce of the own gradients, whatever the micro-batches."""
    recorders = [Recorder() for _ in range(4)]
    config, shape = shared(stage, tied=False)
    seen = {}

    def rank(ctx):
        def between(step, run):
            if step == 1:
                recorders[ctx.world.rank].reset()
            else:
                seen[ctx.world.rank] = recorders[ctx.world.rank].totals(), run.flat
            return run

        trace_run(ctx, config, 3, between=between)

    simulate(shape, rank, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    for totals, flat in seen.values():
        elements = flat.grads.numel() * (2 if stage >= 2 else 1)
        expected = traffic(elements, 2, 2, stage, 3, 8, 8)
        moved = {key: total.bytes for key, total in totals.items()}
        reduced = moved["shards", "reduce_scatter"] // 2
        assert reduced == (1 if stage == 1 else 3) * elements * 8 // 2
        assert moved["replicas", "all_reduce"] == expected.replicas  # twice, times a half
        gathered = moved["shards", "all_gather"] // 2
        # Of two gathers in each of 3 micro-batches, norms and biases need one in all, the first and the last unit one in each.
        ends = sum(h.bucket.size for h in flat.buckets if h.bucket.unit in (0, len(flat.units) - 1))
        saved = 5 * sum(h.bucket.size for h in flat.buckets if not h.bucket.decay) + 3 * ends
        assert reduced + gathered == expected.shards - (saved * 8 // 2 if stage == 3 else 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_kept_are_those_of_two_ranks_that_share(stage):
    def kept(ctx):
        runs = []
        trace_run(ctx, config, 0, prepare=runs.append)
        flat, elements = runs[0].flat, sum(held.bucket.size for held in runs[0].flat.buckets)
        return [*flat.nbytes().values(), runs[0].optimizer.nbytes], elements

    config, shape = shared(stage)
    expected = state_bytes(stage, 2, "fp64")
    for found, elements in simulate(shape, kept):
        assert found == [expected.parameters * elements, expected.gradients * elements, expected.optimizer * elements]


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def files_of(path):
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def test_a_checkpoint_is_the_same_files_however_many_ranks_share_and_goes_into_any_layout_to_the_bit(tmp_path):
    """From two that share to four, to none and to tensor parallelism, and back, through stage 3."""

    def handed_on(ctx, config, here, to):
        def prepare(run):
            if here is None:
                train_step(run)
            else:
                restore(run, here)
            audit(run.flat, run.optimizer, ctx)
            save(to, Contents(1, progress_of(run), dump(config)), portions(run.optimizer), ctx)

        trace_run(ctx, config, 0, prepare=prepare)

    route = [shared(2), shared(2, zero_ranks=None), shared(0, zero_ranks=None), shared(3), shared(3, tp=(2, False)), shared(1)]
    path, found = None, []
    for number, (config, shape) in enumerate(route):
        simulate(shape, handed_on, config, path, tmp_path / str(number))
        path = tmp_path / str(number) / "step_00000001"
        found.append(files_of(path))
    assert len(found[0]) == 3 * 4 and max(sizes := [len(content) for content in found[0].values()]) < 1.1 * min(sizes)
    for number in (1, 2, 5):  # at stage 3, and with tensor parallelism, buckets are others
        assert found[number] == found[0], number


def test_a_resumed_run_has_the_same_bits(tmp_path):
    config, shape = shared(3)
    plain, again = traces(config, shape)[0], simulate(shape, interrupted, config, STEPS, 1, tmp_path)[0]
    require_same_bits(plain, again, "resumed")
