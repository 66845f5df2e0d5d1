"""SIGTERM, SIGUSR2 and SIGINT to the launch script (megatrain.lifecycle.agent), to plain torchrun and to one worker, at any moment.

The run ends with the code that docs/launching.md names, its checkpoint is whole, no process stays, and it goes on as if nothing had been.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jobs
import psutil
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 60
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
TARGETS = ("script", "torchrun", "worker")
AGENT = ["--standalone", "--nproc-per-node", "2", "-m", "megatrain", "train"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    house = tmp_path_factory.mktemp("signals")
    parts = {"parallel": {"tensor_parallel_size": 2}, "checkpoint": {"save_every": 0}, "train": {"steps": STEPS}}
    jobs.write_config(house / "config.yaml", jobs.tiny(jobs.write_store(house / "data"), house / "run", **parts))
    return house


@pytest.fixture(scope="module")
def undisturbed(house):
    return jobs.undisturbed(house, 2)


def start(house, run, target, *more):
    """Two ranks: by plain torchrun, by the script, or (`agent`) by what the script becomes, without its start."""
    words = [str(house / "config.yaml"), f"log.dir={run}", *more]
    folder = house / f"job_{time.monotonic_ns()}"
    if target == "torchrun":
        return jobs.torchrun(folder, 2, *words)
    job = jobs.Job(folder)
    (folder / "tmp").mkdir(parents=True)
    env = {**jobs.environment(), "PYTHON": sys.executable, "TMPDIR": str(folder / "tmp"), "GLOO_SOCKET_IFNAME": "lo"}
    if target == "agent":
        job.fork([str(ROOT / "megatrain/lifecycle/agent.py"), str(run), *AGENT, *words], env)
    else:
        job.start(["bash", str(ROOT / "launch/local.sh"), "2", *words], env)
    return job


def workers(run):
    """Processes that train this run; the launcher has its own options before the verb."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(run) in word for word in words) and "train" in words[1:5]:
            found.append(process)
    return found


def of_run(run):
    """All processes that name the run."""
    return [one for one in psutil.process_iter(["cmdline"]) if any(str(run) in word for word in one.info["cmdline"] or [])]


def strike(house, run, target, number, moment):
    """Start the run, send the signal once `moment(job)` has passed, wait for the end of all; how the first process ended."""
    with start(house, run, target) as job:
        moment(job)
        victim = job.processes[0]
        if target == "worker":
            deadline = time.monotonic() + 30
            while not (there := workers(run)) and job.alive() and time.monotonic() < deadline:
                time.sleep(0.005)
            victim = random.choice(there) if there else victim
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            victim.send_signal(number)
        (ended,) = job.finish()
        deadline = time.monotonic() + 30
        while of_run(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert of_run(run) == []
        assert target == "torchrun" or list((job.folder / "tmp").iterdir()) == []
    return ended


def marker(run):
    """What a run that was told to stop leaves."""
    return (run / "preempted").read_text() if (run / "preempted").exists() else ""


def check_end(run, target, number, ended, before=""):
    """What docs/launching.md says about exit codes. before: the marker of an earlier start."""
    if ended.code == 0:
        assert max(jobs.rows(run)) == STEPS
        return
    early = marker(run) == before
    if target == "torchrun":
        assert ended.code in (1, 128 + number, -number), ended
    elif target == "script":  # bash itself, before it has become Python, dies of the signal
        assert ended.code == 75 or (early and ended.code == -number), ended
    else:  # a worker that does not listen yet dies of it; SIGTERM at the start may mean that another worker failed
        known = number == signal.SIGTERM or f"ended with {number.name}" in ended.err
        assert ended.code == 75 or (early and ended.code == 1 and known), ended


def check_result(house, run, undisturbed):
    """Started until it is done, it is the undisturbed run."""
    go_on(house, run)
    assert jobs.row_count(run) == STEPS, "a step was lost and repeated"
    jobs.same(run, undisturbed, STEPS)


def go_on(house, run):
    """Train what is left, without a launcher."""
    words = [str(house / "config.yaml"), f"log.dir={run}"]
    ended = jobs.train(house / f"job_{time.monotonic_ns()}", *words, size=2, seconds=2 * jobs.SECONDS)
    assert [end.code for end in ended] == [0, 0], ended


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
def test_each_signal_in_mid_run(house, undisturbed, turn):
    """One run is struck three times: each signal, each target. The three turns send each signal to each target."""
    run = house / f"mid_{turn}"
    for count, number in enumerate(SIGNALS, 1):
        target = TARGETS[(count + turn) % 3]
        ended = strike(house, run, target, number, lambda job, rows=8 * count: jobs.wait_for_rows(job, run, rows))
        assert (run / "preempted").exists(), ended
        check_end(run, target, number, ended)
        assert ended.code == 75 or target == "torchrun"
        done = max(jobs.rows(run))
        assert (run / "checkpoints/latest").read_text().strip() == f"step_{done:08d}"
    check_result(house, run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_twenty_random_moments(house, undisturbed, number):
    """From the first millisecond to the end, over the three targets; a run that has ended makes place for the next."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"random.Random({seed})")
    chance = random.Random(seed)
    random.seed(seed)
    ends, run = [], house / f"random_{number.name}_0"
    for count in range(20):
        target = TARGETS[count % 3]
        before = marker(run)
        ended = strike(house, run, target, number, lambda job: time.sleep(chance.uniform(0.0, 8.0)))
        check_end(run, target, number, ended, before)
        ends.append(ended.code)
        if ended.code == 0 or count == 19:
            check_result(house, run, undisturbed)
            run = house / f"random_{number.name}_{count + 1}"
    print("exit codes", ends)


def test_a_killed_rank_is_started_again_and_a_run_that_stops_is_not(house, undisturbed):
    """MAX_RESTARTS: from the newest checkpoint. torchrun takes 75 for a failure too; the workers that it starts again end at once."""
    run = house / "restarts"
    words = [str(house / "config.yaml"), f"log.dir={run}", "checkpoint.save_every=8"]
    env = {**jobs.environment(), "PYTHON": sys.executable, "MAX_RESTARTS": "2"}
    with jobs.Job(house / "job_restarts") as job:
        job.start(["bash", str(ROOT / "launch/local.sh"), "2", *words], env)
        assert jobs.wait_for_rows(job, run, 12)
        workers(run)[1].kill()
        assert jobs.wait_for_rows(job, run, jobs.row_count(run) + 10)
        workers(run)[1].send_signal(signal.SIGUSR2)
        (ended,) = job.finish()
    assert ended.code == 75, ended.err
    assert of_run(run) == []
    events = [event for event in jobs.events(run) if event["event"] in ("start", "resume", "signal")]
    assert [event["event"] for event in events] == ["start", "resume", "signal"]
    assert events[1]["step"] in (8, 16)
    go_on(house, run)
    jobs.same(run, undisturbed, STEPS)


def test_a_run_that_cannot_save_has_failed(house):
    """Told to stop, and the directory of checkpoints has gone: the next start would lose work, so nothing must start it by itself."""
    run = house / "unsaved"
    with start(house, run, "agent", "checkpoint.give_up_after=2") as job:
        assert jobs.wait_for_rows(job, run, 10)
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("")
        job.processes[0].terminate()
        (ended,) = job.finish()
    assert ended.code == 1 and "told to stop, but the run has not saved" in ended.err, ended
    assert not (run / "preempted").exists()


def test_ctrl_c_again_ends_at_once(house):
    """While the others wait for a rank that is frozen."""
    run = house / "insisted"
    with start(house, run, "script") as job:
        assert jobs.wait_for_rows(job, run, 5)
        frozen = workers(run)[1]
        frozen.suspend()
        job.processes[0].send_signal(signal.SIGINT)
        time.sleep(3.3)
        job.processes[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
        frozen.resume()
        (ended,) = job.finish(15)
    assert ended.code == 130 and of_run(run) == [], ended
