"""`megatrain doctor` as a person starts it, alone and on several ranks; each fault is planted in a real process and named."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jobs
import pytest
import torch

from megatrain.config.load import from_dict
from megatrain.doctor.examine import checkpoint_bytes
from megatrain.runtime.flops import parameter_count

NODE = socket.gethostname()
CONFIG = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 101},
    "data": {"train": "x"},
    "parallel": {"device": "cpu"},
}
LATE_PRODUCTS = """
import time
from megatrain.doctor import measure
product = measure.matmul
measure.matmul = lambda a, b: (time.sleep(0.5), product(a, b))[1]
"""
"""A rank whose products take half a second more each, which is seen however busy the machine is."""

SHORT_PATIENCE = "from megatrain.transport import store; store.ANSWER_SECONDS = 2.0"
"""A port that is in use and answers nothing is given up after two seconds, not ten."""

OWN_MACHINE = """
import ctypes, socket, subprocess
if ctypes.CDLL(None, use_errno=True).unshare(0x00020000 | 0x04000000):  # CLONE_NEWNS, CLONE_NEWUTS
    raise OSError(ctypes.get_errno(), "unshare")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
"""
"""From here on the process has mounts and a host name of its own."""
MOUNTED = 'subprocess.run(["mount", "-t", "tmpfs", "-o", "size={}", "tmpfs", "{}"], check=True)'

TWICE = """
import os, sys
from megatrain.cli.main import main
exec(os.environ.get("PLANTED", ""))
ports, words, forms = sys.argv[1].split(","), ["doctor", *sys.argv[3:]], [[], ["--json"]]
for port, form in list(zip(ports, forms))[:int(sys.argv[2])]:
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = port
    code = main([*words, *form])
    print(f"\\f{code}\\f", flush=True)
"""
"""The command, as text and then as JSON, each at its port; one process, since most of its time is the import of torch."""


@dataclass(frozen=True)
class Plant:
    """What is different on one rank."""

    env: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] = ()
    before: str = ""
    """Lines of Python before the program."""
    text_alone: bool = False
    """Whether it is not run again for the JSON."""


def by_hand(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of srun, whose ranks serve their store themselves; without them, one process."""
    env = jobs.environment()
    if size > 1:
        env.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS=str(size), SLURM_TASKS_PER_NODE=str(size))
        env.update(SLURM_JOB_ID="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    return env


@dataclass(frozen=True)
class Said:
    """What the ranks said, in both forms."""

    text: list[jobs.Ended]
    objects: list[jobs.Ended]

    @property
    def codes(self) -> set[int]:
        return {ended.code for ended in [*self.text, *self.objects]}

    @property
    def json(self) -> dict:
        return json.loads(self.objects[0].out)

    def finding(self, level: str, ranks: Sequence[int], words: str) -> str:
        """The one finding with these words, which both forms have, of this level, about these ranks of this machine."""
        found = [row for row in self.json["findings"] if words in row["message"]]
        assert [(row["level"], row["ranks"]) for row in found] == [(level, list(ranks))], self.json["findings"]
        lines = [line for line in self.text[0].out.splitlines() if words in line]
        assert len(lines) == 1 and lines[0].startswith(f"{level.upper()}: "), self.text[0]
        return found[0]["message"]


def doctor(
    tmp_path: Path,
    *words: str,
    size: int = 2,
    plants: Mapping[int, Plant] | None = None,
    ranks: Sequence[int] | None = None,
    ports: Sequence[int] | None = None,
    seconds: float = jobs.SECONDS,
    **sections: Mapping[str, object],
) -> Said:
    """Run both forms. ranks: those that are started; ports: where each form meets."""
    tree = {**CONFIG, "checkpoint": {"dir": str(tmp_path / "checkpoints")}, **sections}
    config = jobs.write_config(tmp_path / "c.yaml", tree)
    ports = [jobs.free_port(), jobs.free_port()] if ports is None else ports
    twice = tmp_path / "twice.py"
    twice.write_text(TWICE)
    text, objects = [], []
    with jobs.Job(tmp_path / "job") as job:
        for rank in range(size) if ranks is None else ranks:
            plant = (plants or {}).get(rank, Plant())
            forms = "1" if plant.text_alone else "2"
            program = [str(twice), ",".join(map(str, ports)), forms, str(config), *words, *plant.words]
            job.fork(program, {**by_hand(rank, size, ports[0]), **plant.env, "PLANTED": plant.before})
        for ended in job.finish(seconds):
            assert ended.code == 0, ended
            out = ended.out.split("\f")
            text.append(jobs.Ended(int(out[1]), out[0], ended.err))
            objects += [jobs.Ended(int(out[3]), out[2], ended.err)] if len(out) > 3 else []
    return Said(text, objects)


def need_namespaces() -> None:
    """Skip where a process cannot have mounts and a host name of its own."""
    probe = "mount -t tmpfs -o size=1m tmpfs /mnt && echo node1 > /proc/sys/kernel/hostname"
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(["unshare", "--mount", "--uts", "sh", "-c", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


# --- nothing planted --------------------------------------------------------------------------------------------------------


def test_alone_and_without_a_config(tmp_path):
    (ended,) = jobs.train(tmp_path / "job", verb="doctor")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "a job would run", ended.err
    assert "| kernels: numba |" in ended.out and "interfaces: lo 127.0.0.1" in ended.out


def test_two_ranks(tmp_path):
    said = doctor(tmp_path)
    assert said.codes == {0} and (said.text[1].out + said.objects[1].out).strip() == "", said.text
    assert said.text[0].out.splitlines()[-1] == "a job would run"
    assert said.json["ok"] and [row["rank"] for row in said.json["ranks"]] == [0, 1]
    assert all(row["all_reduce_mb_per_second"] > 0 and row["sees_token"] for row in said.json["ranks"])
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_under_torchrun(tmp_path):
    """Its agent serves the store, so that the port of the ranks is in use, and no fault."""
    job = jobs.Job(tmp_path / "job")
    words = ["--standalone", "--nproc-per-node", "2", "-m", "megatrain", "doctor", "--json"]
    job.start([sys.executable, "-m", "torch.distributed.run", *words], {**jobs.environment(), "GLOO_SOCKET_IFNAME": "lo"})
    with job:
        (ended,) = job.finish()
    assert ended.code == 0 and len(json.loads(ended.out)["ranks"]) == 2, ended.err


SIZES = [("bf16", "fp32", 14), ("bf16", "split", 12), ("fp16", "fp32", 14), ("fp32", "fp32", 12)]


@pytest.mark.parametrize(("precision", "master", "each"), SIZES)
def test_the_size_of_a_checkpoint(precision, master, each):
    """Weights, masters and two moments; no gradients."""
    tree = {**CONFIG, "train": {"precision": precision}, "optim": {"master": master}}
    config = from_dict(tree)
    assert checkpoint_bytes(config) == each * parameter_count(config.model, 101)


# --- ports ------------------------------------------------------------------------------------------------------------------


def test_a_port_in_use(tmp_path):
    """Rank 0 names it, the process and a port that is free; the other rank does not wait for a store that will not come."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
        said = doctor(tmp_path, plants={1: Plant(before=SHORT_PATIENCE, text_alone=True)}, ports=ports)
    assert said.codes == {1}
    message = said.finding("fail", [0], "in use by process")
    assert message.startswith(f"rank 0 on {NODE}: port {ports[1]}, where the ranks are to meet, is in use by process ")
    assert f"rank 0 on {NODE}: port {ports[0]}" in said.text[0].out and "Choose another MASTER_PORT, for example" in message
    assert f"{NODE}: rank 1 found something at 127.0.0.1:{ports[0]} that is not the store" in said.text[1].err


def test_a_port_that_is_asked_for(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        said = doctor(tmp_path, "--port", str(port), size=1)
    assert said.codes == {1}
    assert said.finding("fail", [0], "in use by process").startswith(f"rank 0 on {NODE}: port {port} is in use")


# --- ranks that cannot join -------------------------------------------------------------------------------------------------


def test_an_interface_that_does_not_exist(tmp_path):
    """On one rank alone, which could not join: the other is told, and does not wait for it."""
    said = doctor(tmp_path, plants={1: Plant({"GLOO_SOCKET_IFNAME": "nope0"})})
    assert said.codes == {1}
    message = said.finding("fail", [1], "GLOO_SOCKET_IFNAME=nope0 names no interface")
    assert message.startswith(f"rank 1 on {NODE}: ") and "there are lo" in message


def test_an_address_that_no_interface_has(tmp_path):
    said = doctor(
        tmp_path, plants={0: Plant({"MEGATRAIN_INTERFACE": "127.0.0.0/8"}), 1: Plant({"MEGATRAIN_INTERFACE": "192.0.2.99"})}
    )
    assert said.codes == {1}
    assert said.finding("fail", [1], "MEGATRAIN_INTERFACE=192.0.2.99").startswith(f"rank 1 on {NODE}: ")
    assert said.json["ranks"][0]["interface"] == "lo (127.0.0.1)" and "lo (127.0.0.1) serves" in said.text[0].out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_and_a_config_that_cannot_be_had(tmp_path):
    said = doctor(tmp_path, plants={0: Plant(words=["parallel.device=cuda"]), 1: Plant(words=["parallel.devise=cpu"])})
    assert said.codes == {1}
    assert said.finding("fail", [0], "parallel.device=cuda, but").startswith(f"rank 0 on {NODE}: ")
    assert said.finding("fail", [1], "parallel.devise").startswith(f"rank 1 on {NODE}: ")


def test_a_rank_that_does_not_come(tmp_path):
    said = doctor(tmp_path, "--wait", "2", ranks=[0])
    assert said.codes == {1}
    message = said.finding("fail", [1], "sent no report within 2 s")
    assert f"rank 1 sent no report within 2 s; of the 2 ranks on {NODE}, 1 did" in message


def test_rank_0_does_not_come(tmp_path):
    said = doctor(tmp_path, "--wait", "1", ranks=[1])
    assert said.codes == {1} and f"{NODE}: rank 1 cannot reach the store" in said.text[0].err


# --- directories and disks --------------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path):
    """A disk of 16 MiB that one rank alone has in the place of checkpoint.dir."""
    need_namespaces()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    said = doctor(tmp_path, plants={1: Plant(before=OWN_MACHINE + MOUNTED.format("16m", folder))})
    assert said.codes == {1}
    message = said.finding("fail", [1], "cannot write checkpoint.dir")
    assert message.startswith(f"rank 1 on {NODE}: cannot write checkpoint.dir: No space left on device")


def test_a_disk_too_small_for_two_checkpoints(tmp_path):
    """200 MiB, for two of 25 million parameters with 12 bytes each."""
    need_namespaces()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    plants = {0: Plant(before=OWN_MACHINE + MOUNTED.format("200m", folder))}
    model = {**CONFIG["model"], "hidden_size": 1024}
    said = doctor(tmp_path, "train.precision=fp32", size=1, plants=plants, model=model)
    assert said.codes == {1}
    message = said.finding("fail", [0], "two checkpoints take")
    assert message.startswith(f"rank 0 on {NODE}: checkpoint.dir has 210 MB free, and two checkpoints take 6")


def test_a_file_that_cannot_grow(tmp_path):
    """A limit on the size of files, as a quota would be: needs no root."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, 1 << 21))"
    said = doctor(tmp_path, size=1, plants={0: Plant(before=limit)})
    assert said.codes == {1}
    message = said.finding("fail", [0], "cannot write checkpoint.dir")
    assert message.startswith(f"rank 0 on {NODE}: cannot write checkpoint.dir: File too large")


# --- what is different, and what is slow ------------------------------------------------------------------------------------


def test_two_versions_and_a_directory_that_is_not_shared(tmp_path):
    old = tmp_path / "old/numpy-1.0.0.dist-info/METADATA"
    old.parent.mkdir(parents=True)
    old.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0.0\n")
    first = f"import sys; sys.path.insert(0, {str(tmp_path / 'old')!r})"
    said = doctor(tmp_path, plants={1: Plant(words=[f"checkpoint.dir={tmp_path}/own"], before=first)})
    assert said.codes == {1}
    assert said.finding("fail", [1], ": numpy 1.0.0, the others").startswith(f"rank 1 on {NODE}: numpy 1.0.0")
    assert said.finding("fail", [1], "not the same directory").startswith(f"rank 1 on {NODE}: what rank 0")


def test_a_slow_rank_whose_clock_is_wrong(tmp_path):
    clock = "right = time.time; time.time = lambda: right() + 30"
    said = doctor(tmp_path, plants={1: Plant(before=LATE_PRODUCTS + clock)})
    assert said.codes == {0} and said.json["ok"], said.json
    said.finding("warn", [1], f"rank 1 on {NODE}: slow: matrix products")
    said.finding("warn", [1], f"rank 1 on {NODE}: the clock is +")
    rows = [line.split()[:2] for line in said.text[0].out.splitlines() if line[:5].strip().isdecimal()]
    assert rows == [["1", NODE], ["0", NODE]]  # the slowest first


def test_a_slow_node(tmp_path):
    """Two machines, as far as their names go: both ranks of one are slow, and it is named once."""
    need_namespaces()
    nodes = ["node0", "node0", "node1", "node1"]
    plants = {
        rank: Plant(before=f"{OWN_MACHINE}socket.sethostname({node!r})\n{LATE_PRODUCTS * (node == 'node1')}")
        for rank, node in enumerate(nodes)
    }
    said = doctor(tmp_path, size=4, plants=plants)
    assert said.codes == {0}
    said.finding("warn", [2, 3], "node1 (all 2 ranks): slow: matrix products")  # a busy machine may slow others too
    assert [list(row["links_mb_per_second"]) for row in said.json["ranks"]] == [["2"], ["3"], ["0"], ["1"]]
