"""Hundreds of faults in one run that restarts itself: its weights are those of the run that nothing happened to.

MEGATRAIN_FAULTS_KILLS=200    kills at random moments (5)
MEGATRAIN_FAULTS_STEPS=2000   steps of the soak, which has a random fault every 100 (200)
"""

import json
import os
import random
import signal
import sys
import time

import jobs
import psutil
import pytest
from breaking import LAYOUTS, MAIN, ROOT, await_that, count, kinds, lost

SIZE = LAYOUTS[MAIN].size
KILLS, SOAK = count("MEGATRAIN_FAULTS_KILLS", 5), count("MEGATRAIN_FAULTS_STEPS", 200)


def launch(house, name, *more, restarts):
    """Start a run by the launch script, whose agent starts its ranks again."""
    words = house.words(MAIN, name, *more)
    env = {**jobs.environment(), "PYTHON": sys.executable, "MAX_RESTARTS": str(restarts)}
    job = jobs.Job(house.folder / f"job_{name}_{time.monotonic_ns()}")
    job.start(["bash", str(ROOT / "launch/local.sh"), str(SIZE), *words], env)
    return job


def ranks(job):
    """The processes of a launcher's ranks that are there just now."""
    try:
        return [one for one in psutil.Process(job.processes[0].pid).children() if "train" in one.cmdline()]
    except psutil.NoSuchProcess:
        return []


class Rows:
    """How many rows a run's file of metrics has, read as it grows."""

    def __init__(self, run):
        self.path, self.read, self.rows = run / "metrics.jsonl", 0, 0

    def count(self):
        if self.path.exists() and self.path.stat().st_size > self.read:
            with self.path.open("rb") as file:
                file.seek(self.read)
                part = file.read()
            self.read += len(part)
            self.rows += part.count(b'"grad_norm"')
        return self.rows

    def wait(self, job, rows, seconds=180.0):
        """Wait until so many rows are there; False if the job ends before."""
        deadline = time.monotonic() + seconds
        while self.count() < rows:
            if not job.alive():
                return False
            assert time.monotonic() < deadline, f"{self.rows} of {rows} rows after {seconds:g} s"
            time.sleep(0.01)
        return True


def undisturbed(house, name, steps):
    """The weights after `steps` steps of a run that nothing happens to."""
    with jobs.start(house.folder / f"job_{name}", house.words(MAIN, name, *steps_of(steps)), SIZE) as job:
        ended = job.finish(60 + steps)
    assert [end.code for end in ended] == [0] * SIZE, ended
    return house.run(name)


def steps_of(steps):
    return [f"train.steps={steps}", "checkpoint.save_every=10", "checkpoint.keep=2"]


def same(run, whole, steps):
    """Weights and moments are equal to the bit, and so is every row that was written; a full disk takes no more."""
    ours, theirs = jobs.rows(run), jobs.rows(whole)
    assert {step: row for step, row in ours.items() if theirs[step] != row} == {}
    assert jobs.checkpoint_bytes(run, steps) == jobs.checkpoint_bytes(whole, steps)
    return len(theirs) - len(ours)


@pytest.mark.slow
@pytest.mark.fault(
    injection="{kills} times kill -9 of a random rank at a random moment, under restarts",
    promise="final weights and moments are the undisturbed run's, to the bit; recovered after: the average of a restart",
    layout=MAIN,
)
@pytest.mark.parametrize("kills", [KILLS])
@pytest.mark.timeout(4 * 3600)
def test_kills_at_random_moments(house, measured, kills):
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"random.Random({seed})")
    chance, run, took = random.Random(seed), house.run("kills"), []
    steps = 16 * kills + 20
    rows = Rows(run)
    with launch(house, "kills", *steps_of(steps), restarts=2 * kills + 10) as job:
        for _ in range(kills):
            if chance.random() < 0.2:
                await_that(lambda: len(ranks(job)) == SIZE, "all ranks are started")
                time.sleep(chance.uniform(0.0, 4.0))
            else:
                assert rows.wait(job, rows.count() + chance.randint(1, 25))
                time.sleep(chance.uniform(0.0, 0.1))
            there = ranks(job)
            assert there, job.ended(0) if not job.alive() else "no rank"
            chance.choice(there).kill()
            began, seen = time.monotonic(), rows.count()
            assert rows.wait(job, seen + 2)  # the ranks that are left may report a step more
            took.append(time.monotonic() - began)
        (ended,) = job.finish(120 + steps)
    assert ended.code == 0, ended.err[-3000:]
    print(
        f"{kills} kills, restarts took {sum(took) / kills:.1f} s on average, at most {max(took):.1f} s; {lost(run)} steps lost"
    )
    measured.recovered(sum(took) / kills, round(lost(run) / kills))
    assert same(run, undisturbed(house, "kills_whole", steps), steps) == 0
    assert len(kinds(run, "resume", "start")) > kills / 2


def kill(job, chance, rows):
    chance.choice(ranks(job)).kill()


def hold(job, chance, rows):
    """Two seconds are less than any limit."""
    victim = chance.choice(ranks(job))
    victim.suspend()
    time.sleep(2.0)
    victim.resume()


def fill_disk(job, chance, rows):
    """Any file that would grow beyond 20 kB does not, until the next checkpoint is due and a while longer."""
    there = ranks(job)
    for one in there:
        one.rlimit(psutil.RLIMIT_FSIZE, (20_000, -1))
    time.sleep(3.0)
    for one in there:
        if one.is_running():
            one.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))


def slow_down(job, chance, rows):
    """One rank gets a third of its time."""
    victim, end = chance.choice(ranks(job)), time.monotonic() + 4.0
    while time.monotonic() < end and victim.is_running():
        victim.suspend()
        time.sleep(0.02)
        victim.resume()
        time.sleep(0.01)


FAULTS = {"kill": kill, "stop and go on": hold, "SIGTERM": None, "disk full": fill_disk, "slow rank": slow_down}


@pytest.mark.slow
@pytest.mark.fault(
    injection="{steps} steps with a random fault every 100: kill, stop and go on, SIGTERM, disk full, slow rank",
    promise="final weights and moments are the undisturbed run's, to the bit",
    layout=MAIN,
)
@pytest.mark.parametrize("steps", [SOAK])
@pytest.mark.timeout(4 * 3600)
def test_the_soak(house, measured, steps):
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"random.Random({seed})")
    chance, run, told = random.Random(seed), house.run("soak"), []
    words = [*steps_of(steps), "train.hang_timeout_seconds=30"]
    job, at = launch(house, "soak", *words, restarts=50), 100
    rows, starts, slowest = Rows(run), 1, 0.0
    try:
        while at < steps:
            await_that(lambda at=at, job=job: reached(run, rows) >= at or not job.alive(), f"step {at}", 600.0)
            assert job.alive(), job.ended(0)
            fault = chance.choice(list(FAULTS))
            began, seen = time.monotonic(), rows.count()
            if FAULTS[fault] is None:
                job.processes[0].send_signal(signal.SIGTERM)
                (ended,) = job.finish(120)
                assert ended.code in (75, 0), ended.err[-3000:]
                if ended.code == 0:
                    break
                job, starts = launch(house, "soak", *words, restarts=50), starts + 1
            else:
                FAULTS[fault](job, chance, rows)
            rows.wait(job, seen + 2)
            slowest = max(slowest, time.monotonic() - began)
            told.append(f"{fault} at {at}")
            at += 100
        (ended,) = job.finish(120 + steps)
    finally:
        job.__exit__()
    assert ended.code == 0, ended.err[-3000:]
    missing = same(run, undisturbed(house, "soak_whole", steps), steps)
    print(f"{', '.join(told)}; {starts} starts, {lost(run) + missing} steps lost, {missing} rows not written")
    measured.recovered(slowest, max(0, lost(run) + missing))


def reached(run, rows):
    """The last step that was recorded."""
    if not rows.count():
        return 0
    with rows.path.open("rb") as file:
        file.seek(max(0, rows.path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    steps = [json.loads(line)["step"] for line in lines[1:] if b'"grad_norm"' in line]
    return max(steps, default=0)
