"""The training step: tokens -> loss -> gradients -> parameters, in `queue_step`, and the run that it is taken on.

One path serves every layout: a laptop's single process is a mesh of size 1, gradient accumulation is a pipeline of one stage.
`assembly.py` builds a run, `program.py` goes on with it until it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch

from megatrain.config.budget import budget_of, learning_rate, position, warmup_of, weight_decay
from megatrain.config.schema import Config
from megatrain.data.held_out import Evaluated
from megatrain.data.loader import Batch, Loader
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch, Objective
from megatrain.models.gpt import GPT, Head
from megatrain.optim.optimizer import LossScale, Optimizer, clip_divisor, local_squared_norm
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Postponed
from megatrain.parallel.pipeline_parallel import Executed, Observer, Parameters, Stage, Unsharded, run_schedule
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.zero import FlatParameters
from megatrain.runtime.reports import Caution, Queued, StepReport, carefree
from megatrain.transport.host import Moment, to_device

SMALLEST_WEIGHT = 1e-8
"""Least divisor of a sum of losses, so that a batch in which nothing counts has loss 0."""

Phase = Literal["data", "reduce", "optimizer"]
"""A phase of a step besides the pipeline's instructions: read the batch, reduce the gradients, update the weights."""


@dataclass
class Observers:
    """Functions that are told what a run does, for measurements; none by default."""

    instruction: Observer | None = None
    """Called after every instruction of the pipeline."""
    phase: Callable[[Phase], AbstractContextManager[object]] = nullcontext
    """Entered for the time of each phase."""
    before_update: list[Callable[[Run], None]] = field(default_factory=list)
    """Called once gradients are whole, and before the optimizer uses them up."""


@dataclass
class Model:
    """A model on this rank, with an objective. One context may hold several."""

    config: Config
    ctx: ParallelContext
    chunks: list[GPT]
    """This rank's virtual stages of the model, in order; one without pipelining."""
    objective: Objective
    held_out: dict[str, Evaluated] = field(default_factory=dict, kw_only=True)
    """Validation sets by name."""
    step: int = field(default=0, kw_only=True)
    """Batches consumed; each was applied or skipped."""
    observers: Observers = field(default_factory=Observers, kw_only=True)
    prepare: Callable[[list[MicroBatch]], list[MicroBatch]] = field(default=list, kw_only=True)
    """Completes micro-batches with what the objective reads beside the text (`MicroBatch.extra`)."""
    parameters: Parameters = field(default_factory=Unsharded, kw_only=True)
    """The weights as the executor asks for them; those of a run lie in flat buffers, perhaps in shards."""


@dataclass
class Run(Model):
    """Everything that one training run is made of, on this rank."""

    flat: FlatParameters
    optimizer: Optimizer
    loader: Loader
    consumed_samples: int = 0
    """Sequences of the whole job that the weights have seen: where its data goes on."""
    stop_requested: Callable[[], bool] = bool
    """Whether this rank was told to stop; asked once a step."""
    caution: Callable[[int], Caution] = carefree
    """How carefully a step, counted from 1, is taken, the same on every rank."""

    def __post_init__(self) -> None:
        self.loss_scale = LossScale(self.config.train, self.ctx.device)
        self.warmup, self.budget = warmup_of(self.config), budget_of(self.config)
        self.parameters = self.flat

    @property
    def lr(self) -> float:
        """Learning rate of the next update, by the schedule."""
        return learning_rate(self.config.optim, position(self.config, self.warmup, self.step, self.consumed_samples))

    @property
    def weight_decay(self) -> float:
        """Weight decay of the next update."""
        return weight_decay(self.config.optim, position(self.config, self.warmup, self.step, self.consumed_samples))

    @property
    def total_steps(self) -> int:
        """Updates of the whole run, those that are done included."""
        return self.budget.total_steps(self.step, self.consumed_samples)


def schedule_of(config: Config, micro_batches: int, *, backward: bool = True) -> Schedule:
    """The pipeline schedule of a config for so many micro-batches."""
    p = config.parallel
    return Schedule(p.schedule, p.pipeline_parallel_size, p.virtual_pipeline_size, micro_batches, backward)


def train_step(run: Run) -> StepReport:
    """One optimizer update, and what it did."""
    return queue_step(run).report()


def queue_step(run: Run) -> Queued:
    """One optimizer update: tokens -> loss -> gradients -> parameters. Nothing here waits for the device."""
    began, size = Moment(run.ctx.device), run.budget.batch_size(run.consumed_samples)
    with run.observers.phase("data"):
        batch = run.loader.batch(run.consumed_samples)
    micro_batches = run.prepare(to_micro_batches(batch, run))
    totals = global_weights(run, micro_batches)
    weight = totals.sum().clamp_min(SMALLEST_WEIGHT)
    scale, schedule = run.loss_scale.scale / weight, schedule_of(run.config, len(micro_batches))
    shrunk = run.caution(run.step + 1).embedding_grad
    micro_batches = [replace(m, totals=totals, scale=scale, embedding_grad=shrunk) for m in micro_batches]
    run.flat.zero_grad()
    executed = run_schedule(stage_of(run), schedule, micro_batches, scale)
    with run.observers.phase("reduce"):
        run.flat.reduce()
    sums = sum_totals(run, executed, weight)
    divisor = clip_divisor(sums.grad_norm, run.config.optim.clip_grad) * run.loss_scale.scale
    for observe in run.observers.before_update:
        observe(run)
    care, left_out = run.caution(run.step + 1), run.step + 1 in run.config.train.skip_steps  # norms of parts are known now
    lr, skip = run.lr * care.rate, care.left_out(sums.overflow, sums.means[0], sums.grad_norm).clamp_min(float(left_out))
    with run.observers.phase("optimizer"):
        run.optimizer.step(lr, divisor, skip, run.weight_decay)
    run.loss_scale.update(sums.overflow)
    run.consumed_samples += size
    run.step += 1
    numbers = torch.cat([torch.stack([sums.grad_norm, sums.overflow, skip, sums.stop, run.loss_scale.scale]), sums.means])
    reading = run.ctx.world.start_to_host(numbers)
    return Queued(run.step, lr, size, run.consumed_samples, run.loader.waited, began, executed.names, reading)


def to_micro_batches(batch: Batch, run: Model) -> list[MicroBatch]:
    """A loader's numpy batch [m, b, s] as m micro-batches [s, b] on the device, which are sent in one copy."""
    host: dict[str, Any] = {f.name: torch.from_numpy(x) for f in fields(Batch) if (x := getattr(batch, f.name)) is not None}
    host = {name: x.transpose(1, 2) if x.dim() == 3 else x for name, x in host.items()}
    sent = {name: x.unbind() for name, x in zip(host, to_device(list(host.values()), run.ctx.device), strict=True)}
    micro_batches = []
    for m in range(len(batch.tokens)):
        given: dict[str, Any] = {name: x[m] for name, x in sent.items()}
        on_host = AttentionMask(**{name: x[m] for name, x in host.items() if name in ("documents", "prefix")})
        mask = AttentionMask(documents=given.pop("documents", None), prefix=given.pop("prefix", None), on_host=on_host)
        micro_batches.append(MicroBatch(samples=given.pop("places"), step=run.step, mask=mask, **given))
    return micro_batches


def global_weights(run: Run, micro_batches: list[MicroBatch]) -> torch.Tensor:
    """The objective's weights of the global batch, whose sum its loss is divided by: float64 scalar or [n]."""
    return run.ctx.dp_cp.all_reduce(torch.stack([run.objective.weight(m) for m in micro_batches]).sum(0).double())


def forward(model: Model, micro_batches: list[MicroBatch]) -> Executed:
    """Forward passes only: sums, and outputs of the objective. Several models may take turns on one context."""
    return run_schedule(stage_of(model), schedule_of(model.config, len(micro_batches), backward=False), micro_batches, 1.0)


def stage_of(run: Model) -> Stage:
    """This rank's share of the pipeline, as the executor sees it."""
    head = cast(Head, run.chunks[-1].head)  # on the rank of the last virtual stage, which is the one that is asked for it
    return Stage(
        run.ctx,
        [partial(_run_chunk, chunk) for chunk in run.chunks],
        lambda hidden, micro_batch: head(hidden, run.objective, micro_batch),
        run.chunks[0].boundary,
        run.objective.statistics,
        run.observers.instruction,
        run.parameters,
        type(run.objective).__name__,
    )


def _run_chunk(chunk: GPT, x: torch.Tensor | None, of: MicroBatch, sums: Executed, postponed: Postponed | None) -> torch.Tensor:
    """Run a chunk; its layers read from their micro-batch where statistics and postponed weight gradients go."""
    return chunk(x, replace(of, sums=sums.by_name, postponed=postponed))


class Totals(NamedTuple):
    """Sums over the world, still on the device: float64 scalars, and means [1 + k] of the loss and the statistics over the weight."""

    grad_norm: torch.Tensor
    overflow: torch.Tensor
    """0 or 1: the loss or the gradient is not finite."""
    stop: torch.Tensor
    """Number of ranks told to stop."""
    means: torch.Tensor


def sum_totals(run: Run, executed: Executed, weight: torch.Tensor) -> Totals:
    """One small all-reduce carries what the ranks must agree on: squared norm, loss, statistics, the wish to stop."""
    ctx = run.ctx
    counts = float(ctx.tp.rank == 0)  # tensor-parallel ranks hold the same sums, and the stages before the last hold 0
    stop = torch.full((1,), float(run.stop_requested()), dtype=torch.float64, device=ctx.device)
    message = ctx.world.all_reduce(torch.cat([local_squared_norm(run.flat, ctx)[None], executed.sums * counts, stop]))
    squared_norm, sums, stops = message[0], message[1:-1], message[-1]
    finite = torch.isfinite(squared_norm) & torch.isfinite(sums[0])
    return Totals(squared_norm.sqrt() / run.loss_scale.scale, (~finite).double(), stops, sums / weight)
