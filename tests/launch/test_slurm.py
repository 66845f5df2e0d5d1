"""Jobs on a real SLURM controller with two nodes: `bash launch/slurm_checks.sh` starts it and runs these (mark `slurm`).

Whatever is done to a job - pre-empted, signalled, a rank killed - its run ends with the losses of an undisturbed one, bit for bit.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jobs
import psutil
import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
STEPS = 80
CLUSTER = Path(os.environ.get("SLURM_CONF", "")).parent
UP = ("idle", "comp", "alloc", "mix")
"""States of nodes that jobs may have."""
SCRIPTS = {"slurm.sbatch": [], "srun.sbatch": ["--ntasks-per-node", "2"]}
"""The launch scripts, with what sbatch must be told for two ranks on a node."""


def slurm(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@dataclass(frozen=True)
class Submitted:
    """A job in the queue, or no more."""

    number: str
    run: Path
    output: Path

    def state(self):
        """`RUNNING` and so on, with how often it was put back."""
        said = slurm("scontrol", "show", "job", "--oneliner", self.number)
        return re.search(r"JobState=(\w+)", said)[1], int(re.search(r"Restarts=(\d+)", said)[1])

    def wait_for_rows(self, count):
        """Until so many steps were recorded."""
        jobs.await_rows(self.run, count, lambda: f"{self.state()} {self.said()}")

    def wait(self, seconds=150.0):
        """Until it has ended; its state."""
        deadline = time.monotonic() + seconds
        while (state := self.state()[0]) in ("PENDING", "RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < deadline, f"{state}: {self.why()}: {self.said()[-3000:]}"
            time.sleep(0.3)
        return state

    def why(self):
        """What it waits for, and the state of the nodes."""
        reason = slurm("squeue", "--noheader", "--jobs", self.number, "--format", "%r, %S")
        return f"{reason}; {slurm('sinfo', '--noheader', '--Node', '--format', '%N %t %E')}"

    def said(self):
        """What the job has printed."""
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A store of tokens and a config of 4 ranks: tp 2 x dp 2."""
    house = tmp_path_factory.mktemp("slurm")
    tree = jobs.tiny(
        jobs.write_store(house / "data"),
        house / "run",
        train={"steps": STEPS, "micro_batch_size": 2},
        parallel={"tensor_parallel_size": 2},
        checkpoint={"save_every": 20},
    )
    jobs.write_config(house / "config.yaml", tree)
    return house


@pytest.fixture(scope="module")
def undisturbed(house):
    return jobs.undisturbed(house, 4)


@pytest.fixture
def submit(house, tmp_path):
    """Submit a script for two nodes; afterwards nothing is left in the queue or among the processes."""
    submitted = []

    def submit(script, *options, words=(), run=None, **variables):
        run = tmp_path / "run" if run is None else run
        env = {key: value for key, value in os.environ.items() if not key.startswith((*jobs.LAUNCHERS, "TRITON_"))}
        env["SLURM_CONF"] = os.environ["SLURM_CONF"]
        env.update(PYTHON=sys.executable, MEGATRAIN_ROOT=str(ROOT), NPROC_PER_NODE="2", OMP_NUM_THREADS="1", **variables)
        output = tmp_path / "output.txt"
        nodes = [] if "--nodes" in options else ["--nodes", "2"]
        tasks = [] if "--nodes" in options else SCRIPTS[script]  # else NPROC_PER_NODE says it
        command = ["sbatch", "--parsable", *nodes, "--exclusive", "--output", str(output), *tasks, *options]
        command += [str(ROOT / "launch" / script), *(words or [str(house / "config.yaml"), f"log.dir={run}"])]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
        submitted.append(Submitted(done.stdout.strip(), run, output))
        return submitted[-1]

    yield submit
    for job in submitted:
        subprocess.run(["scancel", job.number], check=False, timeout=60)
    deadline = time.monotonic() + 60
    while slurm("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.3)
    assert slurm("squeue", "--noheader") == ""
    assert processes(tmp_path) == []


def processes(run, *, workers=False):
    """Processes of a run: those that name it in their command line. workers: only those that train, in order of their start."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        trains = "train" in words[1:5]  # python [-u] -m megatrain train; the launcher has its own options before
        if any(str(run) in word for word in words) and (trains or not workers):
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_nodes_train_as_one_machine_does(submit, undisturbed, script):
    job = submit(script)
    assert job.wait() == "COMPLETED", job.said()
    jobs.same(job.run, undisturbed, STEPS)
    assert "4 ranks (2 on this node)" in job.said() and f"step {STEPS}/{STEPS}" in job.said()
    (launched,) = (job.run / "launches").iterdir()
    kept = {path.name for path in launched.iterdir()}
    assert {"config.yaml", "slurm_script", "environment.txt", "command.txt"} <= kept
    assert f"SLURM_JOB_ID={job.number}" in (launched / "environment.txt").read_text()
    assert sorted(path.name for path in (job.run / "logs").glob("*.err")) == [f"rank_{n:05d}.err" for n in range(4)]


def both(first):
    """Both scripts, of which the second run takes its time: bash launch/slurm_checks.sh --all."""
    return pytest.mark.parametrize("script", [s if s == first else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS])


@both("srun.sbatch")
def test_pre_empted_in_mid_run_it_goes_on(submit, undisturbed, script):
    job = submit(script)
    job.wait_for_rows(20)
    command = ["sbatch", "--partition", "high", "--nodes", "2", "--exclusive", "--output", "/dev/null", "--wrap", "sleep 2"]
    slurm(*command)
    assert job.wait() == "COMPLETED", job.said()
    assert job.state()[1] == 1
    check_stopped_and_resumed(job, undisturbed)


@both("slurm.sbatch")
def test_the_signal_before_the_time_limit(submit, undisturbed, script):
    """SLURM sends --signal to the step, not to the script."""
    job = submit(script)
    job.wait_for_rows(20)
    slurm("scancel", "--signal=USR2", job.number)
    assert job.wait() == "COMPLETED", job.said()
    assert job.state()[1] == 1
    check_stopped_and_resumed(job, undisturbed)


@pytest.mark.slow
def test_a_signal_to_the_script_alone(submit, undisturbed):
    """--signal=B:USR2 and scancel --batch."""
    job = submit("slurm.sbatch")
    job.wait_for_rows(20)
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    assert job.wait() == "COMPLETED", job.said()
    check_stopped_and_resumed(job, undisturbed)


def check_stopped_and_resumed(job, undisturbed):
    """It saved when it was told to stop, and lost no step."""
    kinds = [event["event"] for event in jobs.events(job.run)]
    assert kinds.count("signal") == kinds.count("resume") == 1, kinds
    assert jobs.row_count(job.run) == STEPS
    jobs.same(job.run, undisturbed, STEPS)


@pytest.mark.slow
def test_the_end_of_its_time_is_read_from_slurm(submit, house, tmp_path):
    """A limit of one minute, half of which is margin: it stops by itself, is put back, and goes on."""
    run, steps = tmp_path / "run", 500
    job = submit(
        "srun.sbatch",
        "--time",
        "1",
        "--signal",
        "USR2@1",
        words=[str(house / "config.yaml"), f"log.dir={run}", f"train.steps={steps}"],
    )
    assert job.wait(280) == "COMPLETED", job.said()
    told = [event["message"] for event in jobs.events(run) if event["event"] == "signal"]
    assert told and set(told) == {"the end of the job's time"}
    assert job.state()[1] == len(told) and jobs.row_count(run) == steps


@both("slurm.sbatch")
def test_cancelled_it_saves_and_stays_out_of_the_queue(submit, script):
    job = submit(script)
    job.wait_for_rows(20)
    slurm("scancel", job.number)
    assert job.wait() == "CANCELLED", job.said()
    time.sleep(1.0)
    assert job.state() == ("CANCELLED", 0)
    done = max(jobs.rows(job.run))
    assert (job.run / "checkpoints/latest").read_text().strip() == f"step_{done:08d}"
    assert json.loads((job.run / "preempted").read_text())["step"] == done


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_rank_is_killed(submit, undisturbed, script):
    """All end, the error names it, and the same job goes on from the newest checkpoint."""
    job = submit(script)
    job.wait_for_rows(30)
    processes(job.run, workers=True)[3].send_signal(signal.SIGKILL)
    assert job.wait() == "COMPLETED", job.said()
    assert job.state()[1] == 0
    jobs.same(job.run, undisturbed, STEPS)
    kinds = [event["event"] for event in jobs.events(job.run)]
    assert kinds.count("death") >= 1 and kinds.count("resume") == 1, kinds
    (resumed,) = [event["step"] for event in jobs.events(job.run) if event["event"] == "resume"]
    assert resumed in range(20, STEPS, 20)


@pytest.fixture
def lose():
    """Take the power from a node: its daemon and all that it runs; SLURM is told, which would find out by itself after SlurmdTimeout."""
    lost = []

    def lose(node):
        lost.append(node)
        daemon = psutil.Process(int((CLUSTER / f"slurmd-{node}.pid").read_text()))
        tasks = [process for process in psutil.process_iter() if node_of(process) == node]
        gone = [daemon, *{step_of(task) for task in tasks}, *tasks]
        # All at once: a srun that hears of its parent's or helper's end would end its steps on other nodes.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in reversed(gone):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def back():
        while lost:
            node, deadline = lost.pop(), time.monotonic() + 60
            subprocess.run(["slurmd", "-N", node], check=True, timeout=60)
            while (state := slurm("sinfo", "--noheader", "--Node", "--nodes", node, "--format", "%t").split())[0] not in UP:
                assert time.monotonic() < deadline, f"{node} does not come back, it is {state[0]}"
                time.sleep(0.3)

    lose.back = back
    yield lose
    back()


def node_of(process):
    """The node that a process runs on as a task of a job; None for others."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("SLURMD_NODENAME")


def step_of(task):
    """The daemon of a task's step."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while not task.name().startswith("slurmstepd"):
            task = task.parent()
    return task


def check_went_on(job, undisturbed, told):
    """It went on from its newest checkpoint with one node, whose ranks took the same batches in twice as many micro-batches."""
    assert job.wait() == "COMPLETED", job.said()
    assert told in job.said() and "2 ranks (2 on this node)" in job.said()
    resumed = [event["step"] for event in jobs.events(job.run) if event["event"] == "resume"]
    assert len(resumed) == 1 and resumed[0] in range(20, STEPS, 20)
    ours, theirs = jobs.rows(job.run), jobs.rows(undisturbed)
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert [ours[step]["loss"] for step in ours] == pytest.approx([theirs[step]["loss"] for step in ours], rel=1e-4)
    assert {step: row["tokens"] for step, row in ours.items()} == {step: row["tokens"] for step, row in theirs.items()}
    before = min(resumed[0], 20)
    assert all(ours[step] == theirs[step] for step in range(1, before + 1)), "with both nodes, to the bit"


@both("slurm.sbatch")
def test_a_lost_node_leaves_the_run_to_the_others(submit, lose, undisturbed, script):
    """In the same job: data-parallel size 2 -> 1."""
    job = submit(script, "--no-kill", MIN_NODES="1")
    job.wait_for_rows(30)
    lose("n2")
    check_went_on(job, undisturbed, "1 of 2 nodes are there; the run goes on with 1 of them, from its newest checkpoint")
    assert job.state()[1] == 0


@pytest.mark.slow  # SLURM takes minutes to notice
@pytest.mark.parametrize("option", ["--no-kill", "--requeue"])
def test_a_lost_first_node_has_the_job_start_again_with_fewer(submit, lose, undisturbed, option):
    """The script dies with it. SLURM, or the guard on the other node, puts the job back into the queue; it takes what there is."""
    job = submit("srun.sbatch", option, "--nodes", "1-2", MIN_NODES="1")
    job.wait_for_rows(22)
    lose("n1")
    check_went_on(job, undisturbed, "")
    assert job.state()[1] == 1


@pytest.mark.slow  # the same
def test_without_min_nodes_it_waits_for_the_lost_node(submit, lose, undisturbed):
    job = submit("srun.sbatch")
    job.wait_for_rows(30)
    lose("n2")
    deadline = time.monotonic() + 60
    while job.state() != ("PENDING", 1):
        assert time.monotonic() < deadline, f"{job.state()}: {job.said()}"
        time.sleep(0.3)
    lose.back()
    assert job.wait() == "COMPLETED", job.said()
    jobs.same(job.run, undisturbed, STEPS)


def test_a_chain_of_an_array_is_one_run(submit, undisturbed):
    """Put back, a task of an array goes on; the next task finds the run done."""
    job = submit("slurm.sbatch", "--array", "1-2%1")
    job.wait_for_rows(20)
    slurm("scancel", "--signal=USR2", f"{job.number}_1")
    deadline = time.monotonic() + 150
    while slurm("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.3)
    kinds = [event["event"] for event in jobs.events(job.run)]
    assert kinds.count("signal") == 1 and kinds.count("resume") == 2, kinds
    assert jobs.row_count(job.run) == STEPS and "nothing to do" in job.said()
    jobs.same(job.run, undisturbed, STEPS)


def test_a_wrong_config_is_told_once_and_not_tried_again(submit, house):
    job = submit("slurm.sbatch", words=[str(house / "config.yaml"), "train.stepz=3"])
    assert job.wait() == "FAILED"
    assert job.said().count("Did you mean train.steps?") == 1


@both("srun.sbatch")
def test_the_doctor_sees_both_nodes(submit, house, script):
    words = ["doctor", str(house / "config.yaml"), f"checkpoint.dir={house / 'doctor'}", "--json"]
    job = submit(script, words=words, run=house / "run")
    assert job.wait() == "COMPLETED", job.said()
    (line,) = [line for line in job.said().splitlines() if line.startswith("{")]
    said = json.loads(line)
    assert said["ok"] and [rank["rank"] for rank in said["ranks"]] == [0, 1, 2, 3]


def test_an_array_prepares_text_though_a_task_is_cancelled(tmp_path):
    """The tasks share a folder and nothing else; the bytes are those of one worker that is no job."""
    rows = [json.dumps({"text": f"Row {number} of many rows that are here to be read and counted."}) for number in range(4000)]
    (tmp_path / "raw.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "prepare.yaml").write_text(
        "read: {unit_bytes: 20000, sources: [{name: text, paths: [raw.jsonl], language: en, rules: []}]}\n"
        "dedup: {near: false, parts: 1}\ntokenize: {tokenizer: bytes}\n"
    )
    env = os.environ | {"PYTHON": sys.executable, "MEGATRAIN_ROOT": str(ROOT)}

    def begin(*command):
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=200
        ).stdout.strip()

    script = [str(ROOT / "launch/prepare.sbatch"), "prepare.yaml", "output.dir=array"]
    number = begin("sbatch", "--parsable", "--array", "0-2", "--output", str(tmp_path / "task-%a.txt"), *script)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "array/work").glob("documents-*/unit_*")):
        assert time.monotonic() < deadline, [path.read_text() for path in tmp_path.glob("task-*")]
        time.sleep(0.05)
    slurm("scancel", f"{number}_0")
    while slurm("squeue", "--noheader", "--jobs", number):
        assert time.monotonic() < deadline, slurm("squeue")
        time.sleep(0.3)
    begin(sys.executable, "-m", "megatrain", "data", "prepare", "prepare.yaml", "output.dir=local", "--worker")
    made = [
        {
            str(path.relative_to(out)): path.read_bytes().replace(b"array/", b"local/")
            for path in sorted(out.rglob("*"))
            if path.is_file() and "work" not in path.relative_to(out).parts
        }
        for out in (tmp_path / "array", tmp_path / "local")
    ]
    assert made[0] == made[1] and {"text.bin", "REPORT.md"} <= set(made[0])
    assert not list((tmp_path / "array").rglob("*.part")) and not list((tmp_path / "array/work/leases").iterdir())
