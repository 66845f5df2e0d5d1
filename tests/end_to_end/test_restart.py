"""A run that its launcher starts again goes on from the copy in memory, to the bit; without a whole one, from the disk."""

import json
import time
from dataclasses import replace

import jobs
import pytest
import torch

import megatrain
from megatrain.checkpoint.manifest import Manifest
from megatrain.plan.memory import copy_bytes
from megatrain.resuming.restart import ALIVE, Restart, folder_of
from megatrain.runtime.flops import parameter_count
from megatrain.testing import simulate
from megatrain.transport import leftovers

STEPS = 10


class Crash(Exception):
    """The death of a worker."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jobs.write_store(tmp_path_factory.mktemp("restart") / "data")


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Shared memory, and the variables of a launcher, which stays the same."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(leftovers, "FOLDER", tmp_path / "shm")
    for key, value in jobs.environment(0, 2, jobs.free_port()).items():
        if key.startswith(jobs.LAUNCHERS):
            monkeypatch.setenv(key, value.replace("2", "1") if key.endswith("WORLD_SIZE") else value)
    return tmp_path / "shm"


def start(data, run, at=None, **checkpoint):
    """Train; the worker dies after step `at`."""
    settings = {"save_every": 4, "in_memory_every": 1, "asynchronous": False, **checkpoint}
    tree = jobs.tiny(data, run, model={"dropout": 0.1}, train={"steps": STEPS, "deterministic": True}, checkpoint=settings)
    job = megatrain.build(tree)

    def die(job):
        if at is not None and job.step == at:
            raise Crash

    job.observers.before_update.append(die)
    try:
        megatrain.train(job)
    except Crash:
        return job
    finally:
        job.close()
        torch.use_deterministic_algorithms(False)
    return job


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    start(data, run, in_memory_every=0)
    return run


def test_a_restart_loses_one_step_and_ends_on_the_same_bits(data, memory, tmp_path, whole):
    start(data, tmp_path / "run", at=7)  # in the middle of step 8
    [folder] = memory.iterdir()
    assert [path.name for path in sorted(folder.iterdir())][-1] == "step_00000006"
    one = sum(file.stat().st_size for file in folder.glob("step_00000006/*.safetensors"))
    again = start(data, tmp_path / "run")
    told = copy_bytes("fp32") * parameter_count(again.config.model, again.config.model.vocab_size)
    assert told < one < told + 15_000  # names and shapes
    assert folder == folder_of(again.config, again.session.launch)
    assert again.resumed_from == folder / "step_00000006"
    jobs.same(tmp_path / "run", whole, STEPS)
    told = [event for event in jobs.events(tmp_path / "run") if event["event"] == "restart"]
    assert [(event["step"], event["lost_steps"]) for event in told] == [(7, 1)] and 0 < told[0]["seconds"] < 60
    assert list(memory.iterdir()) == []  # the run has ended


def test_a_damaged_copy_is_passed_over_with_a_line(data, memory, tmp_path, whole):
    start(data, tmp_path / "run", at=7)
    [file] = memory.glob("*/step_00000006/exp_avg-*")
    content = bytearray(file.read_bytes())
    content[-2] ^= 4
    file.write_bytes(content)
    again = start(data, tmp_path / "run")
    assert again.resumed_from == tmp_path / "run/checkpoints/step_00000004"
    assert again.notes[0].startswith("the copy of step 6 in memory is not used: ") and str(file) in again.notes[0]
    jobs.same(tmp_path / "run", whole, STEPS)


def test_a_copy_that_is_no_newer_than_the_disk_is_left(data, memory, tmp_path, whole):
    start(data, tmp_path / "run", at=7, in_memory_every=3)
    [folder] = memory.iterdir()
    assert not (folder / "step_00000008").exists() and (folder / "step_00000006").is_dir()
    tmp_path.joinpath("run/checkpoints/step_00000004").rename(tmp_path / "run/checkpoints/step_00000009")
    manifest = tmp_path / "run/checkpoints/step_00000009/manifest.json"
    kept = Manifest.from_bytes(manifest.read_bytes())
    manifest.write_bytes(replace(kept, step=9, progress={**kept.progress, "step": 9}).to_bytes())
    again = start(data, tmp_path / "run", in_memory_every=3)
    assert again.notes[0] == "the copy of step 6 in memory is not used: the checkpoint of step 9 on the disk is as new"


def test_a_run_without_a_launcher_says_that_it_keeps_none(data, tmp_path, capsys):
    start(data, tmp_path / "run", at=2)
    assert (
        "checkpoint.in_memory_every serves the restarts of torchrun (--max-restarts), which has not started this run"
        in capsys.readouterr().out
    )


def test_traces_of_the_start_before_are_found_on_whatever_machine_they_are(tmp_path):
    def run(ctx):
        folder = tmp_path / f"machine_{ctx.world.rank}"
        if ctx.world.rank:  # the first machine is new
            folder.mkdir(mode=0o700)
            (folder / ALIVE).write_text(json.dumps({"step": 4 + ctx.world.rank, "ended": time.monotonic() - 10}))
        found = Restart.before(folder, ctx)
        return found.last_step, round(time.monotonic() - found.ended)

    assert simulate(3, run) == [(6, 10)] * 3
    assert simulate(1, lambda ctx: Restart.before(tmp_path / "none", ctx)) == [None]
    folder = tmp_path / "machine_2"
    for text in ('{"step": 1e999, "ended": 0.0}', "[" * 4000, "[1]", "9" * 5000):
        (folder / ALIVE).write_text(text)
        assert simulate(1, lambda ctx: Restart.before(folder, ctx)) == [None]
    (folder / ALIVE).write_text('{"step": 4, "ended": 0.0}')
    folder.chmod(0o777)  # anybody may have written it
    assert simulate(1, lambda ctx: Restart.before(folder, ctx)) == [None]
