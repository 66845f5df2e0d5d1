"""Who a process is, from its environment; and the calls by which ranks fail together."""

import os
import socket
from dataclasses import replace
from threading import Thread

import jobs
import pytest
import torch

from megatrain.config.schema import ParallelConfig
from megatrain.runtime.distributed import RemoteError, Session, choose_device, connect, named
from megatrain.runtime.launch import Launch, LaunchError
from megatrain.runtime.slurm import expand_nodes, expand_tasks, port_of_job
from megatrain.transport.group import TransportError
from megatrain.transport.threads import MemoryWorld
from megatrain.transport.wrappers import Recorder

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "70000",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch):
    monkeypatch.setattr("megatrain.runtime.launch.shutil.which", lambda name: None)


def test_nothing_set_is_a_world_of_one():
    launch = Launch.from_environment({"MASTER_ADDR": "left.over"})
    assert (launch.rank, launch.world_size, launch.launcher, launch.master_addr) == (0, 1, "none", None)


def test_torchrun():
    launch = Launch.from_environment({**SRUN, **TORCHRUN})
    assert (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size, launch.node) == (5, 1, 8, 4, 1)
    assert (launch.master_addr, launch.master_port, launch.restart_count) == ("10.0.0.1", 29500, 2)
    assert launch.launcher == "torchrun" and launch.launcher_serves


def test_a_machine_that_comes_in_the_place_of_a_lost_one_has_the_same_key():
    """Its launcher counts restarts anew."""
    old, new = (
        Launch.from_environment({**TORCHRUN, "MEGATRAIN_SECRET": "of this one job alone", "TORCHELASTIC_RESTART_COUNT": count})
        for count in ("2", "0")
    )
    assert old.restart_count != new.restart_count and old.key == new.key != b""
    assert old.key != replace(old, master_port=29501).key


def test_srun():
    launch = Launch.from_environment(SRUN)
    assert (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size, launch.node) == (3, 1, 4, 2, 1)
    assert (launch.master_addr, launch.master_port) == ("gpu07", 20000 + 70000 % 12768)
    assert launch.launcher == "srun" and not launch.launcher_serves


def test_cores_that_slurm_gives_a_rank():
    assert Launch.from_environment(SRUN).cores is None
    assert Launch.from_environment({**SRUN, "SLURM_CPUS_PER_TASK": "8"}).cores == 8


def test_a_job_step_that_is_smaller_than_the_job_counts():
    launch = Launch.from_environment(
        {**SRUN, "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "b[1-2]"}
    )
    assert (launch.world_size, launch.master_addr) == (4, "b1")


def test_what_tells_attempts_apart_in_the_store():
    """A launcher that comes back counts its restarts from 0, one that stayed goes on: only a store that is as old must know."""
    served = Launch.from_environment(TORCHRUN)
    assert served.store_prefix == "megatrain-2-8"
    fresh = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    prefixes = {Launch.from_environment({**fresh, "TORCHELASTIC_RESTART_COUNT": n}).store_prefix for n in "01"}
    assert prefixes == {"megatrain"} == {Launch.from_environment(SRUN).store_prefix}


def without(env, *keys):
    return {key: value for key, value in env.items() if key not in keys}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE missing"),
        (without(TORCHRUN, "RANK", "LOCAL_RANK"), "RANK, LOCAL_RANK missing"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR missing"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is not in a world of 8"),
        ({**TORCHRUN, "RANK": "two"}, "RANK='two' is not a number"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "False"}, "cannot meet at localhost"),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.1.1", "TORCHELASTIC_USE_AGENT_STORE": "False"}, "only 4 of the 8 ranks"),
        (without(SRUN, "SLURM_JOB_NODELIST"), "SLURM_JOB_NODELIST is missing"),
        (without(SRUN, "SLURM_JOB_ID"), "SLURM_JOB_ID is missing"),
        (without(SRUN, "SLURM_NTASKS"), "neither SLURM_STEP_NUM_TASKS nor SLURM_NTASKS"),
        ({**SRUN, "SLURM_JOB_NODELIST": "gpu[7-"}, "no node list"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({**SRUN, "MASTER_ADDR": "localhost"}, "cannot meet at localhost"),
    ],
)
def test_variables_that_do_not_fit_together_are_named(env, words):
    with pytest.raises(LaunchError, match=words.replace("[", r"\[")):
        Launch.from_environment(env)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,3],x-1,a[1-2]b[0-1]c", ["n08", "n09", "n10", "n11", "n3", "x-1", "a1b0c", "a1b1c", "a2b0c", "a2b1c"]),
    ],
)
def test_node_lists(text, hosts):
    assert expand_nodes(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1", "a[3-1]", "a[x]", "a]1[", ",a"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(ValueError):
        expand_nodes(text)


def test_task_lists_and_ports():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError):
        expand_tasks("2(y3)")
    assert len({port_of_job(job) for job in range(10**6, 10**6 + 1000)}) == 1000
    assert all(20000 <= port_of_job(job) < 32768 for job in range(0, 10**6, 997))


def test_devices_and_backends():
    two = Launch(rank=1, local_rank=1, world_size=2, local_world_size=2)
    assert choose_device(ParallelConfig(), two, 0) == (torch.device("cpu"), "gloo")
    assert choose_device(ParallelConfig(), two, 2) == (torch.device("cuda", 1), "nccl")
    assert choose_device(ParallelConfig(device="cpu"), two, 2) == (torch.device("cpu"), "gloo")
    assert choose_device(ParallelConfig(backend="gloo"), two, 1) == (torch.device("cuda", 0), "gloo")
    with pytest.raises(LaunchError, match=r"NCCL allows one rank per GPU.*parallel.backend=gloo, or at most 1 rank"):
        choose_device(ParallelConfig(), two, 1)
    task = Launch(rank=1, local_rank=1, world_size=2, local_world_size=2, launcher="srun")
    assert choose_device(ParallelConfig(), task, 1) == (torch.device("cuda", 0), "nccl"), "srun --gpus-per-task=1"
    with pytest.raises(LaunchError, match="no GPU"):
        choose_device(ParallelConfig(device="cuda"), two, 0)
    with pytest.raises(LaunchError, match=r"parallel.backend=nccl"):
        choose_device(ParallelConfig(backend="nccl"), two, 0)


def test_one_process_opens_no_group():
    session = connect(Launch.from_environment({}), ParallelConfig(device="cpu"), 5.0, env={})
    assert (session.backend, session.everyone, session.rank) == ("none", None, 0)
    assert not torch.distributed.is_initialized()
    assert "1 process on cpu" in session.describe()
    session.same("config", "a")
    with pytest.raises(KeyError), session.together("looking"):
        raise KeyError("x")
    with pytest.raises(TransportError, match="no group"):
        session.world.group("tp", (0,))
    session.close()


def on_ranks(size, body):
    """What `body(session)` raised on each rank, over groups in memory."""
    raised = [None] * size

    def run(world):
        launch = Launch(rank=world.rank, local_rank=world.rank, world_size=size, local_world_size=size)
        everyone = world.group("world", range(size))
        try:
            body(Session(launch, world, torch.device("cpu"), "gloo", Recorder(), everyone, "1 thread"))
        except Exception as error:
            raised[world.rank] = error

    threads = [Thread(target=run, args=(world,)) for world in MemoryWorld.create(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised


def test_together_raises_everywhere_and_names_the_lowest_failing_rank():
    def body(session):
        with session.together("reading the data"):
            if session.rank in (1, 2):
                raise FileNotFoundError(f"no corpus-ä.bin on {session.rank}")

    raised = on_ranks(4, body)
    assert [type(error) for error in raised] == [RemoteError, FileNotFoundError, FileNotFoundError, RemoteError]
    assert str(raised[3]) == "rank 1 failed while reading the data: FileNotFoundError: no corpus-ä.bin on 1"
    assert str(raised[2]) == "no corpus-ä.bin on 2"


def test_together_is_quiet_where_all_is_well():
    def body(session):
        for _ in range(3):
            with session.together("nothing"):
                pass

    assert on_ranks(3, body) == [None] * 3


def test_same_names_the_ranks_and_the_line():
    texts = ["a: 1\nb: 2\n", "a: 1\nb: 2\n", "a: 1\nb: 3\n", "a: 1\n"]
    raised = on_ranks(4, lambda session: session.same("config", texts[session.rank]))
    assert {str(error) for error in raised} == {
        "The config differs between ranks: line 2 is 'b: 2' on ranks 0, 1 and 'b: 3' on rank 2. Of yet another one: rank 3."
    }
    assert all(isinstance(error, RemoteError) for error in raised)
    assert on_ranks(4, lambda session: session.same("config", texts[0])) == [None] * 4


@pytest.mark.parametrize("odd", range(3))
def test_same_sees_one_odd_rank_wherever_it_is(odd):
    raised = on_ranks(3, lambda session: session.same("seed", "1" if session.rank == odd else "2", "Give one."))
    said = [
        "'1' on rank 0 and '2' on ranks 1, 2.",
        "'2' on ranks 0, 2 and '1' on rank 1.",
        "'2' on ranks 0, 1 and '1' on rank 2.",
    ]
    assert {str(error) for error in raised} == {f"The seed differs between ranks: line 1 is {said[odd]} Give one."}
    assert all(isinstance(error, RemoteError) for error in raised)


def test_many_ranks_are_named_as_eight():
    assert named(range(8)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert named(range(3, 20)) == "ranks 3, 4, 5, 6, 7, 8, 9, 10 and 9 more"


CONNECT = """
import os
from megatrain.config.schema import ParallelConfig
from megatrain.runtime.distributed import connect
from megatrain.runtime.launch import Launch
session = connect(Launch.from_environment(os.environ), ParallelConfig(device="cpu"), 20.0)
print(session.describe())
session.close()
"""


def ranks_of_two(folder, port, ranks=(0, 1)):
    """A job of these ranks, which connect and say to what."""
    (folder / "connect.py").write_text(CONNECT)
    job = jobs.Job(folder / "job")
    for rank in ranks:
        env = {key: value for key, value in jobs.environment(rank, 2, port).items() if not key.startswith("OMP_")}
        job.fork([str(folder / "connect.py")], env)
    return job


def test_two_processes_connect_and_share_the_cores(tmp_path):
    with ranks_of_two(tmp_path, jobs.free_port()) as job:
        ended = job.finish()
    share = max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else None
    for end in ended:
        assert "2 ranks (2 on this node) by torchrun on cpu over gloo" in end.out, end.err
        assert share is None or f"CPU threads of a rank: {share} of" in end.out


def test_a_port_in_use_is_an_immediate_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with ranks_of_two(tmp_path, taken.getsockname()[1], ranks=[0]) as job:
            (server,) = job.finish()
    assert server.code == 1
    assert "is in use" in server.err
