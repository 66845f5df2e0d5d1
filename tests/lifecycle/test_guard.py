"""Hangs and deaths of real processes end every rank and name axis, call and culprit; who is to blame, as arithmetic."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
from torch.distributed import PrefixStore, TCPStore

from megatrain.lifecycle.blame import Identity, State, Verdict, behind, find_culprits, judge
from megatrain.runtime.launch import Launch
from megatrain.transport.board import Board
from megatrain.transport.owner import process

WORKER = """
import ctypes, os, signal, sys, time
import torch
from megatrain.config.schema import ParallelConfig
from megatrain.runtime.distributed import connect
from megatrain.transport.group import Handle, World
from megatrain.transport.host import Reading
from megatrain.transport.wrappers import Wrapper
from megatrain.runtime.launch import Launch
from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.sections import SectionLimits
from megatrain.lifecycle.stop import StopRequest, end_with_launcher

what, victim, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
launch = Launch.from_environment(os.environ)
guard = Guard(launch, SectionLimits(start=60.0, hang=timeout, save=timeout))
guard.on_event = lambda kind, rank, text: print("EVENT", kind, rank, flush=True)

def load_sample_that_never_comes():
    time.sleep(1000)

class Queued(Handle):
    def wait(self): pass
    def done(self): return False

class QueuedGroup(Wrapper):
    # As on a GPU: calls are put into a queue and waits return at once; the host waits where it reads.
    queue = []

    def barrier(self):
        self.inner.barrier()

    def _around(self, operation, larger, start, blocking):
        self.queue.append(start())
        return Queued()

    def start_to_host(self, tensor):
        return QueuedReading(tensor, list(self.queue))

class QueuedReading(Reading):
    def __init__(self, tensor, queue):
        super().__init__(tensor)
        self.queue = queue

    def wait(self):
        while self.queue:
            self.queue.pop(0).wait()
        return super().wait()

class QueuedWorld(World):
    def __init__(self, inner):
        self.inner, self.rank, self.size = inner, inner.rank, inner.size

    def group(self, name, ranks):
        return QueuedGroup(self.inner.group(name, ranks))

    def close(self):
        self.inner.close()

def misbehave():
    if what == "freeze":
        time.sleep(0.3)  # what was begun goes out
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        load_sample_that_never_comes()
    if what == "stuck":
        while True:
            ctypes.PyDLL(None).usleep(60_000_000)  # holds the interpreter: no thread of this process runs
    if what == "raise":
        raise ValueError("bad sample 17")

end_with_launcher(launch)
with StopRequest() as told, guard, guard.watching():
    with guard.section("set-up"):
        session = connect(launch, ParallelConfig(device="cpu"), timeout + 10, met=guard.meet)
        guard.join(session)
    if what.startswith("queued "):
        what, session.world.inner = what.removeprefix("queued "), QueuedWorld(session.world.inner)
    size, rank = session.world.size, session.rank
    pair = (0, 1) if rank < 2 else (2, 3)
    tp = session.world.group("tp", pair)
    dp = None if size == 2 else session.world.group("dp", (rank % 2, rank % 2 + 2))
    late = None
    with guard.section("step"):
        for step in range(20 if what != "go on" else 10**9):
            guard.tick()
            stop = torch.tensor([float(bool(told))])
            tp.all_reduce(stop, "max")
            before, late = late, tp.start_to_host(stop)
            if before is not None and before.wait():
                print("STOPPED", flush=True)
                break
            if step == 5:
                if what == "all sleep":
                    load_sample_that_never_comes()
                if what == "go on":
                    print("RUNNING", flush=True)
                if rank == victim:
                    misbehave()
            tp.all_reduce(torch.ones(4))
            if dp is not None:
                dp.all_reduce(torch.ones(4))
    guard.leave()
print("DONE", flush=True)
session.close()
"""
TIMEOUT = 2.0


def clean_environment():
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC"))}


def run_ranks(tmp_path, size, what, victim):
    """Exit code and output of each rank, and the seconds that it all took."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    port = jobs.free_port()
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = time.monotonic()
    with jobs.Job(tmp_path / "job") as job:
        for rank in range(size):
            env = {**clean_environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            job.fork([str(script), what, str(victim), str(TIMEOUT)], env)
        ended = job.finish(100)
    return [end.code for end in ended], [end.out + end.err for end in ended], time.monotonic() - started


def test_a_stranger_at_the_store_ends_kills_and_prints_nothing(tmp_path):
    """It even knows under which names the ranks' words stand, and says that a rank is frozen: what it lacks is their key."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    port = jobs.free_port()
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HOME": str(tmp_path),
    }
    envs = [{**clean_environment(), **shared, "RANK": f"{n}", "LOCAL_RANK": f"{n}", "OMP_NUM_THREADS": "1"} for n in range(2)]
    with jobs.Job(tmp_path / "job") as job, jobs.Job(tmp_path / "other") as other:
        other.start(["sleep", "100"], os.environ)
        (bystander,) = other.processes
        for env in envs:
            job.fork([str(script), "go on", "0", "30"], env)
        deadline = time.monotonic() + 60
        while any(job.ended(n).out != "RUNNING\n" for n in range(2)) and time.monotonic() < deadline:
            time.sleep(0.02)
        names = f"guard/{Launch.from_environment(envs[0]).store_prefix}"
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        victim = replace(Identity.own(1), pid=bystander.pid, born=process(bystander.pid)[1])
        assert victim.condition() == "running"
        verdict = Verdict("hang", (1,), "\x1b[2Jall is lost", (victim,)).as_json()
        key = Launch.from_environment(envs[0]).key
        for board in (
            Board(PrefixStore(names, store), 4.0),
            Board(PrefixStore(names, store), 4.0, key),
        ):  # without a key, and an old one
            board.write("judge", "1")
            board.write("verdict", verdict)
            board.write("identity/1", victim.text())
            for rank in (0, 1):
                board.write(f"state/{rank}", State(rank, "failed", "\x1b[31m").text())
                board.write(f"wake/{rank}", "alarm")
        store.set(f"{names}/wake/1", "alarm")
        time.sleep(2.0)
        assert [rank.poll() for rank in job.processes] == [None, None]
        job.processes[0].terminate()
        ended = job.finish()
        err = [[line for line in end.err.splitlines() if "[c10d] waitForInput" not in line] for end in ended]  # a busy machine
        assert [(end.code, end.out) for end in ended] == [(0, "RUNNING\nSTOPPED\nDONE\n")] * 2 and err == [[], []]
        assert bystander.poll() is None


CASES = [
    ("freeze", 1, ()),
    ("die", 0, ()),
    ("sleep", 1, ()),
    ("freeze", 0, pytest.mark.slow),
    ("die", 1, pytest.mark.slow),
    ("sleep", 0, pytest.mark.slow),
    ("raise", 0, pytest.mark.slow),
    ("raise", 1, pytest.mark.slow),
    ("stuck", 0, pytest.mark.slow),
    ("stuck", 1, pytest.mark.slow),
]


@pytest.mark.parametrize(("what", "victim"), [pytest.param(what, victim, marks=marks) for what, victim, marks in CASES])
def test_both_ranks_end_and_the_survivor_names_axis_call_and_culprit(tmp_path, what, victim):
    codes, outputs, seconds = run_ranks(tmp_path, 2, what, victim)
    survivor = outputs[1 - victim]
    assert codes[1 - victim] == 1, survivor
    assert codes[victim] == (1 if what in ("sleep", "raise") else -signal.SIGKILL)
    assert seconds < TIMEOUT + 45  # 30, and the start of Python on a busy machine
    assert f"to blame: rank {victim}\n" in survivor
    assert "all_reduce" in survivor and "axis tp" in survivor
    assert "DONE" not in "".join(outputs)
    expected = {
        "freeze": f"rank {victim} (process ",
        "die": "has died",
        "sleep": "load_sample_that_never_comes",
        "raise": "ValueError: bad sample 17",
        "stuck": "does not answer" if victim == 0 else "is there, but does not answer",
    }
    assert expected[what] in survivor
    assert what != "stuck" or " in misbehave\n" in outputs[victim], outputs[victim]
    kind = "death" if what in ("die", "raise") else "hang"
    assert "".join(outputs).count(f"EVENT {kind} {victim}") == 1


@pytest.mark.parametrize(
    ("what", "victim", "expected"),
    [
        ("freeze", 1, "is frozen"),
        pytest.param("sleep", 0, "load_sample_that_never_comes", marks=pytest.mark.slow),
        pytest.param("die", 0, "has died", marks=pytest.mark.slow),
    ],
)
def test_where_waits_return_at_once_the_reading_rank_names_who_has_begun_fewer_calls(tmp_path, what, victim, expected):
    codes, outputs, seconds = run_ranks(tmp_path, 2, f"queued {what}", victim)
    survivor = outputs[1 - victim]
    assert codes[1 - victim] == 1 and seconds < TIMEOUT + 45, outputs
    assert f"to blame: rank {victim}\n" in survivor and expected in survivor
    assert what == "die" or (
        "has waited for" in survivor and "in read of [1] float32 (number 12 on axis tp, ranks [0, 1])" in survivor
    )


def test_a_job_in_which_all_ranks_sleep_outside_of_calls_ends(tmp_path):
    codes, outputs, seconds = run_ranks(tmp_path, 2, "all sleep", 0)
    assert codes == [1, 1] and seconds < TIMEOUT + 45, outputs
    assert all("load_sample_that_never_comes" in output for output in outputs)


@pytest.mark.slow
def test_the_chain_of_waiting_leads_to_the_culprit(tmp_path):
    codes, outputs, _ = run_ranks(tmp_path, 4, "sleep", 3)
    assert codes == [1] * 4
    assert all("to blame: rank 3\n" in output for output in outputs), outputs
    assert "rank 2 has waited" in outputs[0] and "axis tp, ranks [2, 3]" in outputs[0]


def test_a_run_that_goes_well_ends_well(tmp_path):
    codes, outputs, _ = run_ranks(tmp_path, 2, "nothing", 0)
    assert codes == [0, 0], outputs
    assert outputs == ["DONE\n", "DONE\n"]


def test_under_torchrun_a_dead_rank_ends_the_job(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**clean_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), "freeze", "0", str(TIMEOUT)], env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 1
    assert "rank 1 ends after a hang; to blame: rank 0\n" in done.stderr
    assert "is frozen" in done.stderr and "axis tp" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has died")
def test_a_killed_launcher_leaves_no_orphans(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "worker.py")]
    env = {**clean_environment(), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen([*command, "go on", "0", "20"], env=env, stdout=out, stderr=out)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        deadline = time.monotonic() + 60
        while (tmp_path / "out").read_text().count("RUNNING") < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = children.read_text().split()
        launcher.kill()
        launcher.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert (tmp_path / "out").read_text().count("STOPPED") == 2


def waiting(rank, ranks, axis="tp", number=7, operation="all_reduce"):
    return State(rank, "waiting", f"{operation} on axis {axis}", axis, ranks, operation, number, 9.0)


def test_blame_follows_the_chain_to_the_rank_that_waits_for_nobody():
    states = {
        0: waiting(0, (0, 2), "dp"),
        1: waiting(1, (1, 3), "dp"),
        2: waiting(2, (2, 3)),
        3: State(3, "busy"),
    }
    assert behind(states[0], states) == (2,)
    assert find_culprits(states, 4) == (3,)


def test_silence_and_exceptions_are_blamed_first():
    assert find_culprits({0: waiting(0, (0, 1)), 2: State(2, "busy")}, 3) == (1,)
    assert find_culprits({0: waiting(0, (0, 1)), 1: State(1, "raised", "KeyError: 1")}, 3) == (1,)


def test_a_circle_blames_all_in_it_and_a_full_call_nobody():
    circle = {0: waiting(0, (0, 1)), 1: waiting(1, (0, 1), "dp"), 2: waiting(2, (0, 2), "pp")}
    assert find_culprits(circle, 3) == (0, 1)
    full = {0: waiting(0, (0, 1)), 1: waiting(1, (0, 1))}
    assert find_culprits(full, 2) == ()
    assert "network" in judge(full, {}, 2).text


def test_a_rank_that_is_ahead_is_not_waited_for_and_one_behind_is():
    states = {0: waiting(0, (0, 1), number=7), 1: waiting(1, (0, 1), number=8)}
    assert behind(states[0], states) == () and behind(states[1], states) == (0,)
    states = {0: waiting(0, (0, 1), "pp", 3, "send"), 1: waiting(1, (0, 1), "pp", 1, "recv")}
    assert behind(states[0], states) == behind(states[1], states) == ()


def reading(rank, **issued):
    return State(
        rank,
        "waiting",
        "read on axis world",
        "world",
        (0, 1, 2, 3),
        "read",
        9,
        9.0,
        issued={k.replace("_", "/"): n for k, n in issued.items()},
    )


def test_a_rank_that_reads_waits_for_those_that_have_begun_fewer_calls_in_a_group_of_its():
    """tp (0,1) (2,3); dp (0,2) (1,3). Rank 3 is busy between its calls of a step, the others have all of theirs in the queue."""
    busy = State(3, "busy", issued={"tp/2": 3, "dp/1": 1, "world/0": 1})
    states = {
        0: reading(0, tp_0=5, dp_0=2, world_0=2),
        1: reading(1, tp_0=5, dp_1=2, world_0=2),
        2: reading(2, tp_2=5, dp_0=2, world_0=2),
        3: busy,
    }
    assert find_culprits(states, 4) == (3,)
    assert "rank 0 has waited for 9.0 s in read on axis world" in judge(states, {}, 4).text
    held = states | {1: reading(1, tp_0=4, dp_1=1, world_0=1), 3: busy}
    assert find_culprits(held, 4) == (3,), "rank 1 is behind because it waits for rank 3 itself"
    same = {rank: reading(rank, tp_0=5, world_0=2) for rank in (0, 1)}
    assert find_culprits(same, 2) == () and "network" in judge(same, {}, 2).text


def test_verdict_names_call_axis_and_process_and_travels_as_text():
    gone = Identity(1, Identity.own(1).machine, "here", 2**22 + 1, "1")
    verdict = judge({0: waiting(0, (0, 1))}, {1: gone}, 2)
    assert (verdict.kind, verdict.culprits) == ("death", (1,))
    assert "rank 1 (process 4194305 on here) has died" in verdict.text
    assert "rank 0 has waited for 9.0 s in all_reduce on axis tp" in verdict.text
    assert Verdict.parse(verdict.as_json()) == verdict
    assert State.parse(waiting(0, (0, 1)).text()) == waiting(0, (0, 1))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_only_the_same_process_is_killed():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        born = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        machine = Identity.own(0).machine
        assert not Identity(0, machine, "h", process.pid, "1").send(signal.SIGKILL)
        assert not Identity(0, "another", "h", process.pid, born).send(signal.SIGKILL)
        assert process.poll() is None
        same = Identity(0, machine, "h", process.pid, born)
        assert same.condition() == "running"
        assert same.send(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert same.condition() == "gone"
