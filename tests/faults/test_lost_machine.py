"""Two launchers stand for two machines. One is killed with its workers and its copies in memory, and another comes in its place."""

import contextlib
import re
import shutil
import signal
import sys
from pathlib import Path

import jobs
import psutil
import pytest

from megatrain.runtime.interface import interfaces
from megatrain.transport.store import await_listener

STEPS, EVERY = 60, 2
LAYOUTS = {
    "dp 2, zero 1": (1, {"zero_stage": 1}),
    "dp 2, zero 3": (1, {"zero_stage": 3}),
    "tp 2 x pp 2": (2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}
"""Ranks of a machine, and the layout."""


class Machines:
    """A run on two launchers, each with a session of its own."""

    def __init__(self, tmp_path, layout, save_every=0):
        self.ranks, parallel = LAYOUTS[layout]
        store = jobs.write_store(tmp_path / "data")
        checkpoint = {"save_every": save_every, "in_memory_every": EVERY}
        parts = {"parallel": {**parallel, "device": "cpu"}, "train": {"steps": STEPS, "deterministic": True}}
        self.run = tmp_path / "run"
        self.config = jobs.write_config(tmp_path / "config.yaml", jobs.tiny(store, self.run, checkpoint=checkpoint, **parts))
        self.whole = jobs.undisturbed(tmp_path, 2 * self.ranks)
        self.job, self.port = jobs.Job(tmp_path / "job"), jobs.free_port()

    def come(self):
        """One more machine; the first serves the store where they meet."""
        words = ["--nnodes", "2", "--nproc-per-node", str(self.ranks), "--max-restarts", "3", "--rdzv-id", "two machines"]
        address = next(one.address for one in interfaces() if not one.is_loopback)  # machines do not meet at loopback
        at = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{self.port}"]
        command = [sys.executable, "-m", "megatrain.lifecycle.agent", str(self.run), *words, *at, "-m", "megatrain", "train"]
        env = {"MEGATRAIN_INTERFACE": address, "MEGATRAIN_SECRET": "of these two machines", "JOIN_TIMEOUT": "90"}
        self.job.start([*command, str(self.config), f"log.dir={self.run}"], jobs.environment() | env)
        await_listener(address, self.port, 60.0)

    def copies(self, number):
        """Folders of a machine's copies."""
        return list(Path("/dev/shm").glob(f"megatrain-*-{self.job.processes[number].pid}-*-copy-*"))

    def lose(self, number):
        """Kill a machine's processes, and remove what is in its memory."""
        launcher, folders = psutil.Process(self.job.processes[number].pid), self.copies(number)
        assert len(folders) == 1, folders
        killed = [launcher, *launcher.children(recursive=True)]
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):  # the rest of a machine may end with its launcher
                process.send_signal(signal.SIGKILL)
        self.job.processes[number].wait(30)
        psutil.wait_procs(killed, 30)
        shutil.rmtree(folders[0], ignore_errors=True)  # a start of another run may have removed what the dead have left

    def damage(self, number, name):
        """Flip a byte of files that a machine keeps, in every copy there."""
        files = [file for folder in self.copies(number) for file in folder.glob(f"step_*/{name}")]
        assert files
        for file in files:
            content = bytearray(file.read_bytes())
            content[-2] ^= 4
            file.write_bytes(content)

    def until(self, rows):
        assert jobs.wait_for_rows(self.job, self.run, rows, seconds=120), self.job.ended(0)

    def finish(self):
        """Wait for the machines that are left; what the ranks said."""
        ended = [end for end in self.job.finish(240) if end.code != -signal.SIGKILL]
        said = "\n".join(path.read_text() for path in sorted((self.run / "logs").glob("rank_*")))
        assert [end.code for end in ended] == [0, 0], (ended, said[-5000:])
        return said


@pytest.mark.fault(
    injection="one of two machines is lost with its memory, another comes in its place",
    promise="the run goes on from the copy that the other one has kept, at most checkpoint.in_memory_every steps before, to the same bits",
    bound=90,
    layout="{layout}",
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_machine_has_kept_a_copy(tmp_path, measured, layout):
    machines = Machines(tmp_path, layout)
    with machines.job:
        machines.come()
        machines.come()
        machines.until(20)
        machines.lose(1)
        machines.come()
        said = machines.finish()
    [told] = [event for event in jobs.events(machines.run) if event["event"] == "restart"]
    assert "/dev/shm/megatrain-" in told["checkpoint"] and told["lost_steps"] <= EVERY, (told, said[-3000:])
    assert machines.copies(0) == machines.copies(2) == []
    measured.detected(told["seconds"])
    measured.recovered(told["seconds"], told["lost_steps"])
    jobs.same(machines.run, machines.whole, STEPS)


@pytest.mark.fault(
    injection="one of two machines is lost with its memory, and a bit is flipped in the copy that the other has kept of it",
    promise="the damage is found before any state is overwritten, and named; the run goes on from the disk, to the same bits",
    bound=90,
    layout="dp 2, zero 1",
)
def test_a_damaged_copy_of_a_lost_machine_is_passed_over(tmp_path, measured):
    machines = Machines(tmp_path, "dp 2, zero 1", save_every=7)
    with machines.job:
        machines.come()
        machines.come()
        machines.until(25)
        machines.lose(1)
        machines.damage(0, "exp_avg-*-dp00001.safetensors")
        machines.come()
        said = machines.finish()
    [told] = [event for event in jobs.events(machines.run) if event["event"] == "restart"]
    assert told["checkpoint"] == str(machines.run / "checkpoints/step_00000021") and told["lost_steps"] >= 4
    damaged = re.search(r"the copy of step (\d+) in memory is not used: .*/exp_avg-.*-dp00001.safetensors is damaged", said)
    assert damaged is not None and int(damaged[1]) >= 24, said[-3000:]
    measured.detected(told["seconds"])
    measured.recovered(told["seconds"], told["lost_steps"])
    jobs.same(machines.run, machines.whole, STEPS)
