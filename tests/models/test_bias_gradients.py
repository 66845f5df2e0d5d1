"""A bias before the sum of a block's stream has its gradient from the norm after that sum, where nothing lies between."""

import threading
from collections import Counter

import pytest
import torch

from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.kernels import dispatch
from megatrain.parallel import tensor_parallel
from megatrain.testing import simulate
from megatrain.testing.trace import mesh_shape, trace_run

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="Triton is not interpreted beside a GPU, and ranks here are on CPU"
)
LAYERS, MICRO_BATCHES = 2, 2


def config_of(kernels, model=None, parallel=None, **train):
    shape = {"num_layers": LAYERS, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 4, "vocab_size": 13}
    sizes = {"steps": 1, "global_batch_size": MICRO_BATCHES, "micro_batch_size": 1, "precision": "fp32"}
    return Config(
        model=ModelConfig(**{**shape, "init_std": 0.2, "norm_eps": 1e-2, **(model or {})}),
        parallel=ParallelConfig(device="cpu", **(parallel or {})),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(**{**sizes, "kernels": kernels, **train}),
    )


@pytest.fixture
def passes(monkeypatch):
    """How often a pass summed a gradient for biases; ranks are threads, and Triton's interpreter has room for one."""
    counts, lock, real = Counter(), threading.Lock(), tensor_parallel.add_bias_gradient

    def counted(biases, dy):
        counts["all"] += 1
        return real(biases, dy)

    monkeypatch.setattr(tensor_parallel, "add_bias_gradient", counted)
    kernel = type(dispatch.jit(config_of))
    launcher = kernel.__getitem__

    def one_at_a_time(self, grid):
        launch = launcher(self, grid)

        def locked(*args, **kwargs):
            with lock:
                return launch(*args, **kwargs)

        return locked

    monkeypatch.setattr(kernel, "__getitem__", one_at_a_time)
    return counts


def traced(config):
    return simulate(mesh_shape(config), trace_run, config, 1)[0]


def agree(passes, *given, **train):
    """The first gradients and the loss of Triton's kernels are the reference's; returns the passes that Triton's run made."""
    reference = traced(config_of("reference", *given, **train))
    passes.clear()
    mine = traced(config_of("triton", *given, **train))
    assert mine.losses == pytest.approx(reference.losses, rel=1e-5)
    biases = [name for name in mine.gradients if name.endswith("attention.output.bias")]
    assert len(biases) == LAYERS
    for name, gradient in reference.gradients.items():
        largest = gradient.abs().max()
        torch.testing.assert_close(mine.gradients[name], gradient, rtol=0, atol=float(1e-5 * largest + 1e-7), msg=name)
    return passes["all"]


@pytest.mark.parametrize(
    ("parallel", "recompute", "ranks"),
    [
        ({}, "none", 1),
        ({"tensor_parallel_size": 2}, "selective", 2),
        ({"tensor_parallel_size": 2, "sequence_parallel": True}, "full", 2),
        ({"pipeline_parallel_size": 2, "schedule": "zb_h1"}, "none", 1),
    ],
    ids=["one", "tp", "sp", "zb_h1"],
)
def test_of_a_blocks_output_biases_that_of_the_mlp_alone_is_summed_by_a_pass(passes, parallel, recompute, ranks):
    assert agree(passes, None, parallel, recompute=recompute) == LAYERS * MICRO_BATCHES * ranks


@pytest.mark.parametrize(
    "model",
    [
        {"norm_placement": "sandwich"},
        {"norm_placement": "post"},
        {"norm_placement": "deepnorm"},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_where_something_lies_between_there_are_two_passes(passes, model):
    assert agree(passes, model) == 2 * LAYERS * MICRO_BATCHES


def test_a_stream_of_a_wider_dtype_has_two_passes(passes):
    traced(config_of("triton", {"residual_fp32": True}, precision="bf16"))
    assert passes["all"] == 2 * LAYERS * MICRO_BATCHES
