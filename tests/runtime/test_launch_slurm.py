"""Who a process is in each place where SLURM can start it: a step, the batch script, the shell of an allocation, torchrun within."""

from pathlib import Path

import pytest

from megatrain.cli.main import main
from megatrain.runtime.launch import Launch, LaunchError

JOB = {"SLURM_JOB_ID": "70000", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}
ONE_NODE = {**JOB, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "64"}
TASK_0 = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "4711"}
STEP = {**TASK_0, "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]"}
STEP = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4"}
LONE_STEP = {**TASK_0, "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}
LONE_STEP = {**LONE_STEP, "SLURM_STEP_TASKS_PER_NODE": "1"}
INTERACTIVE = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch):
    monkeypatch.setattr("megatrain.runtime.launch.shutil.which", lambda name: None)


@pytest.mark.parametrize(
    ("env", "launcher", "rank", "size", "asked"),
    [
        # the script that sbatch was given
        ({**ONE_NODE, **TASK_0}, "none", 0, 1, 1),
        ({**ONE_NODE, **TASK_0, "SLURM_NTASKS": "1", "SLURM_NPROCS": "1"}, "none", 0, 1, 1),
        ({**ONE_NODE, **TASK_0, "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}, "none", 0, 1, 4),
        ({**ONE_NODE, **TASK_0, "SLURM_NTASKS_PER_NODE": "8"}, "none", 0, 1, 8),
        ({**JOB, **TASK_0, "SLURM_NTASKS_PER_NODE": "8"}, "none", 0, 1, 16),
        ({**JOB, **TASK_0}, "none", 0, 1, 2),
        ({**ONE_NODE, **TASK_0, "SLURM_STEP_ID": "4294967291", "SLURM_NTASKS": "4"}, "none", 0, 1, 4),
        # the shell of salloc, on the login node or (use_interactive_step) on the first node
        (ONE_NODE, "none", 0, 1, 1),
        ({**ONE_NODE, "SLURM_NTASKS": "4"}, "none", 0, 1, 4),
        ({**ONE_NODE, **TASK_0, **INTERACTIVE}, "none", 0, 1, 1),
        ({**JOB, **TASK_0, **INTERACTIVE, "SLURM_NTASKS": "4"}, "none", 0, 1, 4),
        # what srun starts; one rank of a job of many; a shell by srun --pty
        ({**JOB, **STEP}, "srun", 0, 4, 1),
        ({**JOB, **STEP, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, "srun", 3, 4, 1),
        ({**JOB, **LONE_STEP}, "srun", 0, 1, 1),
        ({**JOB, **LONE_STEP, "SLURM_PTY_PORT": "43210", "SLURM_PTY_WIN_COL": "80"}, "srun", 0, 1, 1),
        # torchrun's variables win wherever it was started
        ({**ONE_NODE, **TASK_0, **TORCHRUN, "SLURM_NTASKS": "4"}, "torchrun", 1, 2, 1),
        ({**JOB, **STEP, **TORCHRUN}, "torchrun", 1, 2, 1),
        ({**ONE_NODE, **TORCHRUN}, "torchrun", 1, 2, 1),
        # no job at all; a rank's variables set by hand
        ({}, "none", 0, 1, 1),
        ({"SLURM_NTASKS": "4"}, "none", 0, 1, 1),
        ({**TASK_0, "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "MASTER_ADDR": "n1"}, "srun", 0, 2, 1),
    ],
)
def test_every_place(env, launcher, rank, size, asked):
    launch = Launch.from_environment(env)
    assert (launch.launcher, launch.rank, launch.world_size, launch.tasks_asked) == (launcher, rank, size, asked)
    if asked == 1:
        launch.require_ranks()
        return
    with pytest.raises(
        LaunchError, match=f"asks for {asked} tasks, but this process was started without srun.*srun megatrain train"
    ):
        launch.require_ranks()


def test_a_step_without_its_size_is_told():
    env = {key: value for key, value in {**JOB, **STEP}.items() if key not in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")}
    with pytest.raises(LaunchError, match="neither SLURM_STEP_NUM_TASKS nor SLURM_NTASKS"):
        Launch.from_environment(env)
    with pytest.raises(LaunchError, match="SLURM_NTASKS='many' is not a number"):
        Launch.from_environment({**ONE_NODE, **TASK_0, "SLURM_NTASKS": "many"})


def test_train_ends_at_once_and_other_verbs_run(tmp_path, monkeypatch, capsys):
    """In the script of a job of four tasks: nothing is written, no rank is waited for."""
    for name, value in {**ONE_NODE, **TASK_0, "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "nowhere.yaml"]) == 1
    assert capsys.readouterr().err.startswith(
        "megatrain: error: this SLURM job asks for 4 tasks, but this process was started without"
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    assert main(["data", "tokenize", "--input", "text.txt", "--tokenizer", "bytes", "--output", "store"]) == 0
    sizes = ["--steps", "1", "--warmup", "1", "model.num_layers=1", "model.hidden_size=32", "model.seq_length=16"]
    sizes += ["train.global_batch_size=1", "train.micro_batch_size=1", "optim.warmup_steps=1", "train.steps=4"]
    assert main(["bench", str(Path(__file__).parents[2] / "launch/configs/gpt_tiny.yaml"), *sizes]) == 0
    assert '"world_size": 1' in capsys.readouterr().out
