"""The GPU in one command: what of it runs without a GPU."""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs/benchmarks"
KERNELS = {
    "adamw, masters",
    *("rmsnorm", "add + rmsnorm", "layernorm", "add + layernorm"),
    *("rotary, halves", "rotary, pairs", "swiglu", "geglu", "dropout"),
    *("attention with dropout, 64", "attention with dropout, 128"),
    *("cross-entropy 512", "cross-entropy 465 of 512"),
}
GPU_MACHINE = {
    "pytest",
    "torch",
    "numpy",
    "megatrain",
    "triton",
    "transformers",
    "safetensors",
    "tokenizers",
    "psutil",
    "xxhash",
    "yaml",
}
"""What a test marked gpu may import at its top."""


def run(*command, **env):
    """A program that finds the benchmarks and what this interpreter finds."""
    path = os.pathsep.join([str(BENCHMARKS), *sys.path])
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(report, what was said, seconds of CPU) of a smoke run from a copy of the tree with nothing installed, and no zstandard."""
    folder = tmp_path_factory.mktemp("smoke")
    for part in ("megatrain", "kernels", "launch", "docs/benchmarks", "tests"):
        shutil.copytree(ROOT / part, folder / "tree" / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", folder / "tree")
    (folder / "stub").mkdir()
    (folder / "stub/zstandard.py").write_text("raise ImportError('there is none')")
    site = [entry for entry in sys.path if entry.endswith("-packages")]  # whose .pth files count for nothing there
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(
        *("bash", folder / "tree/launch/gpu_checks.sh", "--smoke", folder / "out"),
        PYTHON=sys._base_executable,
        PYTHONPATH=os.pathsep.join([str(folder / "stub"), *site]),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads((folder / "out/report.json").read_text()), done.stdout, spent


@pytest.mark.docs
def test_every_item_is_done_with_tiny_shapes_in_less_than_a_minute_of_cpu(smoke):
    report, said, seconds = smoke
    assert {name: item["state"] for name, item in report["items"].items()} == dict.fromkeys(
        ["1 speeds", "2 tests", "3 one step", "4 124m", "5 8b shape", "6 1.3b", "7 ranks", "8 kernels", "9 decoding"], "done"
    )
    assert seconds < 60
    assert "| 8 kernels | done |" in said[-12_000:] and "| swiglu |" in said[-12_000:]


@pytest.mark.docs
def test_the_tables_are_made_of_real_measurements(smoke):
    report, _, _ = smoke
    parts = {name: part["result"] for item in report["items"].values() for name, part in item["parts"].items()}
    assert parts["kernels"].keys() == KERNELS
    assert all(row["ms"] > 0 and row["reference_ms"] > 0 for row in parts["kernels"].values())
    assert all(row["weight"] > 0 for row in parts["speeds"]["products"].values())
    assert parts["tests"]["outcomes"] == {"passed": 8}
    assert [row["tokens"] for row in parts["decoding"]["writing"]] == [13, 40]
    shares = parts["decoding"]["step"]["shares"]  # rounded: a small one may be 0 where a first step has the rest
    assert "attend" in shares and max(shares.values()) > 0
    assert parts["step"]["launches"] >= len(parts["step"]["kernels"]) > 10
    assert parts["ranks"].keys() == {"tp2-sp", "dp2-zero3"} and all(row["fp64"] < 1e-12 for row in parts["ranks"].values())
    assert report["models"].keys() == {"124m", "8b shape", "1.3b"}
    for table in report["models"].values():
        assert len(table["rows"]) == 4
        speeds = {way: row["tokens_per_second"] for way, row in table["rows"].items()}
        best = [max(speed for way, speed in speeds.items() if way.startswith(side)) for side in ("ours", "plain")]
        assert table["ratio"] == best[0] / best[1]


def test_what_hangs_or_fails_ends_nothing_else_and_the_report_has_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import json, os, subprocess, sys, time
from pathlib import Path
import gpu_checks
from isolated import Isolated, isolated
gpu_checks.LEAST = 0.1
folder = Path(sys.argv[1])

def hang(note):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    note({"child": child.pid})
    time.sleep(1000)

def fail(note, what):
    note({"so far": what})
    print("a last word")
    raise ValueError(what)

def crash(note):
    os.abort()

def first(checks):
    checks.part("hangs", 0.5, hang)
    checks.part("fails", 1.0, fail, "numbers")
    checks.part("crashes", 1.0, crash)

def second(checks):
    assert json.loads((folder / "report.json").read_text())["items"]["1 first"]["parts"]["crashes"]["problem"]
    checks.part("works", 1.0, lambda note: note({"a": 1}))
    raise KeyError("an item")

checks = gpu_checks.Checks(folder, True, {"1 first": 4, "2 second": 4, "3 third": 60})
checks.began = time.monotonic()
checks.run("1 first", first)
checks.run("2 second", second)
Isolated.fresh = True
checks.run("3 third", lambda checks: checks.part("touch", 1.0, gpu_checks.touch))
"""
    )
    done = run(sys.executable, script, tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    parts = {name: part for item in report["items"].values() for name, part in item["parts"].items()}
    assert parts["hangs"]["problem"] == "not done after 2 s" and "in hang" in parts["hangs"]["said"]
    assert not Path(f"/proc/{parts['hangs']['result']['child']}").exists()
    assert parts["fails"]["problem"] == "ValueError: numbers" and "a last word" in parts["fails"]["said"]
    assert parts["fails"]["result"] == {"so far": "numbers"}
    assert parts["crashes"]["problem"] == "ended by SIGABRT"
    assert parts["works"]["problem"] is None and parts["works"]["result"] == {"a": 1}
    assert (
        report["items"]["1 first"]["state"] == "failed"
        and report["items"]["2 second"]["state"] == "failed: KeyError: 'an item'"
    )
    assert "isolated.py" in parts["touch"]["said"]  # the new interpreter got as far as the device that is not there
    assert "fails: ValueError: numbers" in (tmp_path / "report.md").read_text()


def test_tests_take_the_first_case_of_each_before_the_second_and_failures_are_kept_at_once(tmp_path):
    (tmp_path / "test_it.py").write_text(
        """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_a(n):
    assert n == 1

@pytest.mark.parametrize("n", [1, 2])
def test_b(n):
    pass
"""
    )
    command = ["-m", "pytest", "-p", "gpu_tests", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path / "test_it.py"]
    run(sys.executable, *command, MEGATRAIN_GPU_TESTS=str(tmp_path / "record"), PYTEST_XDIST_WORKER="")
    rows = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [row["test"].split("::")[1] for row in rows] == ["test_a[1]", "test_b[1]", "test_a[2]", "test_b[2]"]
    assert [row["outcome"] for row in rows] == ["passed", "passed", "failed", "passed"]
    assert "assert 2 == 1" in rows[2]["text"]


def test_tests_marked_gpu_import_only_what_a_gpu_machine_has():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"\bmark\.gpu\b", path.read_text())]
    assert {"test_gpu.py", "test_triton.py"} <= {path.name for path in marked}
    helpers = {path.stem: path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")}
    seen, left = set(), [*marked, helpers["conftest"]]
    while left:
        path = left.pop()
        seen.add(path)
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
        others = {name.split(".")[0] for name in names} - sys.stdlib_module_names - GPU_MACHINE
        assert others <= helpers.keys(), path
        left += {helpers[name] for name in others} - seen
    assert {"jobs", "counted_step"} <= {path.stem for path in seen}


def test_without_a_gpu_the_command_says_so(tmp_path):
    if torch.cuda.is_available():
        return
    done = run("bash", ROOT / "launch/gpu_checks.sh", tmp_path, PYTHON=sys.executable)
    assert done.returncode == 1 and "has no PyTorch that sees a GPU. Set PYTHON to one that does." in done.stderr
