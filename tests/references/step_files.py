"""Which files one reads to follow a training step: what training.py imports, closed, without what a step calls and does not define.

python tests/references/step_files.py      lists them with their lines
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {
    "kernels": "how one operation is computed fast; each has a plain form beside it",
    "transport": "how ranks reach each other",
    "parallel.rng": "random numbers that no layout changes",
    "parallel.simulator": "predicts the timeline of a schedule",
    "config": "keys and their rules, but for the batches of a step (config.budget)",
    "data": "text, stores and samples, but for the loader that cuts the step's batch (data.loader)",
    "models.position": "tables of angles and slopes, one for each kind of position",
    "models.recompute": "which activations are made again",
    "checkpoint": "saves",
    "runtime": "the process: rank, memory, FLOPs",
    "plan": "predictions",
    "testing": "tests",
}
"""Rooms and files, by their names under megatrain, and what they are to a step."""
COUNTED = ("config.budget", "data.loader")
"""Files of rooms left out that a step is read with."""


def counts(module: str) -> bool:
    """Whether a module, named under megatrain, is one of the step's."""
    return module in COUNTED or not any(module == out or module.startswith(f"{out}.") for out in LEFT_OUT)


def imports(source: str) -> set[str]:
    """Modules under megatrain that a file may import, deferred imports included; names of other things are among them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatrain"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("megatrain.") for name in found if name.startswith("megatrain.")}


def step_files(root: Path = ROOT) -> dict[str, int]:
    """Lines of every file of the step, by its name under megatrain/."""
    package = root / "megatrain"
    modules = {
        ".".join(file.relative_to(package).with_suffix("").parts): file
        for file in package.rglob("*.py")
        if file.name != "__init__.py"
    }
    seen: set[str] = set()
    waiting = ["training"]
    while waiting:
        module = waiting.pop()
        if module in modules and module not in seen and counts(module):
            seen.add(module)
            waiting += imports(modules[module].read_text())
    files = sorted(modules[module] for module in seen)
    return {file.relative_to(package).as_posix(): len(file.read_text().splitlines()) for file in files}


if __name__ == "__main__":
    files = step_files()
    for file, lines in files.items():
        print(f"{lines:5} {file}")
    print(f"{sum(files.values()):5} lines in {len(files)} files")
