"""A flipped bit on one rank, under every ZeRO stage, is found at the next audit and named; a healthy run is left as it is."""

import re
import socket
from dataclasses import replace
from types import SimpleNamespace

import jobs
import pytest
import torch
from zero_grid import config_of, shape_of

import megatrain
import megatrain.auditor
import megatrain.rerun
from megatrain.auditor import Auditor
from megatrain.optim.audit import ReplicaError
from megatrain.rerun import ComputeError, recompute
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run

HOST = re.escape(socket.gethostname())
DOWN = "layers.1.mlp.down.weight"


def point(stage, schedule=("1f1b", 1, 1), tp=(2, True), dp=2, micro_batches=1):
    return (stage, schedule, tp, dp, micro_batches, True, "none", 500)


def flip(tensor):
    tensor.detach().view(-1).view(torch.uint8)[0] ^= 1


whom = []
"""Of each error that `errors_of` has seen the last time: (ranks, tensors) to blame."""


def errors_of(where, between, steps=4, **optim):
    """The error that ends the run on each rank."""
    config = config_of(where, "bf16")
    config = replace(config, optim=replace(config.optim, **optim), train=replace(config.train, steps=steps))
    whom.clear()

    def rank(ctx):
        try:
            trace_run(ctx, config, steps, between=between(ctx))
        except (ReplicaError, ComputeError) as error:
            whom.append((error.ranks, error.tensors))
            return str(error)
        return "no error"

    return simulate(shape_of(where), rank)


def audited(change, at, when=2):
    """Audit after every step; after step `when`, world rank `at` changes something."""

    def of(ctx):
        auditors = []

        def between(step, run):
            if not auditors:
                auditors.append(Auditor(run).__enter__())
            auditors[0].updated()
            auditors[0].check(copies=True)
            run.flat.settle()
            if step == when and ctx.world.rank == at:
                change(run)
            return run

        return between

    return of


def bucket(run, name, own):
    """(the bucket of a parameter, its first element there that this rank updates, or that it does not)."""
    for index, local in enumerate(run.flat.trained):
        for parameter, _, at, length in local.bucket.ranges(0, local.bucket.size):
            mine = [place for place in range(at, at + length) if (local.own.start <= place < local.own.stop) == own]
            if parameter.spec.name == name and mine:
                return index, local, mine[0]
    raise AssertionError(f"nothing of {name} lies there")


def owned_by(run, name):
    """(bucket, place in what this rank owns) of a parameter, or of another one where it owns nothing of it."""
    names = [name, *(p.spec.name for local in run.flat.trained for p in local.bucket.parameters)]
    for found in names:
        try:
            index, local, at = bucket(run, found, own=True)
            return index, at - local.own.start, found
        except AssertionError:
            continue
    raise AssertionError("this rank owns nothing")


@pytest.mark.parametrize(
    ("stage", "kinds"),
    [
        (0, ("parameter", "master", "exp_avg", "exp_avg_sq")),
        (1, ("parameter", "master", "exp_avg", "exp_avg_sq")),
        (1, ("parameter", "low half of")),
        (2, ("master", "exp_avg", "exp_avg_sq")),
        (3, ("parameter", "master", "exp_avg", "exp_avg_sq")),
    ],
    ids=str,
)
def test_a_flipped_bit_in_what_a_rank_owns(stage, kinds):
    flipped = []

    def change(run):
        index, at, name = owned_by(run, DOWN)
        masters = run.optimizer.masters[index]
        held = {"parameter": run.flat.trained[index].own_weights, "master": masters.masters, "low half of": masters.low}
        for kind in kinds:
            flip({**held, **run.optimizer.states[index]}[kind][at : at + 1])
        flipped.append(name)

    said = errors_of(point(stage), audited(change, at=1), master="split" if "low half of" in kinds else "fp32")
    assert len(set(said)) == 1, "on all ranks the same"
    found = re.findall(r"  (.*) changed by itself on (.*) before the update of step (.*)\n", said[0])
    assert found == [(f"{kind} {flipped[0]}", f"rank 1 ({socket.gethostname()})", "3") for kind in kinds], said[0]
    assert whom == [([1], [flipped[0]])] * 4


@pytest.mark.parametrize("stage", [1, 2])
def test_a_flipped_bit_in_a_parameter_that_the_next_gather_overwrites(stage):
    """Rank 3 of four replicas; another one owns it, so that nothing of it is left after the update."""

    def change(run):
        _, local, at = bucket(run, DOWN, own=False)
        flip(local.weights[at : at + 1])

    said = errors_of(point(stage, tp=(1, False), dp=4), audited(change, at=3))
    assert len(set(said)) == 1
    assert (
        f"  in some step, parameter {DOWN}, axis dp_cp: rank 3 drifted from ranks 0, 1, 2 (rank 3 on {socket.gethostname()})\n"
        in said[0]
    )
    assert said[0].count("drifted") == 1
    assert whom == [([3], [DOWN])] * 4


@pytest.mark.parametrize(
    "where",
    [
        point(0, ("interleaved", 2, 2), (1, False), 2),
        point(1, ("zb_v", 2, 2), (1, False), 2),
        point(2, ("zb_h1", 1, 2), (1, False), 2),
        point(3, ("1f1b", 1, 1), (2, True), 2, 3),
    ],
    ids=str,
)
def test_a_healthy_run_is_the_same_to_the_bit(where):
    config = config_of(where, "bf16")

    def rank(ctx, audits):
        watched = audited(lambda run: None, at=0)(ctx)

        def between(step, run):
            recompute(run)
            return watched(step, run)

        return trace_run(ctx, config, 2, between=between if audits else None)

    plain, looked_at = (simulate(shape_of(where), rank, audits)[0] for audits in (False, True))
    assert (plain.losses, plain.grad_norms) == (looked_at.losses, looked_at.grad_norms)
    for ours, theirs in ((plain.weights, looked_at.weights), *((plain.states[k], looked_at.states[k]) for k in plain.states)):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- a device that miscalculates ------------------------------------------------------------------------------------------


def recomputed(fault, at):
    """Repeat a micro-batch after the first step, when `fault` has been done to the run of world rank `at`."""

    def of(ctx):
        def between(step, run):
            if step == 1:
                if ctx.world.rank == at:
                    fault(run)
                recompute(run)
            return run

        return between

    return of


def faulty_gradient(run, calls):
    """A gradient has another bit in some of the times that it is made."""
    real, made = run.flat._start_reduction, []

    def start(local, last):
        for parameter, gradient in local.bucket.views(local.grads) if local.grads is not None and not local.reduced else ():
            if parameter.spec.name == DOWN:
                made.append(parameter)
                if len(made) in calls:
                    flip(gradient)
        real(local, last)

    run.flat._start_reduction = start


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_another_one_the_second_time(stage):
    said = errors_of(point(stage), recomputed(lambda run: faulty_gradient(run, {2}), at=3))
    assert len(set(said)) == 1
    assert re.match(
        r"the first micro-batch of step 2, computed again, is not the same to the bit:\n  "
        rf"rank 3 on {HOST} gives other bits the second time in gradient of {re.escape(DOWN)}\nTake the device",
        said[0],
    ), said[0]
    assert whom == [([3], [f"gradient of {DOWN}"])] * 4


@pytest.mark.parametrize("stage", [1, 3])
def test_a_gradient_that_is_wrong_every_time(stage):
    """A stuck bit: the same twice, and not what the other replicas have."""
    said = errors_of(point(stage, tp=(1, False), dp=4), recomputed(lambda run: faulty_gradient(run, {1, 2}), at=2))
    assert len(set(said)) == 1
    assert re.search(
        rf"bit:\n  rank 2 on {HOST} gives other bits than ranks 0, 1, 3 in gradient of {re.escape(DOWN)}\nTake", said[0]
    ), said[0]


def test_a_rank_of_another_kind_is_not_compared_with_the_others(monkeypatch):
    """It gives other bits, the same twice, as another processor may; and the log says that nobody looks."""
    for module in (megatrain.rerun, megatrain.auditor):
        monkeypatch.setattr(module, "kind_here", lambda run: f"CPU: {run.ctx.world.rank == 2}")
    notes = []

    def of(ctx):
        looked_at = recomputed(lambda run: faulty_gradient(run, {1, 2}), at=2)(ctx)

        def between(step, run):
            notes.append(Auditor(run).notes()[-1:])
            return looked_at(step, run)

        return between

    assert errors_of(point(1, tp=(1, False), dp=4), of, steps=2) == ["no error"] * 4
    assert notes[0] == [
        "audit: rank 2 may round otherwise than rank 0 (on rank 2 CPU: True; on rank 0 CPU: False); results are compared between ranks "
        "that are alike alone (train.audit_compute_every)"
    ]


@pytest.mark.parametrize(("at", "what"), [(1, "output of chunk 0"), (3, "output of chunk 0")])
def test_the_stage_whose_activations_are_wrong_is_named_and_not_those_that_follow(at, what):
    """dp 2 x pp 2, replica 1; after stage 0 (rank 1) stage 1 (rank 3) differs too, and stage 0 gets another gradient back from it."""

    def fault(run):
        made = []

        def hook(_chunk, _given, output):
            made.append(output)
            return output if len(made) != 2 else output * (1 + 2.0**-7)

        run.chunks[0].register_forward_hook(hook)

    said = errors_of(point(1, ("1f1b", 1, 2), (1, False), 2), recomputed(fault, at))
    assert len(set(said)) == 1
    assert re.search(rf"bit:\n  rank {at} on {HOST} gives other bits the second time in {what}", said[0]), said[0]
    assert len(re.findall("gives other bits", said[0])) == 1
    assert [ranks for ranks, _ in whom] == [[at]] * 4


def test_a_rank_that_reads_other_tokens_is_named():
    def fault(run):
        real = run.loader.samples.sample
        run.loader.samples = SimpleNamespace(sample=lambda n: (real(n) + 1) % 7)

    said = errors_of(point(1, ("1f1b", 1, 1), (2, True), 2), recomputed(fault, 1))
    assert len(set(said)) == 1
    assert f"rank 1 on {socket.gethostname()} has read other tokens than ranks 0, 2, 3\n" in said[0]


# --- the record ----------------------------------------------------------------------------------------------------------------


def test_what_ends_a_run_is_an_event(tmp_path):
    store = jobs.write_store(tmp_path / "data")
    job = megatrain.build(jobs.tiny(store, tmp_path / "run", train={"steps": 6, "audit_every": 5}))
    name = job.flat.trained[0].bucket.parameters[0].spec.name

    def change(run):
        if run.step == 2:
            flip(run.flat.trained[0].own_weights)

    job.observers.before_update.append(change)
    try:
        with pytest.raises(ReplicaError) as raised:
            megatrain.train(job)
    finally:
        job.close()
    *_, event = jobs.events(tmp_path / "run")
    del event["time"]
    said = {"event": "audit", "step": 5, "rank": 0, "ranks": [0], "tensors": [name], "message": str(raised.value)}
    assert event == said
    assert (
        f"  parameter {name} changed by itself on rank 0 ({socket.gethostname()}) before the update of step 3\n"
        in said["message"]
    )


# --- numbers besides the tensors -----------------------------------------------------------------------------------------------


def flip_scale(run):
    run.loss_scale._state[0] = 4.0


def set_back(run):
    run.consumed_samples -= 4


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda run: flip(run.optimizer.updates),
            r"updates: rank 2 on HOST has 3 \(0x40400001\), ranks 0, 1, 3 3 \(0x40400000\)",
        ),
        (flip_scale, r'loss_scale: rank 2 on HOST has \["4", "0", "2"\], ranks 0, 1, 3 \["1", "0", "2"\]'),
        (set_back, "samples: rank 2 on HOST has 32, ranks 0, 1, 3 36"),
    ],
)
def test_a_number_that_one_rank_alone_has_is_found_and_its_rank_named(change, found):
    said = errors_of(point(1, tp=(1, False), dp=4), audited(change, at=2))
    assert len(set(said)) == 1 and whom[0][0] == [2]
    assert said[0].startswith("numbers that all ranks have alike are not the same on all of them:\n  ")
    assert re.search(rf"\n  {found.replace('HOST', HOST)}\n", said[0]), said[0]


# --- when ----------------------------------------------------------------------------------------------------------------------


def test_what_is_said_of_steps_that_are_not_watched_and_of_devices_that_cannot_repeat(monkeypatch):
    notes = []

    def look(run):
        monkeypatch.setattr(megatrain.auditor, "watched_every", lambda *_: 3)
        auditor = Auditor(run)
        monkeypatch.setattr(megatrain.auditor, "repeatable", lambda _: False)
        notes.append((auditor.every, auditor.notes()))

    simulate(1, lambda ctx: trace_run(ctx, config_of(point(0, tp=(1, False), dp=1)), 1, prepare=look))
    assert notes == [
        (
            3,
            [
                "audit: state is watched between updates in 1 of 3 steps, as a step is short beside it; larger batches "
                "(train.global_batch_size) have it watched in all",
                "audit: computations are not repeated (train.audit_compute_every), as they only give the same bits on this device with "
                "train.deterministic=true",
            ],
        )
    ]
