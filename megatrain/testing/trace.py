"""Train a few steps on one rank of any layout and record everything that layouts must agree on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from megatrain.config.schema import Config
from megatrain.data.loader import Loader
from megatrain.data.samples.gpt import hash64
from megatrain.models.objective import Objective
from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.testing.agree import Trace
from megatrain.training import Run, assemble, train_step


class RandomSamples:
    """Endless random samples: tokens [seq_length + 1] below `vocab_size`, a pure function of (seed, n)."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int = 0) -> None:
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Tokens of sample n."""
        start = hash64(hash64(self.seed + 1) ^ n)
        return np.array([hash64(start + i) % self.vocab_size for i in range(self.seq_length + 1)], dtype=np.int64)


def mesh_shape(config: Config, data_parallel_size: int = 1) -> MeshShape:
    """The mesh that `config.parallel` describes, with so many replicas."""
    p = config.parallel
    return MeshShape(p.tensor_parallel_size, p.context_parallel_size, data_parallel_size, p.pipeline_parallel_size)


def trace_run(
    ctx: ParallelContext,
    config: Config,
    steps: int = 5,
    *,
    objective: Objective | None = None,
    prepare: Callable[[Run], None] | None = None,
) -> Trace:
    """Take `steps` steps of `config` on random tokens (`model.vocab_size` is needed) and return the whole logical trace, on every rank.

    `prepare` is called with the run before the first step. Collective over the world of `ctx`.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is null, and a traced run has no tokenizer to ask. Set model.vocab_size=101.")
    samples = RandomSamples(vocab_size, config.model.seq_length, config.train.seed)
    train = config.train
    with Loader(samples, train.global_batch_size, train.micro_batch_size, ctx.dp.rank, ctx.dp.size) as loader:
        run = assemble(config, ctx, loader, vocab_size, objective=objective)
        if prepare is not None:
            prepare(run)
        reports, gradients = [], {}
        for step in range(steps):
            reports.append(train_step(run))
            if step == 0:
                gradients = {p.spec.name: whole(ctx, p.spec, _gradient(p.main_grad)) for p in run.flat.parameters}
    weights, *states = (
        {name: whole(ctx, spec, tensor) for name, (spec, tensor) in kind.items()} for kind in run.optimizer.tensors().values()
    )
    return Trace(
        losses=[r.loss for r in reports],
        grad_norms=[r.grad_norm for r in reports],
        gradients=gradients,
        weights=weights,
        states=dict(zip(run.optimizer.states, states, strict=True)),
        learning_rate=config.optim.lr,
        dtype=config.train.precision,
    )


def _gradient(main_grad: torch.Tensor | None) -> torch.Tensor:
    if main_grad is None:
        raise ValueError("a parameter in the flat buffers has no main_grad")
    return main_grad.clone()


def whole(ctx: ParallelContext, spec: ParamSpec, local: torch.Tensor) -> torch.Tensor:
    """The logical tensor of `spec`, on the CPU, from every tensor-parallel rank's `local` one. Collective over tp."""
    logical = torch.zeros(spec.shape, dtype=local.dtype, device=local.device)
    slices = spec.slices(ctx.tp.size, ctx.tp.rank)
    if spec.owned(ctx.tp):
        logical[slices] = local[tuple(slice(0, s.stop - s.start) for s in slices)]
    return all_reduce(logical, ctx.tp).cpu()
