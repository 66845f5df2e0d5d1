"""docs/a_step.md names the files of the step, functions that are there, and the calls that a step makes."""

import ast
import re
from pathlib import Path

from step_files import step_files

from megatrain.assembly import assemble
from megatrain.config.load import from_dict
from megatrain.data.loader import Loader
from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate
from megatrain.testing.trace import random_source
from megatrain.training import train_step
from megatrain.transport.wrappers import RecordedWorld, Recorder

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/a_step.md").read_text()


def defined(file: str) -> set[str]:
    """Names of the functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse((ROOT / "megatrain" / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return found


def test_the_page_lists_each_file_of_the_step_once() -> None:
    listed = re.findall(r"^\d+\. \*\*\[([\w/.]+)\]\(\.\./megatrain/([\w/.]+)\)\*\*", PAGE, re.MULTILINE)
    assert all(shown == target for shown, target in listed)
    assert sorted(target for _, target in listed) == sorted(step_files())


def test_functions_that_the_page_names_are_there() -> None:
    named = re.findall(r"\[`([\w.]+)`\]\(\.\./megatrain/([\w/.]+)\)", PAGE)
    assert {file for _, file in named} == set(step_files())
    assert [(name, file) for name, file in named if name not in defined(file)] == []


def calls(ctx, recorder):
    """Calls of one step on this rank, by axis and operation."""
    config = from_dict(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "num_query_groups": 1,
                "seq_length": 8,
                "vocab_size": 31,
            },
            "data": {"train": "random"},
            "train": {"steps": 9, "global_batch_size": 8, "micro_batch_size": 2},
            "parallel": {
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 2,
                "zero_stage": 2,
                "sequence_parallel": True,
            },
        }
    )
    samples, compose = random_source(config, 31)
    with Loader(samples, 8, 2, ctx.dp.rank, ctx.dp.size, compose=compose) as loader:
        run = assemble(config, ctx, loader, 31)
        recorder[ctx.world.rank].reset()
        train_step(run)
        run.flat.settle()
    return {key: total.calls for key, total in recorder[ctx.world.rank].totals().items()}


def test_a_step_makes_the_calls_that_the_page_counts() -> None:
    rows = re.findall(r"^\| ([\w >]+) \| (\w+) \| (\d+) \|", PAGE, re.MULTILINE)
    counted = {(axis, operation): int(times) for axis, operation, times in rows}
    recorders = [Recorder() for _ in range(8)]
    found = simulate(
        MeshShape(tp=2, pp=2, dp=2), calls, recorders, wrap=lambda world: RecordedWorld(world, recorders[world.rank])
    )[6]
    assert len(counted) == len(rows) == 10 and counted == found
