"""torchrun starts the workers of a run again: they go on from the copy in memory, under each stage of ZeRO, to the bit."""

import os
import signal
import sys

import jobs
import psutil
import pytest

STEPS = 60


def workers(job):
    """The ranks' processes, by rank."""
    children = psutil.Process(job.processes[0].pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.mark.fault(
    injection="kill -9 of a rank under torchrun --max-restarts, zero {stage}",
    promise="workers go on from the copy in memory, at most checkpoint.in_memory_every steps before, to the same bits",
    bound=60,
    layout="dp 2",
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_restart_goes_on_from_the_copy_in_memory(tmp_path, measured, stage):
    store = jobs.write_store(tmp_path / "data")
    checkpoint = {"save_every": 0, "in_memory_every": 2}
    parts = {"parallel": {"zero_stage": stage, "device": "cpu"}, "train": {"steps": STEPS, "deterministic": True}}
    config = jobs.write_config(tmp_path / "config.yaml", jobs.tiny(store, tmp_path / "run", checkpoint=checkpoint, **parts))
    whole = jobs.undisturbed(tmp_path, 2)
    run, job = tmp_path / "run", jobs.Job(tmp_path / "job")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    with job:
        job.start([*torchrun, "-m", "megatrain", "train", str(config), f"log.dir={run}"], jobs.environment())
        assert jobs.wait_for_rows(job, run, 20, seconds=120)
        os.kill(workers(job)[1].pid, signal.SIGKILL)
        [ended] = job.finish(240)
    assert ended.code == 0, ended.err[-3000:]
    [told] = [event for event in jobs.events(run) if event["event"] == "restart"]
    assert "/dev/shm/megatrain-" in told["checkpoint"] and told["lost_steps"] <= 2
    measured.detected(told["seconds"])
    measured.recovered(told["seconds"], told["lost_steps"])
    jobs.same(run, whole, STEPS)
