"""The disk is full or slow, the clock jumps, two jobs want one directory: the run goes on, and no good checkpoint is lost."""

import os
import shutil
import signal
import time

import jobs
import psutil
import pytest
from breaking import LAYOUTS, MAIN, SAVE_EVERY, STEPS, await_that, codes, kinds, lost, said

SIZE = LAYOUTS[MAIN].size


def limit_files(job, size):
    """From now on no process of a job may write a file of more than `size` bytes (-1: any)."""
    for process in job.processes:
        psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (size, -1))


@pytest.mark.fault(
    injection="files cannot grow (RLIMIT_FSIZE) for a while, on all ranks",
    promise="the save fails and is told, training goes on, the next saves succeed; the result is the undisturbed run's",
    layout=MAIN,
)
def test_a_disk_that_is_full_for_a_while(house, measured):
    run = house.run("full")
    with house.start(MAIN, "full") as job:
        assert jobs.wait_for_rows(job, run, 5)
        limit_files(job, 4096)
        began = time.monotonic()
        await_that(lambda: kinds(run, "save_failed") != [] or not job.alive(), "a save fails")
        measured.detected(time.monotonic() - began)
        limit_files(job, -1)
        ended = job.finish()
    measured.recovered(time.monotonic() - began, lost(run))
    assert codes(ended) == [0] * SIZE, said(ended)
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="files cannot grow (RLIMIT_FSIZE) on one rank, for good",
    promise="all ranks end after some failures in a row, the error says why; the last good checkpoint is whole",
    layout=MAIN,
    bound=60,
)
def test_a_disk_that_stays_full(house, measured):
    run = house.run("stays_full")
    act = {"what": "limit", "where": "save", "at": 3, "ranks": [2]}
    with house.start(MAIN, "stays_full", act=act) as job:
        ended = job.finish()
        measured.detected(house.since("stays_full"))
    assert 0 not in codes(ended), said(ended)
    assert "File too large" in said(ended), said(ended)
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{2 * SAVE_EVERY:08d}"
    with house.start(MAIN, "stays_full") as job:
        assert codes(job.finish()) == [0] * SIZE
    assert [event["step"] for event in kinds(run, "resume")] == [2 * SAVE_EVERY]
    measured.recovered(lost=lost(run))
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="the directory of checkpoints cannot be made, at the start",
    promise="refused on all ranks with the key to change",
    layout=MAIN,
    bound=30,
)
def test_a_directory_that_cannot_be_made(house, measured):
    (house.folder / "a_file").write_text("")
    line = ["train", *house.words(MAIN, "nowhere", f"checkpoint.dir={house.folder / 'a_file/checkpoints'}")]
    for answer in jobs.commands(house.folder / "job_nowhere", [line], SIZE)[0]:
        assert answer.code == 1 and "cannot be written" in answer.err and "Set checkpoint.dir" in answer.err, answer
        measured.detected(answer.seconds)


@pytest.mark.fault(
    injection="a second job in the directory of a live one; then the owner is killed",
    promise="the second refuses and touches nothing; a dead owner's lock is taken over",
    layout=MAIN,
    bound=30,
)
def test_two_jobs_and_a_dead_owner(house, measured):
    run = house.run("owned")
    with house.start(MAIN, "owned") as job:
        assert jobs.wait_for_rows(job, run, 6)
        for process in job.processes:
            process.send_signal(signal.SIGSTOP)  # it must not end meanwhile
        began = time.monotonic()
        with house.start(MAIN, "owned") as second:
            refused = second.finish()
        measured.detected(time.monotonic() - began)
        assert codes(refused) == [1] * SIZE, said(refused)
        assert "another run" in said(refused)
        rows = jobs.row_count(run)
        for process in job.processes:
            process.kill()
        job.finish()
    with house.start(MAIN, "owned") as job:
        ended = job.finish()
    assert codes(ended) == [0] * SIZE, said(ended)
    assert rows <= 2 * SAVE_EVERY and lost(run) <= SAVE_EVERY + 1
    assert [event["event"] for event in kinds(run, "start", "resume")] == ["start", "resume"]
    measured.recovered(lost=lost(run))
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="the clock is an hour back in the second of three starts, and all checkpoints have one mtime",
    promise="each start goes on from the newest step, and no newer checkpoint is pruned",
    layout=MAIN,
)
def test_a_clock_that_jumps_back(house, measured):
    run, steps = house.run("clock"), []
    for rows, act in ((2 * SAVE_EVERY + 2, None), (4 * SAVE_EVERY + 4, {"what": "clock", "seconds": 3600.0}), (None, None)):
        with house.start(MAIN, "clock", "checkpoint.keep=2", act=act) as job:
            if rows is not None:
                assert jobs.wait_for_rows(job, run, rows)
                for process in job.processes:
                    process.kill()
            ended = job.finish()
        steps.append(max(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")))
        for path in (run / "checkpoints").glob("step_*"):
            os.utime(path, (1e9, 1e9))
    assert codes(ended) == [0] * SIZE, said(ended)
    assert [event["step"] for event in kinds(run, "resume")] == steps[:2]
    assert 2 * SAVE_EVERY - SAVE_EVERY <= steps[0] < steps[1] < STEPS
    measured.recovered(lost=lost(run))
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="the newest checkpoint is damaged: {damage}",
    promise="found before any weight is used, the file is named; the one before it is taken, to the bit",
    layout=MAIN,
)
@pytest.mark.parametrize("damage", ["a shard cut", "a bit flipped", "a shard missing", "the manifest cut"])
def test_a_damaged_checkpoint(house, measured, damage):
    name = f"damaged_{damage.replace(' ', '_')}"
    run = house.run(name)
    shutil.copytree(house.undisturbed(MAIN), run)
    shutil.rmtree(run / f"checkpoints/step_{STEPS:08d}")
    newest = run / f"checkpoints/step_{STEPS - SAVE_EVERY:08d}"
    file = sorted(newest.glob("weights*.safetensors"))[-1]
    if damage == "a shard cut":
        os.truncate(file, file.stat().st_size - 5)
    elif damage == "a bit flipped":
        data = bytearray(file.read_bytes())
        data[-3] ^= 4
        file.write_bytes(data)
    elif damage == "a shard missing":
        file.unlink()
    else:
        file = newest / "manifest.json"
        os.truncate(file, file.stat().st_size // 2)
    line = ["train", *house.words(MAIN, f"{name}_named", f"checkpoint.resume={newest}")]
    for answer in jobs.commands(house.folder / f"job_{name}_named", [line], SIZE)[0]:
        assert answer.code == 1 and answer.err.startswith("megatrain: error: ") and file.name in answer.err, answer
        measured.detected(answer.seconds)
    with house.start(MAIN, name) as job:
        ended = job.finish()
    assert codes(ended) == [0] * SIZE, said(ended)
    (event,) = kinds(run, "damaged_checkpoint")
    assert file.name in event["message"], event
    assert [one["step"] for one in kinds(run, "resume")] == [STEPS - 2 * SAVE_EVERY]
    measured.recovered(lost=SAVE_EVERY)
    jobs.same(run, house.undisturbed(MAIN), STEPS)
