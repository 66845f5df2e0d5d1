"""Told to stop at any moment, started again under any layout: nothing is lost, and the run is the undisturbed one."""

import os
import signal
import time

import jobs
import pytest
from breaking import LAYOUTS, MAIN, STEPS, await_that, codes, count, kinds, lost, said

SIZE = LAYOUTS[MAIN].size
FEW = ("checkpoint.save_every=0",)


@pytest.mark.fault(
    injection="{number} to {whom}",
    promise="a checkpoint at the end of the step on every rank, exit code 75; the next start loses no step, to the bit",
    layout=MAIN,
    bound=8,
)
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        ("SIGTERM", "one rank"),
        ("SIGUSR1", "one rank"),
        ("SIGTERM", "all ranks"),
        ("SIGUSR1", "all ranks, twice"),
        ("SIGTERM", "one rank during a save"),
    ],
)
def test_told_to_stop(house, measured, number, whom):
    name = f"told_{number}_{whom.replace(' ', '_').replace(',', '')}"
    run = house.run(name)
    act = {"what": "terminate", "where": "save", "at": 2, "ranks": [3]} if "save" in whom else None
    with house.start(MAIN, name, *(FEW if act is None else ()), act=act) as job:
        if act is None:
            assert jobs.wait_for_rows(job, run, 7)
            began = time.monotonic()
            for _ in range(2 if "twice" in whom else 1):
                for process in job.processes if "all" in whom else job.processes[2:3]:
                    process.send_signal(signal.Signals[number])
        ended = job.finish()
        measured.detected(house.since(name) if act else time.monotonic() - began)
    assert codes(ended) == [os.EX_TEMPFAIL] * SIZE, said(ended)
    done = max(jobs.rows(run))
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{done:08d}" and done < STEPS
    assert (run / "preempted").exists()
    with house.start(MAIN, name) as job:
        ended = job.finish()
    assert codes(ended) == [0] * SIZE, said(ended)
    assert lost(run) == 0
    measured.recovered(lost=0)
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="a stop after every start's first steps, until the run is done",
    promise="losses, weights, moments and order of the data are the undisturbed run's, to the bit",
    layout=MAIN,
)
def test_stopped_again_and_again(house, measured):
    run, asks = house.run("again"), house.folder / "stop"
    asks.write_text("")
    line = ["train", *house.words(MAIN, "again", *FEW, f"train.exit_file={asks}")]
    answers = jobs.commands(house.folder / "job_again", [line] * STEPS, SIZE)
    ends = [answer.code for each in answers for answer in each]
    stops = [event["step"] for event in kinds(run, "signal")]
    assert ends == [75] * SIZE * len(stops) + [0] * (len(ends) - SIZE * len(stops))
    assert len(stops) >= STEPS // 3 and lost(run) == 0, stops
    measured.recovered(lost=0)
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="the run goes on under another layout ({there})",
    promise="losses are the undisturbed run's, to rounding",
    layout=MAIN,
)
@pytest.mark.parametrize("there", [name for name in LAYOUTS if name != MAIN])
def test_another_layout(house, measured, there):
    name = f"other_{there.replace(' ', '_')}"
    path = house.undisturbed(MAIN) / "checkpoints/step_00000012"
    ended = house.finish(there, name, f"checkpoint.resume={path}")
    assert codes(ended) == [0] * LAYOUTS[there].size, said(ended)
    ours, theirs = jobs.rows(house.run(name)), jobs.rows(house.undisturbed(MAIN))
    assert sorted(ours) == list(range(13, STEPS + 1))
    for step, row in ours.items():
        assert row["loss"] == pytest.approx(theirs[step]["loss"], rel=2e-4), step
        assert row["tokens"] == theirs[step]["tokens"]
    measured.recovered(lost=0)


@pytest.mark.fault(
    injection="a checkpoint of a model of another shape",
    promise="refused with one clear error that has both values",
    layout=MAIN,
    bound=30,
)
def test_another_model(house, measured):
    path = house.undisturbed(MAIN) / "checkpoints/step_00000012"
    line = ["train", *house.words(MAIN, "other_model", f"checkpoint.resume={path}", "model.hidden_size=64")]
    for answer in jobs.commands(house.folder / "job_other_model", [line], SIZE)[0]:
        assert answer.code == 1 and "Traceback" not in answer.err, answer
        last = answer.err.strip().splitlines()[-1]
        assert "32" in last and "64" in last and "hidden_size" in last, last
        measured.detected(answer.seconds)


@pytest.mark.fault(
    injection="all ranks killed before one file operation of a save (tries: {tries})",
    promise="a whole checkpoint loads, `latest` names no part, leftovers are gone after the next start",
    layout=MAIN,
)
@pytest.mark.parametrize("tries", [count("MEGATRAIN_FAULTS_SAVES", 6)])
@pytest.mark.timeout(7200)
def test_killed_within_saves(house, measured, tries):
    """Rank 0 dies of itself at a chosen operation, the others with it; each try goes on with the run that the last one left."""
    run, number = house.run("saves_0"), 0
    for turn in range(tries):
        operation = 40 + (turn * 97) % 173 if tries > 1 else 40
        act = {"what": "kill", "where": "file", "at": operation, "ranks": [turn % SIZE]}
        name = f"saves_{number}"
        run = house.run(name)
        with house.start(MAIN, name, "checkpoint.save_every=1", "train.hang_timeout_seconds=20", act=act) as job:
            await_that(lambda job=job: any(p.poll() is not None for p in job.processes), "a rank ends")
            for process in job.processes:
                process.kill()
            ended = job.finish()
        check_whole(run)
        if codes(ended) == [0] * SIZE:
            number += 1
    with house.start(MAIN, f"saves_{number}", "checkpoint.save_every=1") as job:
        ended = job.finish()
    run = house.run(f"saves_{number}")
    assert codes(ended) == [0] * SIZE, said(ended)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".") and path.name != ".lock"] == []
    measured.recovered(lost=lost(run))
    jobs.same(run, house.undisturbed(MAIN), STEPS)


def check_whole(run):
    """The newest checkpoint that has a name is whole, and `latest` names one that is."""
    from megatrain.checkpoint.directory import catalogue, latest

    folder = run / "checkpoints"
    listed = catalogue(folder)
    assert [reason for _, _, reason in listed if reason] == []
    assert not latest(folder) or latest(folder) in [path.name for path, _, _ in listed]
