"""Two hosts, each a network namespace with a name and an address of its own: `bash launch/network_checks.sh` runs these (mark `network`).

A host is lost as by a power failure: its link goes down first, so that nothing tells the other, then its processes are killed.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jobs
import psutil
import pytest

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
STEPS = 80
HANG_SECONDS = 6.0


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@dataclass
class Host:
    """A machine: a name, an address, a link."""

    name: str
    address: str
    space: str
    processes: list = field(default_factory=list)

    def run(self, output, words, **env):
        """Start launch/multinode.sh here, in the background."""
        clean = {
            key: value for key, value in jobs.environment().items() if key not in ("GLOO_SOCKET_IFNAME", "TRITON_INTERPRET")
        }
        env = {**clean, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "MASTER_ADDR": "10.77.0.1", **env}
        inside = f'hostname {self.name}; exec bash "$@"'
        command = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", inside, "sh", *words]
        with output.open("ab") as file:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        return process

    def lose(self):
        """No packet leaves or comes any more; then everything here dies."""
        ip("-netns", self.space, "link", "set", "eth0", "down")
        self.kill()

    def come_back(self):
        ip("-netns", self.space, "link", "set", "eth0", "up")

    def kill(self):
        said = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False).stdout
        for pid in said.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait(10)


@pytest.fixture(scope="module")
def hosts():
    """alpha (10.77.0.1) and beta (10.77.0.2), joined by a cable; loopback is up, and /etc/hosts knows neither name."""
    pair = [Host("alpha", "10.77.0.1", f"mt-alpha-{os.getpid()}"), Host("beta", "10.77.0.2", f"mt-beta-{os.getpid()}")]
    for host in pair:
        ip("netns", "add", host.space)
    try:
        ip("-netns", pair[0].space, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", pair[1].space)
        for host in pair:
            for words in (
                ["addr", "add", f"{host.address}/24", "dev", "eth0"],
                ["link", "set", "lo", "up"],
                ["link", "set", "eth0", "up"],
            ):
                ip("-netns", host.space, *words)
        yield pair
    finally:
        for host in pair:
            host.kill()
            ip("netns", "del", host.space)


@pytest.fixture(autouse=True)
def nothing_stays(hosts):
    """Hosts are whole and empty before and after each test."""
    yield
    for host in hosts:
        left = subprocess.run(["ip", "netns", "pids", host.space], capture_output=True, text=True, check=True).stdout.split()
        host.kill()
        host.come_back()
        assert left == [], [psutil.Process(int(pid)).cmdline() for pid in left if psutil.pid_exists(int(pid))]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    house = tmp_path_factory.mktemp("network")
    tree = jobs.tiny(
        jobs.write_store(house / "data"),
        house / "run",
        train={"steps": STEPS, "micro_batch_size": 1, "precision": "fp64", "hang_timeout_seconds": HANG_SECONDS},
        parallel={"tensor_parallel_size": 2},
        checkpoint={"save_every": 15},
    )
    jobs.write_config(house / "config.yaml", tree)
    return house


@pytest.fixture(scope="module")
def undisturbed(house):
    return jobs.undisturbed(house, 4)


def launch(house, run, hosts, **env):
    """Start the job on these hosts; their processes."""
    words = [str(ROOT / "launch/multinode.sh"), str(house / "config.yaml"), f"log.dir={run}"]
    run.mkdir(exist_ok=True)
    return [host.run(run / f"{host.name}.txt", words, **{"NNODES": "2", **env}) for host in hosts]


def ends(processes, seconds=100.0):
    deadline = time.monotonic() + seconds
    return [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]


def wait_for_rows(run, count):
    jobs.await_rows(run, count, lambda: "\n".join(path.read_text()[-3000:] for path in run.glob("*.txt")))


def test_two_hosts_train_as_one_machine_does(house, hosts, undisturbed, tmp_path):
    run = tmp_path / "run"
    assert ends(launch(house, run, hosts)) == [0, 0], (run / "alpha.txt").read_text()
    jobs.same(run, undisturbed, STEPS)
    assert "4 ranks (2 on this node) by torchrun on cpu over gloo through eth0 (10.77.0.1)" in (run / "alpha.txt").read_text()


@pytest.mark.parametrize(
    "lost", [pytest.param(0, id="the host of the store"), pytest.param(1, id="the other host", marks=pytest.mark.slow)]
)
def test_a_host_is_lost_and_comes_back(house, hosts, undisturbed, tmp_path, lost):
    """The other ends soon and says which; started again on both, the run is the undisturbed one."""
    run = tmp_path / "run"
    processes = launch(house, run, hosts)
    wait_for_rows(run, 20)
    began = time.monotonic()
    hosts[lost].lose()
    survivor = hosts[1 - lost]
    (code,) = ends([processes[1 - lost]])
    seconds, said = time.monotonic() - began, (run / f"{survivor.name}.txt").read_text()
    assert code == 1 and seconds < HANG_SECONDS + 45, (seconds, said)
    assert re.search(rf"to blame: rank .*\n.*on {hosts[lost].name}\)", said), said
    hosts[lost].come_back()
    assert ends(launch(house, run, hosts)) == [0, 0], said
    jobs.same(run, undisturbed, STEPS)


@pytest.mark.slow
def test_a_host_that_comes_back_joins_those_that_waited(house, hosts, undisturbed, tmp_path):
    """MAX_RESTARTS: the survivor starts its workers again as soon as the other host is there."""
    run = tmp_path / "run"
    first, _ = launch(house, run, hosts, MAX_RESTARTS="2")
    wait_for_rows(run, 20)
    hosts[1].lose()
    time.sleep(HANG_SECONDS + 4)
    hosts[1].come_back()
    (second,) = launch(house, run, hosts[1:], MAX_RESTARTS="2")
    assert ends([first, second]) == [0, 0], (run / "alpha.txt").read_text()
    jobs.same(run, undisturbed, STEPS)


def test_with_fewer_nodes_the_data_axis_shrinks_and_grows_again(house, hosts, undisturbed, tmp_path):
    """NNODES=1:2: tp 2 x dp 2, then tp 2 x dp 1 with twice the micro-batches, then both again; the same losses to rounding."""
    run = tmp_path / "run"
    elastic = {"NNODES": "1:2", "MAX_RESTARTS": "3"}
    first, _ = launch(house, run, hosts, **elastic)
    wait_for_rows(run, 20)
    hosts[1].lose()
    while "dp 1" not in (run / "alpha.txt").read_text():
        assert first.poll() is None, (run / "alpha.txt").read_text()[-3000:]
        time.sleep(0.1)
    wait_for_rows(run, jobs.row_count(run) + 5)
    hosts[1].come_back()
    (second,) = launch(house, run, hosts[1:], **elastic)
    assert ends([first, second]) == [0, 0], (run / "alpha.txt").read_text()
    said = (run / "alpha.txt").read_text()
    assert [int(size) for size in re.findall(r"layout: .*dp (\d)", said)] == [2, 1, 2], said
    ours, theirs = jobs.rows(run), jobs.rows(undisturbed)
    assert sorted(ours) == sorted(theirs)
    for step, row in theirs.items():
        assert ours[step]["loss"] == pytest.approx(row["loss"], rel=1e-8), step


def test_a_port_that_another_program_holds_is_named(house, hosts, tmp_path):
    run = tmp_path / "run"
    script = "import socket, time; s = socket.create_server(('', 29400)); print('holds it', flush=True); time.sleep(150)"
    said = tmp_path / "other.txt"
    other = hosts[0].run(said, ["-c", f'exec {sys.executable} -c "{script}"'])
    deadline = time.monotonic() + 60
    while "holds it" not in said.read_text():
        assert time.monotonic() < deadline and other.poll() is None, said.read_text()
        time.sleep(0.02)
    (code,) = ends(launch(house, run, hosts[:1]))
    other.kill()
    other.wait()
    said = (run / "alpha.txt").read_text()
    assert code == 1 and "port 29400 of 10.77.0.1, where the nodes would meet, is in use by process" in said, said


def test_an_interface_that_is_not_there_is_named(house, hosts, tmp_path):
    run = tmp_path / "run"
    (code,) = ends(launch(house, run, hosts[:1], MEGATRAIN_INTERFACE="10.88.0.0/16"))
    assert code == 1 and "is no interface, address or network of alpha; it has" in (run / "alpha.txt").read_text()


def test_a_host_that_never_comes_is_told(house, hosts, tmp_path):
    run = tmp_path / "run"
    (code,) = ends(launch(house, run, hosts[:1], JOIN_TIMEOUT="5"))
    assert code == 1 and "alpha: too few nodes came to 10.77.0.1:29400 within 5 s" in (run / "alpha.txt").read_text()
    (code,) = ends(launch(house, tmp_path / "run2", hosts[1:], JOIN_TIMEOUT="5"))
    assert code == 1 and "beta could not reach 10.77.0.1:29400" in (tmp_path / "run2/beta.txt").read_text()
