"""Ranks that compute with something else than the others end before the first step, all of them, and the error names them."""

import shutil
import sys
from pathlib import Path

import jobs
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER_TORCH = """
import sys
import torch
torch.__version__ = "1.0.0"
from megatrain.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
OTHER_KERNELS = """
import os
import sys
from megatrain.cli.main import main
from megatrain.kernels import dispatch
dispatch.numba_lacks = lambda: "numba cannot be imported (x)" if os.environ["RANK"] == "1" else None
sys.exit(main(sys.argv[1:]))
"""


def refused(job, size, *said):
    ended = job.finish()
    assert [end.code for end in ended] == [1] * size, ended
    for end in ended:
        assert all(words in end.err for words in said), end.err


def test_another_torch_on_one_rank(tmp_path):
    config = jobs.write_config(tmp_path / "c.yaml", jobs.tiny(jobs.write_store(tmp_path / "store"), tmp_path / "run"))
    (tmp_path / "other.py").write_text(OTHER_TORCH)
    port = jobs.free_port()
    with jobs.Job(tmp_path / "job") as job:
        job.fork(["train", str(config)], jobs.environment(0, 2, port))
        job.fork([str(tmp_path / "other.py"), "train", str(config)], jobs.environment(1, 2, port))
        refused(job, 2, "The code differs between ranks: line 2 is 'torch ", " on rank 0 and 'torch 1.0.0' on rank 1. Install")


def test_a_rank_whose_kernels_cannot_be_imported(tmp_path):
    """As where `auto` would fall back on one of them."""
    tree = jobs.tiny(jobs.write_store(tmp_path / "store"), tmp_path / "run", train={"precision": "bf16"})
    config, port = jobs.write_config(tmp_path / "c.yaml", tree), jobs.free_port()
    (tmp_path / "other.py").write_text(OTHER_KERNELS)
    with jobs.Job(tmp_path / "job") as job:
        for rank in range(2):
            job.fork([str(tmp_path / "other.py"), "train", str(config)], jobs.environment(rank, 2, port))
        refused(job, 2, "numba on rank 0; plain PyTorch (numba cannot be imported (x)) on rank 1. Make them equal there, or")


def test_another_store_of_the_same_size_on_one_rank(tmp_path, monkeypatch):
    """Ranks of one node whose working directories differ, as in two containers."""
    config = jobs.write_config(tmp_path / "c.yaml", jobs.tiny(Path("store"), tmp_path / "run"))
    port = jobs.free_port()
    with jobs.Job(tmp_path / "job") as job:
        for rank in range(2):
            store = tmp_path / f"node_{rank}" / "store"
            store.parent.mkdir()
            jobs.write_store(store)
            tokens = np.fromfile(store.with_suffix(".bin"), np.uint16)
            tokens[2000] = 50 + rank
            tokens.tofile(store.with_suffix(".bin"))
            monkeypatch.chdir(store.parent)
            job.fork(["train", str(config)], jobs.environment(rank, 2, port))
        refused(
            job,
            2,
            "The data differs between ranks: line 1 is 'data.train[0]=store: 2042-8000-",
            "Copy the same files to every node",
        )


@pytest.mark.fault(
    injection="a learning rate times 1.5 in one rank's source",
    promise="refused at the start, the file is named",
    layout="{layout}",
)
@pytest.mark.parametrize("layout", ["dp 2", "tp 2 x pp 2"])
def test_other_source_on_one_rank(tmp_path, measured, layout):
    size, parallel = (2, {}) if layout == "dp 2" else (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    tree = jobs.tiny(jobs.write_store(tmp_path / "store"), tmp_path / "run", parallel=parallel)
    config, port = jobs.write_config(tmp_path / "c.yaml", tree), jobs.free_port()
    shutil.copytree(ROOT / "megatrain", tmp_path / "copy/megatrain")
    shutil.copytree(ROOT / "kernels", tmp_path / "copy/megatrain/kernels")
    source = tmp_path / "copy/megatrain/training.py"
    text = source.read_text()
    source.write_text(text.replace("    lr, skip = run.lr * care.rate,", "    lr, skip = 1.5 * run.lr * care.rate,"))
    assert source.read_text() != text
    with jobs.Job(tmp_path / "job") as job:
        for rank in range(size):
            env = jobs.environment(rank, size, port)
            if rank == 1:
                env.update(PYTHONPATH=str(tmp_path / "copy"), PYTHONSAFEPATH="1")
            job.start([sys.executable, "-m", "megatrain", "train", str(config)], env)
        refused(job, size, "The code differs between ranks: line ", "megatrain/training.py", "on rank 1. Install the same")
