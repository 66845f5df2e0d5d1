"""Layouts and settings of the central theorem, as data: every layout trains to the same numbers as one process."""

from __future__ import annotations

from functools import cache
from itertools import product

from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing.agree import Trace, agree
from megatrain.testing.trace import mesh_shape, trace_run

STEPS = 3
"""The third begins with what two updates, warm-up and a whole one, have made of weights and states."""

# tp, sequence parallel, dp, query groups
LAYOUTS = [
    (2, False, 1, 4),
    (4, False, 1, 4),
    (2, True, 1, 4),
    (1, False, 2, 4),
    (1, False, 4, 4),
    (2, False, 2, 4),
    (2, True, 2, 4),
    (4, False, 1, 2),
    (4, True, 1, 2),
    (4, True, 1, 1),
]

# tied, vocabulary (padded, and not), micro-batches, dropout, precision: every value of every three of them together
SETTINGS = list(product((True, False), (101, 512), (1, 4), (0.0, 0.1), ("fp64", "fp32")))


def config_of(layout: tuple, setting: tuple) -> Config:
    """The config of one point of the grid; the model covers both kinds of block over the settings."""
    tp, sequence_parallel, dp, groups = layout
    tied, vocab, micro_batches, dropout, precision = setting
    modern = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "ffn_hidden_size": 48}
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=groups,
        seq_length=16,
        vocab_size=vocab,
        tied_embeddings=tied,
        dropout=dropout,
        init_std=0.1,
        **({} if tied else modern),
    )
    # AdamW in float32 divides rounding noise by itself where a gradient is zero; SGD does not.
    optim = OptimConfig(name="adamw" if precision == "fp64" else "sgd", lr=1e-2, warmup_steps=2)
    batch = 16
    train = TrainConfig(
        steps=STEPS, global_batch_size=batch, micro_batch_size=batch // (dp * micro_batches), precision=precision
    )
    parallel = ParallelConfig(tensor_parallel_size=tp, sequence_parallel=sequence_parallel)
    return Config(model=model, parallel=parallel, optim=optim, train=train)


@cache
def reference(groups: int, setting: tuple) -> Trace:
    """The single process."""
    return trace_run(ParallelContext.single(), config_of((1, False, 1, groups), setting), STEPS)


def compare(traces: list[Trace], layout: tuple, setting: tuple) -> None:
    """Raise Disagreement unless every rank's trace agrees with the single process."""
    for trace in traces:
        agree(reference(layout[3], setting), trace, optimizer=config_of(layout, setting).optim.name)


def shape_of(layout: tuple, setting: tuple):
    """The mesh of a layout."""
    return mesh_shape(config_of(layout, setting), layout[2])
