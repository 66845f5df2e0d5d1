"""Who may import whom: the contracts of setup.cfg hold, cover every room and dimension, and break when they should."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = {"__init__", "buckets", "collectives", "flat", "mesh", "param", "rng", "schedules", "simulator"}
SUPPORT |= {"portion", "uses", "vocabulary", "weights"}
"""Files of parallel/ that are no dimension of parallelism: dimensions may import them."""


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts over the checkout at `root`."""
    command = ["bash", str(root / "launch/lint.sh"), "layers"]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the contracts read, to break."""
    for name in ("megatrain", "kernels", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def test_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("megatrain/parallel/collectives.py", "import megatrain.config.schema", "parallel imports kernels and transport alone"),
        ("megatrain/models/gpt.py", "import megatrain.optim", "rooms import downwards"),
        ("megatrain/config/schema.py", "import yaml", "config.schema imports only the standard library"),
        ("megatrain/data/indexed.py", "import torch", "data and ngram need numpy alone"),
        ("megatrain/optim/optimizer.py", "import megatrain.config.load", "rooms below train read config.schema, never files"),
        ("kernels/__init__.py", "import megatrain.parallel.mesh", "kernels import nothing of megatrain"),
        ("megatrain/attic.py", "import math", "rooms import downwards"),
    ],
)
def test_contracts_can_break(checkout: Path, file: str, line: str, broken: str) -> None:
    with (checkout / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(checkout)
    assert done.returncode == 1
    report = " ".join(done.stdout.split())
    assert f"{broken} BROKEN" in report, done.stdout


def test_every_dimension_is_under_the_independence_contract() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["importlinter:contract:dimensions"]["modules"].split())
    files = {path.stem for path in (ROOT / "megatrain/parallel").glob("*.py")}
    dimensions = files - SUPPORT
    assert listed == {f"megatrain.parallel.{name}" for name in dimensions}


def imports() -> dict[str, set[str]]:
    """Modules of megatrain -> those that they import anywhere, in a function or for types too."""
    homes = {"megatrain": ROOT / "megatrain", "megatrain.kernels": ROOT / "kernels"}
    modules = {
        ".".join((root, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for root, folder in homes.items()
        for path in folder.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        graph[module] = (named & set(modules)) - {module, "megatrain"}
    return graph


def test_no_two_modules_import_each_other_not_even_late() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graph = imports()
    assert len(graph) > 200 and "megatrain.records.tensorboard" in graph["megatrain.records.log"]  # a deferred one
    TopologicalSorter(graph).prepare()
