"""What the SLURM scripts do with a job whose step has failed: on which nodes they start it again, by commands that play SLURM's part."""

import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
COMMANDS = {
    "scontrol": """
        case "$*" in
            "show hostnames "*) printf 'n1\\nn2\\nn3\\nn4\\n' | head -n "$SLURM_JOB_NUM_NODES" ;;
            "show job "*) echo "JobId=7 JobState=RUNNING ReqNodeList=(null) NodeList=n[1-4] PreemptTime=None" ;;
            *) echo "scontrol $*" >>calls ;;
        esac""",
    "sinfo": 'cat states 2>/dev/null; [ "$*" = "--noheader --Node --nodes n[1-4] --format %N %t" ]',
    "srun": """
        case "$*" in *" guard 7 n"*) exit ;; esac
        echo "$NNODES ${MASTER_ADDR:-} $*" | sed 's/ --ntasks-per-node.*//; s/ bash .*//' >>calls
        exit "$(sed -n "$(wc -l <calls)p" codes)" """,
}


@pytest.fixture
def job(tmp_path):
    """Run a script in a job of four nodes with a rank each, whose steps end with `codes`; (exit code, output, commands given to SLURM)."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\ncd {tmp_path}\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def job(script, codes, states, batch=12, **env):
        tree = jobs.tiny(tmp_path / "data", tmp_path / "run", train={"global_batch_size": batch, "micro_batch_size": 1})
        config = jobs.write_config(tmp_path / "config.yaml", tree)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "states").write_text("".join(f"n{n} {state}\n" for n, state in enumerate(states, 1)))
        (tmp_path / "calls").write_text("")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(jobs.LAUNCHERS)}
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {**clean, **slurm, "PATH": path, "PYTHON": sys.executable, "MEGATRAIN_ROOT": str(LAUNCH.parent), **env}
        command = ["bash", str(LAUNCH / script), str(config)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr, (tmp_path / "calls").read_text().splitlines()

    return job


ALL = " n1 --mpi=none"
FINE = ["alloc", "alloc", "alloc", "alloc"]


@pytest.mark.parametrize(
    ("states", "left"),
    [
        (["alloc", "mix", "down*", "alloc"], ["n1", "n2", "n4"]),
        (["alloc", "drng", "alloc*", "idle"], ["n1", "n4"]),
        (["down", "fail", "alloc", "unk"], ["n3"]),
    ],
    ids=str,
)
def test_a_run_goes_on_with_the_nodes_that_are_left(job, states, left):
    code, said, calls = job("srun.sbatch", [137, 0], states, MIN_NODES="1")
    assert code == 0, said
    count = len(left)
    assert calls == ["  --mpi=none", f"  --mpi=none --nodes {count} --ntasks {count} --nodelist {','.join(left)}"]
    assert f"megatrain: {count} of 4 nodes are there; the run goes on with {count} of them, from its newest checkpoint" in said


def test_torchrun_meets_on_the_first_of_them(job):
    """16 sequences are not divided by 3 nodes of 2 ranks, but by 2: the third node is left idle."""
    code, said, calls = job("slurm.sbatch", [1, 0], ["down", "alloc", "alloc", "alloc"], 16, MIN_NODES="2", NPROC_PER_NODE="2")
    assert code == 0, said
    assert calls == [f"4{ALL}", "2 n2 --mpi=none --nodes 2 --ntasks 2 --nodelist n2,n3"]
    assert "3 of 4 nodes are there; the run goes on with 2 of them" in said


@pytest.mark.parametrize("env", [{}, {"MIN_NODES": "3"}], ids=str)
def test_with_too_few_it_goes_back_into_the_queue(job, env):
    code, said, calls = job("srun.sbatch", [137], ["alloc", "down", "down", "alloc"], **env)
    assert code == 75, said
    assert calls == ["  --mpi=none", "scontrol requeue 7"]
    needed = env.get("MIN_NODES", "4")
    assert f"2 of 4 nodes are there, and the run needs {needed} (MIN_NODES): it waits in the queue" in said


def test_a_job_that_was_given_less_takes_what_fits(job):
    """16 sequences on 3 nodes: with MIN_NODES 2 of them train, without it the run itself says what is wrong."""
    code, said, calls = job("srun.sbatch", [0], FINE[:3], 16, MIN_NODES="2", SLURM_JOB_NUM_NODES="3", SLURM_NTASKS="3")
    assert code == 0 and "3 of 3 nodes are there; the run goes on with 2 of them" in said
    assert calls == ["  --mpi=none --nodes 2 --ntasks 2 --nodelist n1,n2"]
    assert job("srun.sbatch", [1], FINE[:3], 16, SLURM_JOB_NUM_NODES="3", MAX_RESTARTS="0")[2] == ["  --mpi=none"]


def test_a_failure_with_all_nodes_is_tried_again_as_often_as_allowed(job):
    """A lost node is no such failure; what SLURM does not tell of is not lost."""
    code, said, calls = job("srun.sbatch", [1, 1, 1], FINE, MAX_RESTARTS="2", MIN_NODES="1")
    assert code == 1 and len(calls) == 3 and "starting it again from its newest checkpoint, 2 of 2 times" in said
    assert job("srun.sbatch", [1, 1, 1], [], MAX_RESTARTS="0", MIN_NODES="1")[0] == 1


def test_a_wrong_number_is_told(job):
    code, said, _ = job("srun.sbatch", [0], FINE, MIN_NODES="0")
    assert code == 2 and "MIN_NODES=0 is too small. Set MIN_NODES=4, or leave it out." in said
