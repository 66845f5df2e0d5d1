"""The launch scripts say at once what is wrong with their use; wrong configs are told once, before any worker starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
NODES = {"NNODES": "2", "MASTER_ADDR": "node1"}


def run(script, *arguments, **env):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "NNODES"))}
    command = ["bash", str(LAUNCH / script), *arguments]
    env = {**clean, "PYTHON": sys.executable, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("script", "arguments", "env", "code", "words"),
    [
        ("local.sh", ["2"], {}, 2, "usage: bash launch/local.sh N CONFIG.yaml"),
        ("local.sh", ["two", "c.yaml"], {}, 2, "N=two is not a number of processes"),
        ("local.sh", ["0", "c.yaml"], {}, 2, "N=0"),
        ("local.sh", ["2", "c.txt"], {}, 2, "'c.txt' is no CONFIG.yaml"),
        ("local.sh", ["2", "nowhere.yaml"], {}, 1, "nowhere.yaml: no such file"),
        ("local.sh", ["2", str(LAUNCH / "configs/gpt_tiny.yaml"), "train.stepz=3"], {}, 1, "Did you mean train.steps?"),
        ("multinode.sh", [], {}, 2, "usage:"),
        ("multinode.sh", ["c.yaml"], {}, 2, "NNODES= is not a number of machines"),
        ("multinode.sh", ["c.yaml"], {"NNODES": "2"}, 2, "MASTER_ADDR is not set"),
        ("multinode.sh", ["c.yaml"], {"NNODES": "2", "MASTER_ADDR": "localhost"}, 2, "cannot meet at localhost"),
        ("multinode.sh", ["c.yaml"], {"NNODES": "3", "MASTER_ADDR": "127.0.0.1"}, 2, "cannot meet at localhost"),
        ("multinode.sh", ["c.yaml"], {"NNODES": "1:2", "MASTER_ADDR": "::1"}, 2, "but 2 machines cannot meet at localhost"),
        ("multinode.sh", ["c.yaml"], {"NNODES": "3:2", "MASTER_ADDR": "n1"}, 2, "Set NNODES=2:3"),
        ("multinode.sh", ["c.yaml"], {"NNODES": "2:", "MASTER_ADDR": "n1"}, 2, "NNODES=2: is not a number"),
        ("multinode.sh", ["c.yaml"], {**NODES, "MASTER_PORT": "abc"}, 2, "MASTER_PORT=abc is not a whole number"),
        ("multinode.sh", ["c.yaml"], {**NODES, "NPROC_PER_NODE": "0"}, 2, "NPROC_PER_NODE=0 is too small"),
        ("multinode.sh", ["c.yaml"], {**NODES, "JOIN_TIMEOUT": "5s"}, 2, "JOIN_TIMEOUT=5s is not"),
        ("local.sh", ["2", "c.yaml"], {"MAX_RESTARTS": "-1"}, 2, "Set MAX_RESTARTS=3"),
        ("srun.sbatch", ["c.yaml"], {}, 2, "usage: sbatch"),
        ("srun.sbatch", ["c.yaml"], {"SLURM_JOB_ID": "1", "MEGATRAIN_ROOT": "/"}, 2, "set MEGATRAIN_ROOT"),
        ("slurm.sbatch", ["c.yaml"], {}, 2, "usage: sbatch"),
        ("slurm.sbatch", ["c.yaml"], {"SLURM_JOB_ID": "1", "MEGATRAIN_ROOT": "/"}, 2, "set MEGATRAIN_ROOT"),
    ],
)
def test_wrong_use_is_told_at_once(script, arguments, env, code, words):
    done = run(script, *arguments, **env)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_help_is_the_header(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"bash launch/{script}" in done.stdout and "SIGTERM" in done.stdout
