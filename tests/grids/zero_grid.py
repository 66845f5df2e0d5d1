"""ZeRO in the central theorem, as data: every stage with every schedule, tensor parallelism, tied embeddings, recomputation."""

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
PIPELINES = [
    ("1f1b", 1, 1),
    ("gpipe", 1, 2),
    ("1f1b", 1, 2),
    ("interleaved", 2, 2),
    ("zb_h1", 1, 2),
    ("zb_v", 2, 2),
    ("zb_v", 2, 1),
]

# zero stage, (schedule, chunks, stages), (tp, sequence parallel), dp, micro-batches, tied, recompute, bucket size
POINTS = list(
    product(
        (0, 1, 2, 3),
        PIPELINES,
        ((1, False), (2, True)),
        (2, 4),
        (1, 3),
        (True, False),
        ("none", "selective", "full"),
        (500, 10**6),
    )
)
COVERING = covering(POINTS, strength=2)
"""Every pair of values."""
TRIPLES = [point for point in covering(POINTS[::5]) if point not in COVERING]
"""Every triple of values of a fifth of the grid."""
GLOO = [point for point in COVERING if point[1][2] * point[2][0] * point[3] <= 8][::3]


def config_of(point: tuple, precision: str = "fp64", master: str = "fp32") -> Config:
    """The config of a point; 12 sequences a step."""
    stage, (schedule, chunks, stages), (tp, sequence_parallel), dp, micro_batches, tied, recompute, bucket_size = point
    model = grid_model(5, tied, dropout=tied)
    parallel = ParallelConfig(
        tensor_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        pipeline_parallel_size=stages,
        virtual_pipeline_size=chunks,
        schedule=schedule,
        zero_stage=stage,
        bucket_size=bucket_size,
    )
    train = TrainConfig(
        steps=STEPS,
        global_batch_size=12,
        micro_batch_size=12 // (dp * micro_batches),
        precision=precision,
        recompute=recompute,
    )
    optim = OptimConfig(name="sgd" if precision == "fp32" else "adamw", lr=1e-2, warmup_steps=1, master=master)
    return Config(model=model, parallel=parallel, optim=optim, train=train)


@cache
def reference(tied: bool, precision: str) -> Trace:
    """The single process."""
    point = (0, ("1f1b", 1, 1), (1, False), 1, 3, tied, "none", 10**6)
    return trace_run(ParallelContext.single(), config_of(point, precision), STEPS)


def shape_of(point: tuple) -> MeshShape:
    """The mesh of a point."""
    return mesh_shape(config_of(point), point[3])


def compare(traces: list[Trace], point: tuple, precision: str = "fp64") -> None:
    """Raise Disagreement unless every rank's trace agrees with the single process."""
    for trace in traces:
        agree(reference(point[5], precision), trace, optimizer=config_of(point, precision).optim.name)
