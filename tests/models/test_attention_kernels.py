"""Which kernels a run's attention asks for: tried on its own shape, and handed to every layer."""

import pytest
import torch

from megatrain import assembly
from megatrain.config.load import from_dict
from megatrain.kernels.sdpa import Choice, Shape
from megatrain.models import layers as layer
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing.trace import trace_run

LLAMA = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 8, "num_query_groups": 2, "seq_length": 6, "vocab_size": 11}


def config(model=None, data=None, train=None):
    return from_dict(
        {
            "model": {**LLAMA, **(model or {})},
            "data": data or {},
            "train": {"micro_batch_size": 3, "global_batch_size": 3, "steps": 1, "precision": "fp32", **(train or {})},
            "optim": {"warmup_steps": 0},
        }
    )


@pytest.fixture
def asked(monkeypatch):
    """What `choose` was asked, in order."""
    calls = []

    def choose(*call):
        calls.append(call)
        return Choice(("cudnn", "flash"), "told")

    monkeypatch.setattr(assembly, "choose", choose)
    return calls


@pytest.mark.parametrize(("tp_size", "heads", "groups"), [(1, 8, 2), (2, 4, 1), (4, 2, 1)])
def test_the_shape_is_that_of_one_rank(asked, tp_size, heads, groups):
    choice = assembly.kernels_of(config(train={"deterministic": True}), tp_size, torch.bfloat16, torch.device("cuda"))
    assert choice == Choice(("cudnn", "flash"), "told")
    assert asked == [(Shape(s=6, b=3, heads=heads, groups=groups, d=2), torch.bfloat16, torch.device("cuda"), True)]


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"window": 3}},
        {"model": {"sparse_block": 2}},
        {"model": {"position": "alibi"}},
        {"model": {"attention_dropout": 0.1}},
        {"model": {"softmax_fp32": False}},
        {"data": {"isolate_documents": True}},
        {"data": {"objective": "glm"}, "model": {"family": "glm"}},
    ],
    ids=str,
)
def test_nothing_is_tried_where_training_has_another_attention(asked, other):
    assert assembly.kernels_of(config(**other), 1, torch.bfloat16, torch.device("cuda")) == Choice(("flash", "efficient"), "")
    assert asked == []


def test_every_layer_is_handed_the_order(asked, monkeypatch):
    orders, inner = [], layer.attention

    def attention(q, k, v, variant):
        orders.append(variant.order)
        return inner(q, k, v, variant)

    monkeypatch.setattr(layer, "attention", attention)
    trace_run(ParallelContext.single(), config({"num_layers": 2}), steps=1)
    assert orders == [("cudnn", "flash")] * 2
    assert [call[0] for call in asked] == [Shape(s=6, b=3, heads=8, groups=2, d=2)]
