"""Variables of a launcher that stand for more than a machine holds, or are no numbers: a line each, at once, that names the variable."""

import time
from types import SimpleNamespace

import pytest
from runtime.test_launch_slurm import JOB, LONE_STEP, STEP, TASK_0, TORCHRUN

from megatrain.lifecycle.agent_nodes import meet_at
from megatrain.runtime import launch
from megatrain.runtime.launch import Launch, LaunchError
from megatrain.runtime.slurm import address_of, expand_nodes, expand_tasks
from megatrain.runtime.variables import cut, number_in

DIGITS = "9" * 5000


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch):
    monkeypatch.setattr("megatrain.runtime.launch.shutil.which", lambda name: None)


def test_numbers():
    env = {"A": " 12 ", "B": "-3", "C": DIGITS, "D": "", "E": "1" * 12}
    assert [number_in(env, key, 7) for key in ("A", "B", "E", "F")] == [12, -3, 111111111111, 7]
    for key, said in {"C": f"'{DIGITS[:40]}'... (5000 letters)", "D": "''", "F": "None"}.items():
        with pytest.raises(ValueError, match="is not a number") as error:
            number_in(env, key)
        assert str(error.value) == f"The environment variable {key}={said} is not a number."
    assert (cut("x" * 40), cut("x" * 41)) == (repr("x" * 40), f"'{'x' * 40}'... (41 letters)")


BOMBS = [
    ("n[0-99999999999]", "'n[0-99999999999]' stands for more than 65,536 nodes"),
    ("a,n[0-65535]", "'a,n[0-65535]' stands for more than 65,536 nodes"),
    ("n[0-999][0-999]", "'n[0-999][0-999]' stands for more than 65,536 nodes"),
    ("n" + "[0-9]" * 100, "'n[0-9]"),
    (f"n[{DIGITS}]", f"'{DIGITS[:40]}'... (5000 letters) is no range of node numbers such as 01-04"),
    ("n" + "[0]" * 20000, "(60001 letters) has a name of more than 253 letters, which no host has"),
    (f"n[{'0' * 12}-9]" + "x" * 250, "has a name of more than 253 letters"),
    (DIGITS, "(5000 letters) has a name of more than 253 letters, which no host has"),
    ("[" * 50000, "(50000 letters) is no node list such as node[01-04,07],login1"),
]


@pytest.mark.parametrize(("nodes", "said"), BOMBS, ids=[nodes[:20] for nodes, _ in BOMBS])
def test_a_short_node_list_of_more_nodes_than_can_be(nodes, said):
    begun = time.process_time()
    with pytest.raises(LaunchError) as error:
        Launch.from_environment({**JOB, **STEP, "SLURM_STEP_NODELIST": nodes})
    text = str(error.value)
    assert text.startswith("SLURM's variables cannot be read: ") and said in text and len(text) < 200
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("tasks", ["1(x99999999999)", "1(x65536),1", f"1(x{DIGITS})", DIGITS, "1(x9)(x9)"])
def test_a_short_list_of_tasks_of_more_nodes_than_can_be(tasks):
    with pytest.raises(LaunchError, match=r"stands for more than 65,536 nodes|is no list of task counts such as 2") as error:
        Launch.from_environment({**JOB, **STEP, "SLURM_STEP_TASKS_PER_NODE": tasks})
    assert len(str(error.value)) < 200


def test_the_largest_lists_that_can_be():
    assert len(expand_nodes("n[00000-65535]")) == len(expand_tasks("1(x65535),1")) == 65536
    assert expand_nodes("n[8-11],m[07]x[1-2]") == ["n8", "n9", "n10", "n11", "m07x1", "m07x2"]


@pytest.mark.parametrize("value", [DIGITS, "1" * 13])
@pytest.mark.parametrize(
    ("base", "keys"),
    [
        (TORCHRUN, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "GROUP_RANK", "MEGATRAIN_LAUNCHER")),
        (TORCHRUN, ("TORCHELASTIC_RESTART_COUNT",)),
        ({**JOB, **STEP}, ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID")),
        ({**JOB, **STEP}, ("SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "MASTER_PORT")),
        ({**JOB, **TASK_0}, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS", "SLURM_STEPID")),
    ],
)
def test_a_number_too_long_is_told_by_its_variable(base, keys, value):
    for key in keys:
        with pytest.raises(LaunchError) as error:
            Launch.from_environment({**base, key: value})
        assert str(error.value) == f"The environment variable {key}={cut(value)} is not a number."


def test_what_is_set_is_cut_where_something_is_missing():
    with pytest.raises(
        LaunchError, match=r"LOCAL_RANK, .* missing \(RANK='9+'\.\.\. \(5000 letters\), WORLD_SIZE='2' set\)"
    ) as error:
        Launch.from_environment({"RANK": DIGITS, "WORLD_SIZE": "2"})
    assert len(str(error.value)) < 400


def test_numbers_of_ranks_nodes_and_cores_that_cannot_be():
    with pytest.raises(LaunchError, match="a world of 999999999999 ranks is more than the 1,048,576 that can be"):
        Launch.from_environment({**TORCHRUN, "WORLD_SIZE": "999999999999"})
    with pytest.raises(LaunchError, match="SLURM_NODEID=-1 is not among the 2 nodes"):
        Launch.from_environment({**JOB, **STEP, "SLURM_NODEID": "-1"})
    assert Launch.from_environment({**JOB, **LONE_STEP, "SLURM_CPUS_PER_TASK": "-4"}).cores is None


@pytest.mark.parametrize(
    "host", ["node1..cluster", "n" * 64, f"{'n' * 64}.cluster", "n" * 5000, ".cluster", "n\udcff"], ids=len
)
def test_a_name_that_no_host_can_have_is_told(host):
    message = r"MASTER_ADDR='.{,60} is no name or address of a host: .* have 1 to 63 letters each"
    with pytest.raises(LaunchError, match=message) as error:
        Launch.from_environment({**TORCHRUN, "MASTER_ADDR": host})
    assert len(str(error.value)) < 300
    config = SimpleNamespace(rdzv_endpoint=f"{host}:29400", max_nodes=2)
    with pytest.raises(LaunchError, match=message):
        meet_at(config)
    assert address_of(host) == host


def test_a_controller_that_does_not_answer_leaves_the_list_to_be_read_here(monkeypatch):
    def late(command, **options):
        raise launch.subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(launch, "shutil", SimpleNamespace(which=lambda name: "/usr/bin/scontrol"))
    monkeypatch.setattr(launch.subprocess, "run", late)
    assert launch._hostnames("n[1-2]") == ["n1", "n2"]
