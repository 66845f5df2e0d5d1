"""Kill it at any moment, tell it to stop, start it again: the run goes on as if nothing had happened, to the bit."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jobs
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with data and a config: dropout, checkpoints every second step, deterministic."""
    folder = tmp_path_factory.mktemp("crash")
    jobs.write_store(folder / "data")
    tree = jobs.tiny(
        folder / "data",
        folder / "run",
        model={"dropout": 0.1},
        train={"steps": STEPS, "deterministic": True},
        checkpoint={"save_every": 2},
    )
    jobs.write_config(folder / "config.yaml", tree)
    return folder


def words(house: Path, run: str, *more: str) -> list[str]:
    """The words of a run in a directory of its own."""
    return [str(house / "config.yaml"), f"log.dir={house / run}", *more]


@pytest.fixture(scope="module")
def uninterrupted(house) -> Path:
    """The run that nothing happened to, in one process."""
    (ended,) = jobs.train(house / "job", *words(house, "whole"))
    assert ended.code == 0, ended.err
    assert len(jobs.rows(house / "whole")) == STEPS
    return house / "whole"


@pytest.fixture(scope="module")
def uninterrupted_pair(house) -> Path:
    """The same under tensor parallelism 2, in two processes."""
    ended = jobs.train(house / "job_pair", *words(house, "whole_pair", *PAIR), size=2)
    assert [e.code for e in ended] == [0, 0], ended
    return house / "whole_pair"


PAIR = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")


def check_resume(run: Path) -> None:
    """The last start went on from the newest whole checkpoint, or anew where there was none."""
    events = jobs.events(run)
    starts = [i for i, event in enumerate(events) if event["event"] in ("start", "resume")]
    known = [event["step"] for event in events[: starts[-1]] if event["event"] in ("save", "resume")]
    last = events[starts[-1]]
    if last["event"] == "start":
        assert not known, events
    else:
        # A kill between the rename and the event leaves a checkpoint that no event tells of.
        assert last["step"] in {max(known, default=0), max(known, default=0) + 2}, events
        assert Path(last["checkpoint"]).name == f"step_{last['step']:08d}"


def kill_at_random_moments(house: Path, uninterrupted: Path, name: str, kills: int, seed: int) -> int:
    """Start, kill -9, start again ...; how many starts found a checkpoint. A finished run is followed by another."""
    generator = random.Random(seed)
    number, killed, resumed = 0, 0, 0
    while True:
        run = house / f"{name}_{number}"
        with jobs.start(house / "killed" / run.name, words(house, run.name)) as job:
            if killed < kills:
                strike(job, run, generator)
            (ended,) = job.finish()
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if (run / "events.jsonl").exists() and (run / "events.jsonl").stat().st_size:
            check_resume(run)
            resumed += jobs.events(run)[-1]["event"] != "start"
        if ended.code == 0:
            jobs.same(run, uninterrupted, STEPS)
            if killed == kills:
                return resumed
            number += 1
        else:
            killed += 1


def strike(job: jobs.Job, run: Path, generator: random.Random) -> None:
    """Kill every process of a job at a random moment: one in five while the program starts, the others in steps and saves."""
    if generator.random() < 0.2:
        time.sleep(generator.uniform(0.0, 3.0))
    elif not jobs.wait_for_rows(job, run, jobs.row_count(run) + generator.randint(1, 4)):
        return
    else:
        time.sleep(generator.uniform(0.0, 0.12))
    for process in job.processes:
        process.kill()


def test_killed_and_started_again(house, uninterrupted):
    assert kill_at_random_moments(house, uninterrupted, "twice", 2, seed=1) >= 1


@pytest.mark.slow
def test_killed_twenty_times_and_started_again(house, uninterrupted):
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"random.Random({seed})")
    assert kill_at_random_moments(house, uninterrupted, "twenty", 20, seed) >= 5


@pytest.mark.slow  # as test_signals.py's under the launch script, which starts the ranks again by itself
def test_one_of_two_ranks_killed_under_torchrun(house):
    """The launcher ends the other; started again, here without it, both go on."""
    run = house / "pair"
    with jobs.torchrun(house / "job_pair_killed", 2, *words(house, "pair", *PAIR)) as job:
        assert jobs.wait_for_rows(job, run, 9)
        os.kill(workers(job)[1], signal.SIGKILL)
        (ended,) = job.finish()
    assert ended.code == 1
    assert 9 <= len(jobs.rows(run)) < STEPS
    lines = [["train", *words(house, name, *PAIR)] for name in ("pair", "pair_uninterrupted")]
    answers = jobs.commands(house / "job_pair_again", lines, 2)
    assert [answer.code for each in answers for answer in each] == [0] * 4, answers
    check_resume(run)
    jobs.same(run, house / "pair_uninterrupted", STEPS)


def workers(job: jobs.Job) -> list[int]:
    """Process numbers of a launcher's workers, in order of their start."""
    launcher = job.processes[0].pid
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def test_told_to_stop_it_saves_and_exits_with_75(house, uninterrupted):
    """N steps are k steps, a checkpoint, and N - k steps."""
    run = house / "stopped"
    with jobs.start(house / "job_stopped", words(house, "stopped", "checkpoint.save_every=0")) as job:
        assert jobs.wait_for_rows(job, run, 5)
        while job.alive():  # to its very end
            job.processes[0].terminate()
            time.sleep(0.01)
        (ended,) = job.finish()
    assert ended.code == os.EX_TEMPFAIL == 75, ended.err
    assert (run / "preempted").exists()
    done = max(jobs.rows(run))
    assert 5 <= done < STEPS
    assert f"stopped at step {done} with a checkpoint saved" in ended.out
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{done:08d}"
    assert [event["event"] for event in jobs.events(run)] == ["start", "save", "signal"]
    (ended,) = jobs.train(house / "job_stopped_again", *words(house, "stopped", "checkpoint.save_every=0"))
    assert ended.code == 0, ended.err
    assert f"at step {done}\n" in ended.out and "changed since" not in ended.out
    assert not (run / "preempted").exists()
    assert [event["event"] for event in jobs.events(run)][3:] == ["resume", "save", "end"]
    assert jobs.row_count(run) == STEPS
    jobs.same(run, uninterrupted, STEPS)


def test_a_finished_run_started_again_has_nothing_to_do(house, uninterrupted):
    before = jobs.checkpoint_bytes(uninterrupted, STEPS)
    (ended,) = jobs.train(house / "job_again", *words(house, "whole"))
    assert ended.code == 0
    assert f"nothing to do: step {STEPS} of train.steps={STEPS} is done. Raise train.steps to go on." in ended.out
    assert jobs.row_count(uninterrupted) == STEPS
    assert jobs.checkpoint_bytes(uninterrupted, STEPS) == before


@pytest.mark.slow
def test_the_launch_script_gives_75_and_goes_on(house, uninterrupted_pair):
    """torchrun itself exits with 1; a signal to the script alone stops all ranks."""
    run = house / "script"
    command = ["bash", str(ROOT / "launch/local.sh"), "2", *words(house, "script", *PAIR, "checkpoint.save_every=0")]
    env = {**jobs.environment(), "PYTHON": os.environ.get("PYTHON", "") or sys.executable}
    with jobs.Job(house / "job_script") as job:
        job.start(command, env)
        assert jobs.wait_for_rows(job, run, 5)
        job.processes[0].terminate()
        (ended,) = job.finish()
    assert ended.code == 75, ended.err
    assert (run / "preempted").exists()
    done = max(jobs.rows(run))
    assert 5 <= done < STEPS
    with jobs.Job(house / "job_script_again") as job:
        job.start(command, env)
        (ended,) = job.finish()
    assert ended.code == 0, ended.err
    jobs.same(run, uninterrupted_pair, STEPS)


STAGES = "parallel.pipeline_parallel_size=2"
ELSEWHERE = {
    2: {
        "zb_v": [STAGES, "parallel.virtual_pipeline_size=2", "parallel.schedule=zb_v"],
        "zero 3, masters in halves": [
            "parallel.zero_stage=3",
            "train.micro_batch_size=2",
            "train.precision=bf16",
            "optim.master=split",
        ],
    },
    4: {
        "1f1b, recompute, tensor parallel": [
            STAGES,
            "train.recompute=full",
            "train.micro_batch_size=2",
            "parallel.tensor_parallel_size=2",
        ],
        "zero 1, pipeline": [STAGES, "parallel.zero_stage=1", "train.micro_batch_size=2"],
        "zero 2, pipeline": [STAGES, "parallel.schedule=zb_h1", "parallel.zero_stage=2", "train.micro_batch_size=2"],
    },
}
"""By number of processes. Four start for 20 s of two cores, and test_resume.py resumes every kind of layout in one process."""


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layouts_go_on_to_the_bit_and_their_weights_load_elsewhere(house, tmp_path, size):
    """6 steps; again from the checkpoint after 3; then replicas go on from the weights alone."""
    model = ["model.num_layers=4", "train.steps=6", "checkpoint.save_every=3"]
    layouts = ELSEWHERE[size]

    def line(run, *more):
        return ["train", str(house / "config.yaml"), f"log.dir={tmp_path / run}", *model, *more]

    answers = jobs.commands(tmp_path / "job", [line(f"whole {name}", *layout) for name, layout in layouts.items()], size)
    lines = []
    for name, layout in layouts.items():
        shutil.copytree(tmp_path / f"whole {name}", tmp_path / f"again {name}")
        shutil.rmtree(tmp_path / f"again {name}/checkpoints/step_00000006")
        resume = [f"checkpoint.resume={tmp_path / f'whole {name}/checkpoints/step_00000006'}", "checkpoint.weights_only=true"]
        lines += [line(f"again {name}", *layout), line(f"elsewhere {name}", "train.micro_batch_size=2", *resume)]
    answers += jobs.commands(tmp_path / "job", lines, size)
    assert {answer.code for each in answers for answer in each} == {0}, answers
    for name in layouts:
        whole, again, elsewhere = (tmp_path / f"{which} {name}" for which in ("whole", "again", "elsewhere"))
        assert [e["step"] for e in jobs.events(again) if e["event"] == "resume"] == [3]
        jobs.same(again, whole, 6)
        assert jobs.rows(elsewhere)[1]["loss"] < 0.99 * jobs.rows(whole)[1]["loss"]
