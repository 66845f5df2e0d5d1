"""A process that saves is killed (SIGKILL) at any moment, again and again; every start finds a whole checkpoint of one moment."""

import os
import random
import signal
import sys
import time

import pytest
import torch

from megatrain.checkpoint.claim import claim
from megatrain.checkpoint.directory import latest
from megatrain.checkpoint.load import load_newest
from megatrain.checkpoint.save import Contents, Saver
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Portion

TENSORS, ELEMENTS = 6, 40_000
SPECS = [ParamSpec(f"w{i}", (ELEMENTS,)) for i in range(TENSORS)]


def state(step):
    """Tensors that all hold the number of the step."""
    return {"weights": {s.name: Portion.whole(s, torch.full(s.shape, float(step))) for s in SPECS}}


def write_until_killed(directory, ready):
    """What a training process does: take up the newest checkpoint, then save step after step in the background, telling of each."""
    ctx = ParallelContext.single()
    held = claim(directory, ctx)
    found = load_newest(directory, state(-1), ctx)
    step = 0 if found is None else found[1].step
    saver = Saver(directory, ctx, keep=2, keep_every=50, staging_bytes=2**20, block_bytes=2**16)
    os.write(ready, b"x")
    while True:
        step += 1
        saver.save(Contents(step, {"step": step}, "model: {}\n"), state(step), wait=step % 3 == 0)
        os.write(ready, b"x")
    held.release()


def whole(directory):
    """The step of the newest checkpoint. Fails where any is damaged, or holds numbers of two moments."""
    ctx, got = ParallelContext.single(), state(-1)
    found = load_newest(directory, got, ctx, on_damaged=lambda path, reason: pytest.fail(f"{path}: {reason}"))
    if found is None:
        return 0
    path, manifest = found
    assert manifest.progress["step"] == manifest.step == int(path.name.removeprefix("step_"))
    for portion in got["weights"].values():
        assert (portion.elements.tensor == manifest.step).all(), f"{path} is a mixture"
    named = latest(directory)
    assert not named or (directory / named / "manifest.json").is_file()
    return manifest.step


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("kills", [50, pytest.param(200, marks=pytest.mark.slow)])  # an eighth of a second each
def test_kills_lose_nothing_that_was_published(tmp_path, kills):
    chance, before = random.Random(7), 0
    for _ in range(kills):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(tmp_path, writes)
            except BaseException as error:
                os.write(2, f"the writer failed: {error!r}\n".encode())
            os._exit(1)
        os.close(writes)
        assert os.read(reads, 1) == b"x", "the writer could not start"
        began, saves = time.monotonic(), chance.randrange(3)
        for _ in range(saves):
            assert os.read(reads, 1) == b"x", "the writer ended"
        # Anywhere in what comes next, however busy the machine is: a save takes as long as those before it.
        time.sleep(chance.uniform(0, (time.monotonic() - began) / saves if saves else 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(reads)
        after = whole(tmp_path)
        assert after >= before
        before = after
    assert before > kills / 4, "the writer hardly ever got to save"
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("step_")]) <= 3 + before // 50
