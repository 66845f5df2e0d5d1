"""What workers leave to their launcher: errors that ranks share are told once, those that differ each, nothing stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

from megatrain.lifecycle.agent_logs import RankLogs, distinct
from megatrain.lifecycle.stop import errors_file, leave_error

ROOT = Path(__file__).parents[2]
SHAPE = "megatrain: error: hidden_size=7\n"


def logs_of(folder, *ranks):
    """Logs of a node with these ranks, and the environment of each."""
    logs, envs = (
        RankLogs(folder, folder / "preempted", terminal=False),
        {i: {"RANK": str(rank)} for i, rank in enumerate(ranks)},
    )
    logs.reify(envs)
    return logs, [envs[i] for i in range(len(ranks))]


def test_what_ranks_share_and_what_they_quote():
    assert distinct({0: SHAPE, 1: SHAPE, 2: SHAPE}) == [SHAPE]
    mine, disk = "megatrain: error: no file a.idx\n", "megatrain: error: disk full\n"
    quoted = "megatrain: error: rank 1 failed while opening the data: TokenStoreError: no file a.idx\n"
    assert distinct({0: quoted, 1: mine, 2: quoted}) == [quoted]
    assert distinct({3: disk, 1: mine, 2: disk}) == [mine, disk]
    assert distinct({}) == []


def test_errors_are_told_once_and_kept_for_each_rank(tmp_path, capfd):
    logs, envs = logs_of(tmp_path / "logs", 0, 1, 2)
    for env, text in zip(envs, ("error: x=7\n    in a.yaml", "error: x=7\n    in a.yaml", "error: y=8"), strict=True):
        assert leave_error(f"megatrain: {text}", env)
    assert logs.tell_errors() == {0, 1, 2}
    assert capfd.readouterr().err == "megatrain: error: x=7\n    in a.yaml\nmegatrain: error: y=8\n"
    assert [Path(tmp_path, f"logs/rank_0000{rank}.err").read_text() for rank in (1, 2)] == [
        "megatrain: error: x=7\n    in a.yaml\n",
        "megatrain: error: y=8\n",
    ]
    assert logs.tell_errors() == set()
    assert capfd.readouterr().err == ""


def test_a_restart_tells_what_ended_the_start_before(tmp_path, capfd):
    logs, (env,) = logs_of(tmp_path / "logs", 0)
    leave_error("megatrain: error: once", env)
    logs.reify({0: {"RANK": "0"}})
    assert capfd.readouterr().err == "megatrain: error: once\n"


def test_without_a_launcher_a_worker_speaks_for_itself(tmp_path):
    assert not leave_error("megatrain: error: x", {})
    assert not leave_error("megatrain: error: x", {"MEGATRAIN_REPLY": str(tmp_path / "gone/0.code")})
    assert errors_file(tmp_path / "0.code") == tmp_path / "0.error"


def test_nodes_of_one_console_leave_it_to_the_first(tmp_path, capfd, monkeypatch):
    """Under SLURM all nodes write to one file; where they share no disk each tells its own."""
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr("megatrain.lifecycle.agent_logs.RANK_0_SECONDS", 0.0)
    for node, (folder, told) in {1: ("shared", ""), 0: ("shared", SHAPE), 2: ("shared", ""), 3: ("own", SHAPE)}.items():
        logs, (env,) = logs_of(tmp_path / folder, node)
        if node == 1:  # rank 0's is there only later
            Path(tmp_path, "shared/rank_00000.err").write_text(SHAPE)
        leave_error(SHAPE.strip(), env)
        assert logs.tell_errors() == {node}
        assert capfd.readouterr().err == told


@pytest.mark.timeout(120)
def test_a_wrong_config_is_one_line_of_the_script(tmp_path):
    """Four ranks: each finds it, the script tells it, without a traceback of torchrun, and leaves no folder of torchrun's."""
    (tmp_path / "tmp").mkdir()
    tree = jobs.tiny(
        jobs.write_store(tmp_path / "data"), tmp_path / "run", train={"micro_batch_size": 4, "global_batch_size": 4}
    )
    config = jobs.write_config(tmp_path / "run.yaml", tree)
    env = {**jobs.environment(), "PYTHON": sys.executable, "TMPDIR": str(tmp_path / "tmp")}
    command = ["bash", str(ROOT / "launch/local.sh"), "4", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    said = "megatrain: error: train.global_batch_size=4 is not a multiple of train.micro_batch_size=4 x 4 data-parallel replicas = 16."
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(said) and done.stdout == ""
    logs = [path.read_text() for path in sorted((tmp_path / "run/logs").glob("*.err"))]
    assert len(logs) == 4 and set(logs) - {""} == {done.stderr}  # a rank that is late is ended by torchrun before it finds it
    assert list((tmp_path / "tmp").iterdir()) == []


def test_torch_tells_nothing_beside_the_launcher():
    """Some of its loggers have a level of their own."""
    program = (
        "import logging, megatrain.lifecycle.agent; "
        "from torch.distributed.elastic.agent.server.api import logger; "
        "print(logger.isEnabledFor(logging.ERROR), logging.getLogger('torch.distributed.elastic').isEnabledFor(logging.ERROR))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_link_in_the_place_of_a_ranks_output_is_kept_under_another_name(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "rank_00000.out").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "rank_00000.err")
    logs_of(folder, 0)
    assert (folder / "rank_00000.out.1").is_symlink() and (folder / "rank_00000.err.1").is_fifo()
    assert not any((folder / f"rank_00000.{end}").exists() for end in ("out", "err"))
