"""The training program: build a run, take a step, go on until done.

One path serves every layout: a laptop's single process is a mesh of size 1, gradient accumulation is a pipeline of one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch

from megatrain.config.budget import Budget, budget_of, gauge_of
from megatrain.config.schema import Config
from megatrain.data.batches import Batch
from megatrain.data.held_out import Evaluated
from megatrain.data.loader import Loader
from megatrain.kernels.attention_mask import causal_mask
from megatrain.kernels.compiled import require_compiler
from megatrain.kernels.dispatch import use_triton
from megatrain.models.attention import kernels_of
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import GPT, Embedding, build_gpt, logical_parameters
from megatrain.models.objective import Mixture, NextToken, Objective
from megatrain.models.split import ranges_of, split_layers
from megatrain.optim.clip import clip_divisor, local_squared_norm
from megatrain.optim.loss_scale import LossScale
from megatrain.optim.mixed_precision import Optimizer
from megatrain.optim.schedule import Position, learning_rate, weight_decay
from megatrain.parallel.buckets import Unit
from megatrain.parallel.collectives import all_reduce, start_to_host, to_host
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Parameter
from megatrain.parallel.pipeline_parallel import Chunk, Executed, Observer, Parameters, Resident, Stage, run_schedule
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.weights import Postponed
from megatrain.parallel.zero import FlatParameters
from megatrain.runtime.flops import forward_flops, parameter_count
from megatrain.runtime.reports import Queued, StepReport
from megatrain.transport.host import Moment, to_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""train.precision -> dtype of the parameters and activations."""

SMALLEST_WEIGHT = 1e-8
"""What a sum of losses is divided by at least, so that a batch in which nothing counts has loss 0."""


@dataclass
class Model:
    """A model on this rank, and what it takes to compute a loss with it."""

    config: Config
    ctx: ParallelContext
    chunks: list[GPT]
    """This rank's virtual stages of the model, in order; one without pipelining."""
    objective: Objective
    held_out: dict[str, Evaluated] = field(default_factory=dict, kw_only=True)
    """Validation sets by name."""
    step: int = field(default=0, kw_only=True)
    """Batches consumed; each was applied or skipped."""
    observe: Observer | None = field(default=None, kw_only=True)
    """Told of every instruction of the pipeline when it has run, for measurements."""

    @property
    def parameters(self) -> Parameters:
        """Where the executor finds the weights: here, whole."""
        return Resident()


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
    before_update: Callable[[Run], None] | None = None
    """Called once gradients are whole, and before the optimizer uses them up."""

    def __post_init__(self) -> None:
        self.loss_scale = LossScale(self.config.train, self.ctx.device)
        self.gauge = gauge_of(self.config)

    @property
    def parameters(self) -> Parameters:
        """Where the executor finds the weights: in flat buffers, perhaps in shards."""
        return self.flat

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return learning_rate(self.config.optim, self.position(self.step, self.consumed_samples))

    @property
    def weight_decay(self) -> float:
        """Weight decay of the next update."""
        return weight_decay(self.config.optim, self.position(self.step, self.consumed_samples))

    @property
    def budget(self) -> Budget:
        """The samples of each update, and how many updates there are."""
        return budget_of(self.config)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run, those that are done included."""
        return self.budget.total_steps(self.step, self.consumed_samples)

    def position(self, step: int, samples: int) -> Position:
        """Where in its schedules the run is after so many updates and samples."""
        train, gauge = self.config.train, self.gauge
        if train.tokens is None:
            return Position(step, train.steps, gauge.warmup_steps)
        return Position(samples * self.config.model.seq_length, train.tokens, gauge.warmup, gauge.first, gauge.full)


def assemble(
    config: Config,
    ctx: ParallelContext,
    loader: Loader,
    vocab_size: int,
    *,
    objective: Objective | None = None,
    held_out: dict[str, Evaluated] | None = None,
) -> Run:
    """The run of `config` on a context and a loader that already stand; weights are drawn from train.seed."""
    train = config.train
    use_triton(train.kernels, ctx.device)  # an error now, and not in the first step
    if train.compile == "block":
        require_compiler(ctx.device)
    serving = kernels_of(config, ctx.tp.size, DTYPES[train.precision], ctx.device)  # first, while the device is empty
    chunks = build_gpt(
        config.model,
        vocab_size,
        ctx,
        *layer_pieces(config, vocab_size),
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=DTYPES[train.precision],
        seed=train.seed,
        recompute=train.recompute,
        loss_chunk=train.loss_chunk,
        kernels=train.kernels,
        compile=train.compile == "block",
        fused=serving.order,
    )
    check_whole(chunks, config, vocab_size, ctx)
    parallel = config.parallel
    flat = FlatParameters(
        units_of(chunks),
        ctx,
        stage=parallel.zero_stage,
        bucket_size=parallel.bucket_size,
        overlap=parallel.overlap,
        reduce_dtype=torch.bfloat16 if parallel.reduce_dtype == "bf16" else None,
    )
    optimizer = Optimizer(flat, config.optim, train.kernels)
    objective = objective or objective_of(config)
    return Run(config, ctx, chunks, objective, flat, optimizer, loader, held_out=held_out or {})


def objective_of(config: Config) -> Objective:
    """The objective of a config: next tokens of whatever samples its data section makes."""
    train, mix = config.train, config.data.glm.objective_mix
    if config.data.objective == "glm" and mix.mode == "weighted":
        shares = (mix.blank, mix.sentence, mix.document)
        return Mixture(shares=shares, label_smoothing=train.label_smoothing, z_loss=train.z_loss)
    return NextToken(label_smoothing=train.label_smoothing, z_loss=train.z_loss)


def units_of(chunks: list[GPT]) -> list[Unit]:
    """The parts of this rank's model, in the order of the forward pass."""
    return [
        Unit(tuple(p for p in part.parameters() if isinstance(p, Parameter)), number, part, isinstance(part, Embedding))
        for number, chunk in enumerate(chunks)
        for part in chunk.units()
    ]


def schedule_of(config: Config, micro_batches: int, *, backward: bool = True) -> Schedule:
    """The pipeline schedule of a config for so many micro-batches."""
    p = config.parallel
    return Schedule(p.schedule, p.pipeline_parallel_size, p.virtual_pipeline_size, micro_batches, backward)


def layer_pieces(config: Config, vocab_size: int) -> tuple[list[range], list[int]]:
    """(layers, stage) of each virtual stage: as parallel.layer_split says, or balanced by FLOPs."""
    schedule = schedule_of(config, 1)
    homes = [schedule.home(virtual)[0] for virtual in range(schedule.virtual_stages)]
    block, head = forward_flops(config.model, vocab_size)
    counts = config.parallel.layer_split or split_layers(homes, config.model.num_layers, block, 0.0, head)
    return ranges_of(counts), homes


def check_whole(chunks: list[GPT], config: Config, vocab_size: int, ctx: ParallelContext) -> None:
    """All ranks of a model together must have built every layer and every parameter once. Raises ValueError on all of them."""
    owned = [p for p in logical_parameters(chunks) if p.spec.owned(ctx)]
    elements = sum(prod(s.stop - s.start for s in p.spec.slices(ctx.tp.size, ctx.tp.rank)) for p in owned)
    layers = sum(len(chunk.stack.blocks) for chunk in chunks) * (ctx.tp.rank == 0)
    of_stage = all_reduce(torch.tensor([layers, elements], device=ctx.device), ctx.tp)
    built = to_host(all_reduce(of_stage, ctx.pp), ctx.pp).tolist()
    wanted = [config.model.num_layers, parameter_count(config.model, vocab_size)]
    if built != wanted:
        raise ValueError(
            f"the ranks of a model built {built[0]} layers with {built[1]:,} parameters; model.num_layers={wanted[0]} with "
            f"this config makes {wanted[1]:,}. A parameter is built twice or nowhere, or runtime/flops.py counts it wrongly."
        )


def train_step(run: Run) -> StepReport:
    """One optimizer update, and what it did."""
    return queue_step(run).report()


def queue_step(run: Run) -> Queued:
    """One optimizer update: tokens -> loss -> gradients -> parameters. Nothing here waits for the device."""
    began, size = Moment(run.ctx.device), run.budget.batch_size(run.consumed_samples)
    micro_batches = to_micro_batches(run.loader.batch(run.consumed_samples), run)
    waited = run.loader.waited
    totals = global_weights(run, micro_batches)
    weight = totals.sum().clamp_min(SMALLEST_WEIGHT)
    micro_batches = [replace(m, totals=totals) for m in micro_batches]
    run.flat.zero_grad()
    schedule = schedule_of(run.config, len(micro_batches))
    executed = run_schedule(stage_of(run), schedule, micro_batches, scale=run.loss_scale.scale / weight)
    run.flat.reduce()
    sums = sum_totals(run, executed, weight)
    divisor = clip_divisor(sums.grad_norm, run.config.optim.clip_grad) * run.loss_scale.scale
    if run.before_update is not None:
        run.before_update(run)
    lr, left_out = run.lr, run.step + 1 in run.config.train.skip_steps
    run.optimizer.step(lr, divisor, sums.overflow.clamp_min(float(left_out)), run.weight_decay)
    run.loss_scale.update(sums.overflow)
    run.consumed_samples += size
    run.step += 1
    numbers = start_to_host(torch.stack([*sums, run.loss_scale.scale]), run.ctx.world)
    return Queued(run.step, lr, size, left_out, run.consumed_samples, waited, began, numbers)


def to_micro_batches(batch: Batch, run: Model) -> list[MicroBatch]:
    """A loader's numpy batch [m, b, s] as m micro-batches [s, b] on the device."""
    given = (
        *(batch.tokens, batch.labels, batch.loss_weights, batch.positions, batch.places),
        *(batch.documents, batch.prefix, batch.block_positions, batch.kinds),
    )
    here = [None if array is None else _rows_first(torch.from_numpy(array)) for array in given]
    there = iter(to_device([x for x in here if x is not None], run.ctx.device))
    nothing = [None] * len(batch.tokens)
    columns = zip(*(nothing if x is None else next(there) for x in here), strict=True)
    ends = zip(*(nothing if x is None else x for x in here[5:7]), strict=True)
    mask_of, micro_batches = partial(causal_mask, run.config.model.window, run.config.model.sparse), []
    for (tokens, labels, weights, positions, places, documents, prefix, inside, kinds), of_mask in zip(
        columns, ends, strict=True
    ):
        mask = mask_of(documents, prefix, mask_of(*of_mask))
        micro_batches.append(MicroBatch(tokens, labels, weights, positions, places, run.step, mask, inside, kinds))
    return micro_batches


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    """[m, b, s] -> [m, s, b]; [m, b] stays."""
    return x.transpose(1, 2) if x.dim() == 3 else x


def global_weights(run: Run, micro_batches: list[MicroBatch]) -> torch.Tensor:
    """The objective's weights of the global batch, whose sum its loss is divided by: float64 scalar or [n]."""
    weights = torch.stack([run.objective.weight(m) for m in micro_batches])
    return all_reduce(weights.sum(0).double(), run.ctx.dp_cp)


def stage_of(run: Model) -> Stage:
    """This rank's share of the pipeline, as the executor sees it."""
    ctx, head = run.ctx, run.chunks[-1].head

    def loss(hidden: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, statistics [3]: weight predicted right, blanks filled right, blanks)."""
        if head is None:
            raise ValueError("only the last virtual stage of a pipeline ends in a loss")
        total, correct, blanks = head(hidden, run.objective, micro_batch)
        return total, torch.cat([correct[None].double(), blanks])

    return Stage(
        ctx.pp.rank,
        [_postponing(chunk) for chunk in run.chunks],
        loss,
        run.chunks[0].boundary,
        ctx.sends,
        ctx.receives,
        ctx.device,
        statistics=3,
        observe=run.observe,
        parameters=run.parameters,
    )


def _postponing(chunk: GPT) -> Chunk:
    """A chunk of the model that is told through its micro-batch where postponed weight gradients go."""

    def forward(hidden: torch.Tensor | None, micro_batch: MicroBatch, postponed: Postponed | None) -> torch.Tensor:
        return chunk(hidden, replace(micro_batch, postponed=postponed))

    return forward


class Totals(NamedTuple):
    """Sums over the world, still on the device: float64 scalars."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    grad_norm: torch.Tensor
    overflow: torch.Tensor
    """0 or 1: the loss or the gradient is not finite."""
    stop: torch.Tensor


def sum_totals(run: Run, executed: Executed, weight: torch.Tensor) -> Totals:
    """One small all-reduce carries what the ranks must agree on: squared norm, loss, statistics, the wish to stop."""
    ctx = run.ctx
    counts_loss = float(ctx.tp.rank == 0)  # tensor-parallel ranks hold the same loss, and the stages before the last hold 0
    message = torch.stack(
        [
            local_squared_norm(run.flat, ctx),
            executed.loss * counts_loss,
            executed.statistics[0] * counts_loss,
            torch.full((), float(run.stop_requested()), dtype=torch.float64, device=ctx.device),
        ]
    )
    squared_norm, loss, correct, stops = all_reduce(message, ctx.world)
    finite = torch.isfinite(squared_norm) & torch.isfinite(loss)
    return Totals(loss / weight, correct / weight, squared_norm.sqrt() / run.loss_scale.scale, (~finite).double(), stops)
