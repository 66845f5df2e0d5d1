"""A save that fails is tried again, never at the cost of an earlier one; too many failures in a row end the run on every rank."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatrain.checkpoint import retries, save, writing
from megatrain.checkpoint.load import newest
from megatrain.checkpoint.retries import Retries
from megatrain.checkpoint.save import Contents, Saver
from megatrain.checkpoint.together import CheckpointError, ContentError
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Portion
from megatrain.testing import simulate

PAIR = MeshShape(tp=2)


def contents(step):
    return Contents(step, {}, "model: {}\n")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def broken(monkeypatch):
    """A set of steps; what is written of them fails on the second rank."""
    steps, real = set(), os.pwrite

    def pwrite(descriptor, data, offset):
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "tp00001" in name and any(f"step_{step:08d}" in name for step in steps):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return steps


def await_end(saver):
    """Wait until the save in the background has ended (collective)."""
    while not saver.ended():
        time.sleep(0.001)


def test_a_failed_save_is_tried_again_after_a_while_with_what_the_run_has_then(tmp_path, state, broken, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.2)
    broken |= {2, 4}
    said, failed = [], []

    def run(ctx):
        saver = Saver(tmp_path, ctx, keep=1, on_failed=lambda step, why: failed.append((step, why)))
        tries = Retries(saver, 3, 60.0, said.append if ctx.world.rank == 0 else lambda line: None)
        portions = state.portions(state.local(ctx), ctx)
        tries.save(contents(1), portions, wait=False)
        tries.save(contents(2), portions, wait=False)
        await_end(saver)
        assert not tries.due(3)  # found, and not yet time
        found = names(tmp_path)
        tries.save(contents(4), portions, wait=True)  # a save is due anyway
        while not tries.due(5):
            time.sleep(0.01)
        tries.save(contents(5), portions, wait=False)
        await_end(saver)
        assert not tries.due(6) and tries.failures == 0
        saver.close()
        return found

    assert simulate(PAIR, run) == [["latest", "step_00000001"]] * 2
    assert [step for step, _ in failed] == [2, 4] and all("rank 1: cannot write" in why for _, why in failed)
    assert said == [
        f"training goes on; it is saved again in {seconds} s, or when a save is due before (failure {count} of 3 in a row that end the "
        "run: checkpoint.give_up_after)"
        for count, seconds in ((1, "0.2"), (2, "0.4"))
    ]
    assert names(tmp_path) == ["latest", "step_00000005"] and newest(tmp_path) == tmp_path / "step_00000005"


@pytest.mark.parametrize("wait", [True, False])
def test_too_many_failures_in_a_row_end_the_run_on_every_rank_and_keep_the_last_good_one(tmp_path, state, broken, wait):
    broken |= {2, 3, 4}

    def run(ctx):
        tries = Retries(Saver(tmp_path, ctx, keep=1), 2, 60.0)
        portions = state.portions(state.local(ctx), ctx)
        tries.save(contents(1), portions, wait=True)
        with pytest.raises(CheckpointError) as caught:
            for step in (2, 3, 4):
                tries.save(contents(step), portions, wait=wait)
        tries.saver.close()
        return str(caught.value)

    said = simulate(PAIR, run)
    assert said == [said[0]] * 2
    ends = "the run could not be saved 2 times in a row (checkpoint.give_up_after=2), and ends; step_00000001 is as it was. "
    assert said[0].startswith(f"{ends}rank 1: cannot write")
    assert newest(tmp_path) == tmp_path / "step_00000001"


def test_what_no_later_attempt_would_mend_is_raised_at_once(tmp_path):
    alone = ParallelContext.single()
    other = Portion.whole(ParamSpec("w", (3,)), torch.zeros(4))
    tries = Retries(Saver(tmp_path, alone), 5, 60.0)
    for save_it in (lambda part: tries.save(contents(1), part, wait=True), lambda part: tries.save_last(contents(1), part)):
        with pytest.raises(ContentError, match="elements 0 to 4"):
            save_it({"weights": {"w": other}})
    tries.saver.close()


@pytest.mark.parametrize(
    ("failing", "timeout", "attempts", "limit"),
    [
        (2, 60.0, 3, None),
        (9, 60.0, 3, "3 times in a row (checkpoint.give_up_after=3)"),
        (9, 0.025, 2, "2 times in a row (checkpoint.timeout_seconds=0.025)"),
        (9, 0.001, 1, "once (checkpoint.timeout_seconds=0.001)"),
    ],
)
def test_the_last_save_is_tried_again_within_its_time(tmp_path, state, broken, monkeypatch, failing, timeout, attempts, limit):
    clock, made, real = [100.0], [], Saver.save
    broken.add(9)
    monkeypatch.setattr(retries, "LAST_WAIT_SECONDS", 0.01)
    passing = SimpleNamespace(monotonic=lambda: sum(clock), sleep=clock.append)
    monkeypatch.setattr(retries, "time", passing)

    def save_it(saver, *given, **more):
        if saver.ctx.world.rank == 0:
            made.append(9)
            if len(made) > failing:
                broken.clear()
        return real(saver, *given, **more)

    monkeypatch.setattr(Saver, "save", save_it)

    def run(ctx):
        tries = Retries(Saver(tmp_path, ctx), 3, timeout)
        tries.failures = 2  # those of earlier saves do not count
        try:
            tries.save_last(contents(9), state.portions(state.local(ctx), ctx))
        except CheckpointError as error:
            return str(error)
        finally:
            tries.saver.close()
        return None

    said = simulate(PAIR, run)
    assert said == [said[0]] * 2 and len(made) == attempts
    if limit is None:
        assert said[0] is None and names(tmp_path) == ["latest", "step_00000009"]
    else:
        assert said[0].startswith(
            f"the run could not be saved {limit}, and ends; there is no checkpoint in {tmp_path}. rank 1: cannot"
        )


def test_a_rank_that_cannot_even_say_that_it_failed_holds_nobody_up(tmp_path, state, broken, monkeypatch):
    """Under a limit of the size of files, a report of the failure cannot be written either."""
    broken.add(2)
    real = Path.write_text

    def write_text(path, *given):
        if path.suffix == ".draft":
            raise OSError(errno.EFBIG, "File too large")
        return real(path, *given)

    monkeypatch.setattr(Path, "write_text", write_text)

    def run(ctx):
        saver = Saver(tmp_path, ctx)
        with pytest.raises(CheckpointError, match=r"rank 1: cannot write .*Input/output error"):
            saver.save(contents(2), state.portions(state.local(ctx), ctx))
        saver.close()

    simulate(PAIR, run)
    assert names(tmp_path) == []


def test_a_disk_that_does_not_tell_its_size_either_is_no_whole_checkpoint(tmp_path, state, broken, monkeypatch):
    """The error of a block must be kept, whatever happens while its message is made: else the file looks whole, and is not."""
    broken.add(2)

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    def run(ctx):
        saver = Saver(tmp_path, ctx)
        if ctx.world.rank == 1:
            monkeypatch.setattr(writing.shutil, "disk_usage", refuse)  # rank 0 has asked before the first block is written
        with pytest.raises(CheckpointError, match=r"rank 1: cannot write .*It needs [\d,]+ bytes\. Older"):
            saver.save(contents(2), state.portions(state.local(ctx), ctx))
        saver.close()

    real = save._make_room

    def make_room(work, need):
        with monkeypatch.context() as patch:
            patch.setattr(writing.shutil, "disk_usage", usage)
            real(work, need)

    usage = writing.shutil.disk_usage
    monkeypatch.setattr(save, "_make_room", make_room)
    simulate(PAIR, run)
    assert names(tmp_path) == []


def test_older_checkpoints_that_cannot_be_removed_are_no_failure(tmp_path, state, monkeypatch, capsys):
    failed, real = [], Path.rename

    def rename(path, target):
        if Path(target).name.startswith(".removing_"):
            raise OSError(errno.EACCES, "Permission denied")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    alone = ParallelContext.single()
    saver = Saver(tmp_path, alone, keep=1, on_failed=lambda *given: failed.append(given))
    for step in (1, 2):
        saver.save(contents(step), state.portions(state.local(alone), alone))
    saver.close()
    assert failed == [] and newest(tmp_path).name == "step_00000002"
    left = f"megatrain: older checkpoints than {tmp_path}/step_00000002 could not be removed: [Errno 13] Permission denied\n"
    assert capsys.readouterr().err == left


def test_a_save_in_the_background_is_looked_at_ever_more_rarely(tmp_path, state, monkeypatch):
    alone, looks = ParallelContext.single(), []
    saver = Saver(tmp_path, alone)
    tries = Retries(saver, 3, 60.0)
    tries.save(contents(100), state.portions(state.local(alone), alone), wait=False)
    monkeypatch.setattr(saver, "ended", lambda: looks.append(step) or False)
    for step in range(101, 141):
        assert not tries.due(step)
    saver.close()
    assert looks == [101, 102, 104, 108, 116, 132]
