"""Compiled stretches: the same numbers, whole graphs, none compiled again after the first step; and no compiler, said so."""

from dataclasses import replace

import pytest
import torch
from against_reference import BASE, OPTIMIZERS, config_of

from megatrain.kernels import compiled
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import spawn
from megatrain.testing.agree import agree
from megatrain.testing.trace import trace_run

# torch's own code asks tensors for their .grad, and for what it deprecates itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

MODELS = {
    "gpt2": {},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "num_query_groups": 2,
        "bias": False,
        "tied_embeddings": False,
        "qk_norm": True,
        "dropout": 0.1,
    },
    "neighbours": {"position": "rope", "rope_interleaved": True, "rope_fraction": 0.5, "activation": "relu"},
}


def config(model="gpt2", precision="fp64", **train):
    given = config_of(replace(BASE, **MODELS[model]), OPTIMIZERS[0 if precision == "fp64" else 2], precision)
    return replace(given, train=replace(given.train, steps=3, **train))


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("model", "recompute"),
    [
        *(("gpt2", r) for r in ("none", "full")),
        *(("llama", r) for r in ("selective", "full")),
        ("neighbours", "none"),
        # Between those: each stretch and each way to run it again is compiled above.
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("gpt2", "selective"), ("llama", "none"))),
    ],
)
def test_the_same_numbers_and_no_graph_after_the_first_step(model, recompute):
    torch._dynamo.reset()
    graphs = []

    def count(run):
        run.observers.before_update.append(lambda _: graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    torch._dynamo.utils.counters.clear()
    ours = trace_run(ParallelContext.single(), config(model, compile="block", recompute=recompute), 3, prepare=count)
    agree(trace_run(ParallelContext.single(), config(model, recompute=recompute), 3), ours, optimizer="adamw")
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    assert not torch._dynamo.utils.counters["graph_break"]


def on_two(ctx, given):
    return trace_run(ctx, given, 2)


@pytest.mark.compiler
def test_two_processes_share_a_compiled_model():
    given = config(compile="block")
    layout = replace(given, parallel=replace(given.parallel, tensor_parallel_size=2, sequence_parallel=True))
    from megatrain.parallel.mesh import MeshShape

    traces = spawn(MeshShape(tp=2), on_two, layout, timeout_seconds=200)
    for trace in traces:
        agree(trace_run(ParallelContext.single(), config(), 2), trace, optimizer="adamw")


def test_without_a_compiler_the_package_is_named(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"train\.compile=block needs a C\+\+ compiler.*apt install g\+\+"):
        trace_run(ParallelContext.single(), config(compile="block"), 1)


def test_a_path_with_a_blank_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/my venv/torch/__init__.py")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    with pytest.raises(
        ValueError, match=r"path has a blank \(/my venv/torch/__init__.py\)\. Put the virtual environment elsewhere"
    ):
        trace_run(ParallelContext.single(), config(compile="block"), 1)


def test_nothing_is_compiled_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)  # calling it would fail
    trace_run(ParallelContext.single(), config(), 1)
