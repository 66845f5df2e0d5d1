"""The GPU in one command: what of it runs without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_the_tables_are_made_of_real_measurements(tmp_path):
    command = [sys.executable, str(ROOT / "docs/benchmarks/gpu_checks.py"), "--output", str(tmp_path / "out"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    kernels = {row["kernel"]: row for row in report["kernels"]}
    assert {"copy", "matmul bf16", "rmsnorm", "add + rmsnorm", "rotary", "swiglu", "cross-entropy"} == set(kernels)
    assert all(row["ms"] > 0 and row["share_of_copy"] > 0 for row in kernels.values() if "ms" in row)
    (model,) = report["models"]
    assert model["ratio"] == model["megatrain"]["tokens_per_second"] / model["plain"]["tokens_per_second"]
    assert "| smoke |" in (tmp_path / "out.md").read_text()


def test_without_a_gpu_the_command_says_so():
    if torch.cuda.is_available():
        return
    done = subprocess.run(
        ["bash", str(ROOT / "launch/gpu_checks.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "has no PyTorch that sees a GPU. Set PYTHON to one that does." in done.stderr
