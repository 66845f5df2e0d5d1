"""What else is on a run's machine: a process that writes into its store, a run with its log.dir, memory and secrets that stay behind."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jobs
import pytest
from breaking import LAYOUTS, MAIN, STEPS, codes, first_row, kinds, said
from torch.distributed import PrefixStore, TCPStore

from megatrain.lifecycle.blame import Identity, State, Verdict
from megatrain.runtime.launch import Launch
from megatrain.transport.board import Board
from megatrain.transport.leftovers import leftovers
from megatrain.transport.owner import Owner

SIZE = LAYOUTS[MAIN].size


@pytest.mark.fault(
    injection="a stranger at the store's port writes alarms, states and a verdict that names a pid, with escape codes",
    promise="nothing happens: no process dies, no code reaches the log, the result is the undisturbed run's, to the bit",
    layout=MAIN,
)
def test_a_stranger_at_the_store(house, monkeypatch):
    """It knows the names of all keys, and lacks the ranks' own key alone."""
    port = jobs.free_port()
    monkeypatch.setattr(jobs, "free_port", lambda: port)
    bystander = subprocess.Popen(["sleep", "300"])
    act = {"what": "slow", "where": "step", "at": 2, "ranks": [1], "seconds": 0.15}
    try:
        with house.start(MAIN, "stranger", act=act) as job:
            assert jobs.wait_for_rows(job, house.run("stranger"), 3)
            launch = Launch.from_environment(jobs.environment(0, SIZE, port))
            victim = replace(Identity.own(1), pid=bystander.pid, born=Owner.of(bystander.pid).born)
            assert victim.condition() == "running"
            store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            for prefix in (f"guard/{launch.store_prefix}", "guard/megatrain"):
                for key in (b"", launch.key):
                    board = Board(PrefixStore(prefix, store), 4.0, key)
                    for of_all in ("judge", "where"):
                        board.write(of_all, "0")
                    board.write("verdict", Verdict("hang", (1,), "\x1b[2Jall is lost", (victim,)).as_json())
                    for rank in range(SIZE):
                        board.write(f"identity/{rank}", victim.text())
                        board.write(f"state/{rank}", State(rank, "failed", "\x1b[31m").text())
                        board.write(f"wake/{rank}", "alarm")
            assert jobs.row_count(house.run("stranger")) < STEPS, "it came in time"
            ended = job.finish()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert codes(ended) == [0] * SIZE, said(ended)
    assert not any(letter in end.out + end.err for end in ended for letter in ("\x1b", "all is lost")), ended
    assert kinds(house.run("stranger"), "hang", "death") == []
    jobs.same(house.run("stranger"), house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="SIGKILL of all ranks as they have made the files of their shared memory",
    promise="the next start of the same user removes what is left in /dev/shm",
    layout="dp 2",
)
def test_memory_that_killed_ranks_leave(house, measured):
    run, large = house.run("leftovers"), ("model.hidden_size=256", "train.steps=4")
    with house.start("dp 2", "leftovers", *large, act={"what": "kill", "where": "mapping"}) as job:
        owners = {f"-{process.pid}-" for process in job.processes}
        assert codes(job.finish()) == [-signal.SIGKILL] * 2

    def left():
        return [path for path in leftovers() if any(owner in path.name for owner in owners)]

    assert left()
    with house.start("dp 2", "leftovers", *large) as job:
        measured.recovered(first_row(job, run, 0))
        assert left() == []
        ended = job.finish()
    assert codes(ended) == [0, 0], said(ended)


@pytest.mark.fault(
    injection="a second run with the log.dir of a live one, and checkpoints elsewhere",
    promise="refused on all ranks, and the first is the undisturbed run, to the bit",
    layout=MAIN,
    bound=30,
)
def test_two_runs_with_one_log_dir(house, measured):
    run = house.run("logged")
    with house.start(MAIN, "logged", "train.hang_timeout_seconds=600") as job:  # it is stopped meanwhile
        assert jobs.wait_for_rows(job, run, 4)
        for process in job.processes:
            process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        refused = house.finish(MAIN, "logged", f"checkpoint.dir={house.folder / 'elsewhere'}")
        measured.detected(time.monotonic() - began)
        for process in job.processes:
            process.send_signal(signal.SIGCONT)
        ended = job.finish()
    assert codes(refused) == [1] * SIZE and not (house.folder / "elsewhere").exists()
    assert all(f"another run keeps its log in log.dir={run}: process" in end.err for end in refused), said(refused)
    assert codes(ended) == [0] * SIZE, said(ended)
    assert jobs.row_count(run) == STEPS, "no row of the other"
    jobs.same(run, house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="log.dir is deleted during the run, checkpoints are elsewhere",
    promise="told, made again, and the last checkpoint is the undisturbed run's, to the bit",
    layout=MAIN,
)
def test_a_log_dir_that_is_deleted(house):
    run, kept = house.run("deleted"), house.folder / "kept"
    act = {"what": "slow", "where": "step", "at": 2, "ranks": [1], "seconds": 0.1}
    with house.start(MAIN, "deleted", f"checkpoint.dir={kept / 'checkpoints'}", act=act) as job:
        assert jobs.wait_for_rows(job, run, 5)
        shutil.rmtree(run)
        ended = job.finish()
    assert codes(ended) == [0] * SIZE, said(ended)
    assert said(ended).count("was removed while the run goes on; from here on it is written anew") == 1, said(ended)
    assert max(jobs.rows(run)) == STEPS and kinds(run, "end")
    assert jobs.checkpoint_bytes(kept, STEPS) == jobs.checkpoint_bytes(house.undisturbed(MAIN), STEPS)


@pytest.mark.fault(
    injection="secrets in variables of the environment, by name and within values",
    promise="none is in environment.txt or any other file of the run, which are of mode 0600",
    layout="1 rank",
)
def test_secrets_of_the_environment(house):
    names = ("MYSQL_PWD", "SSH_PASS", "GITHUB_PAT", "BEARER", "NCCL_TOKEN", "SLURM_JWT")
    secrets = {**dict.fromkeys(names, "hush1234"), "LC_ALL": "C.UTF-8;Password=hush1234", "NCCL_DEBUG": "INFO"}
    with jobs.Job(house.folder / "job_secrets") as job:
        words = ["train", *house.words("1 rank", "secrets", "train.steps=4")]
        job.start([sys.executable, "-m", "megatrain", *words], {**jobs.environment(), **secrets})
        (ended,) = job.finish()
    assert ended.code == 0, ended
    (launched,) = (house.run("secrets") / "launches").iterdir()
    kept = (launched / "environment.txt").read_text()
    assert "NCCL_DEBUG=INFO\n" in kept and (launched / "environment.txt").stat().st_mode & 0o777 == 0o600
    for file in (file for file in house.run("secrets").rglob("*") if file.is_file()):
        assert b"hush1234" not in file.read_bytes(), file
