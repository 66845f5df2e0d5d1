"""Recomputation gives the same bits for less memory, and selective recomputation runs no matmul twice."""

from collections import Counter

import pytest
import torch
from thinned import thinned

from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.kernels import matmul as kernel
from megatrain.kernels.gated import GATES, gated
from megatrain.models.recompute import recomputed
from megatrain.parallel import param, tensor_parallel, vocabulary
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run

LAYOUTS = [
    ("1f1b", 1, 1, 1, False),
    ("1f1b", 1, 1, 2, True),
    ("gpipe", 2, 1, 1, False),
    ("interleaved", 2, 2, 2, True),
    ("zb_h1", 2, 1, 2, False),
    ("zb_v", 2, 2, 1, False),
]
MODELS = [
    {},
    {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "ffn_hidden_size": 24,
        "num_query_groups": 2,
    },
    {"activation": "relu", "tied_embeddings": False},
]


def config_of(layout, recompute, precision="fp32", **model):
    schedule, stages, chunks, tp, sequence_parallel = layout
    shape = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8, "vocab_size": 29}
    return Config(
        model=ModelConfig(**shape, dropout=0.1, init_std=0.1, **model),
        parallel=ParallelConfig(
            tensor_parallel_size=tp,
            sequence_parallel=sequence_parallel,
            pipeline_parallel_size=stages,
            virtual_pipeline_size=chunks,
            schedule=schedule,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=2, global_batch_size=8, micro_batch_size=2, precision=precision, recompute=recompute),
    )


@pytest.mark.parametrize(("layout", "model", "precision"), thinned(LAYOUTS, MODELS, ["fp32", "bf16"]), ids=str)
def test_losses_gradients_and_weights_are_the_same_bits(layout, model, precision):
    shape = MeshShape(tp=layout[3], pp=layout[1])
    traces = [simulate(shape, trace_run, config_of(layout, r, precision, **model), 2)[0] for r in ("none", "selective", "full")]
    for other in traces[1:]:
        assert other.losses == traces[0].losses and other.grad_norms == traces[0].grad_norms
        for name, gradient in traces[0].gradients.items():
            assert torch.equal(other.gradients[name], gradient), name
            assert torch.equal(other.weights[name], traces[0].weights[name]), name


@pytest.fixture
def products(monkeypatch):
    """How often each kind of matrix product was called."""
    counts = Counter()

    def spy(module, name):
        real = getattr(module, name)

        def counted(*arguments):
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, counted)

    for name in ("linear", "matmul", "add_matmul"):
        assert hasattr(kernel, name)
        spy(vocabulary, name)
    for name in ("linear", "matmul"):
        spy(tensor_parallel, name)
    spy(param, "add_matmul")
    return counts


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_selective_runs_no_matmul_twice_and_full_runs_each_layer_again(products, model):
    counts = {}
    for recompute in ("none", "selective", "full"):
        products.clear()
        trace_run(ParallelContext.single(), config_of(LAYOUTS[0], recompute, **model), 1)
        counts[recompute] = dict(products)
    assert counts["selective"] == counts["none"]
    layers, micro_batches, per_layer = 4, 4, 4  # q|k|v, output, (gate|)up, down
    assert counts["full"]["linear"] == counts["none"]["linear"] + layers * micro_batches * per_layer
    assert counts["full"]["add_matmul"] == counts["none"]["add_matmul"]


def test_a_recomputed_function_keeps_its_input_alone():
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    kept = []

    def function(x):
        return (x @ weight).tanh() @ weight

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(function(x).square().sum(), (x, weight))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = recomputed(function, x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    y.square().sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), plain)


def test_an_input_without_a_gradient_does_not_hide_the_weights():
    weight = torch.ones(2, 2, requires_grad=True)
    recomputed(lambda x: x @ weight, torch.ones(1, 2)).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not recomputed(lambda x: x @ weight, torch.ones(1, 2)).requires_grad


@pytest.mark.parametrize("activation", GATES)
def test_a_gated_activation_keeps_its_arguments_and_has_their_gradients(activation):
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (gate, up))
    dy = torch.randn(4, 3, dtype=torch.float64)
    ours = torch.autograd.grad(gated(gate, up, activation), (gate, up), dy)
    theirs = torch.autograd.grad(GATES[activation](gate) * up, (gate, up), dy)
    assert all(map(torch.equal, ours, theirs)), "to the bit"
