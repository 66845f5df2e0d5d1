"""Pipelines of the central theorem, as data: every schedule on every layout trains to the same numbers as one process."""

from __future__ import annotations

from functools import cache
from itertools import product

from grid_model import grid_model

from megatrain.config.schema import Config, OptimConfig, ParallelConfig, TrainConfig
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing.agree import Trace, agree
from megatrain.testing.layouts import covering
from megatrain.testing.trace import mesh_shape, trace_run

STEPS = 2
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2)]

# (schedule, chunks), stages, micro-batches, tied, layers, (tp, sequence parallel), dp
POINTS = list(
    product(SCHEDULES, (1, 2, 4), (1, 2, 3, 4, 8), (True, False), (8, 11), ((1, False), (2, False), (2, True)), (1, 2))
)
COVERING = covering(POINTS, strength=2)
"""Every pair of values."""
GLOO = [point for point in COVERING if point[1] > 1 and point[1] * point[5][0] * point[6] <= 8]
"""Those that real processes run."""
FLOAT32 = [point for point in COVERING if point[1] > 1][::2]


def config_of(point: tuple, precision: str = "fp64") -> Config:
    """The config of a point; 2 sequences a micro-batch. AdamW in float64, SGD in float32 (docs/numerics.md)."""
    (schedule, chunks), stages, micro_batches, tied, layers, (tp, sequence_parallel), dp = point
    model = grid_model(layers, tied, dropout=layers == 8)
    parallel = ParallelConfig(
        tensor_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        pipeline_parallel_size=stages,
        virtual_pipeline_size=chunks,
        schedule=schedule,
    )
    train = TrainConfig(steps=STEPS, global_batch_size=2 * micro_batches * dp, micro_batch_size=2, precision=precision)
    optim = OptimConfig(name="adamw" if precision == "fp64" else "sgd", lr=1e-2, warmup_steps=1)
    return Config(model=model, parallel=parallel, optim=optim, train=train)


@cache
def reference(sequences: int, tied: bool, layers: int, precision: str) -> Trace:
    """The single process, which takes the batch in micro-batches of 2."""
    point = (("1f1b", 1), 1, sequences // 2, tied, layers, (1, False), 1)
    return trace_run(ParallelContext.single(), config_of(point, precision), STEPS)


def shape_of(point: tuple) -> MeshShape:
    """The mesh of a point."""
    return mesh_shape(config_of(point), point[6])


def compare(traces: list[Trace], point: tuple, precision: str = "fp64") -> None:
    """Raise Disagreement unless every rank's trace agrees with the single process."""
    config = config_of(point, precision)
    for trace in traces:
        agree(reference(config.train.global_batch_size, point[3], point[4], precision), trace, optimizer=config.optim.name)
