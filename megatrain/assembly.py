"""From a config to a run: the model, its flat buffers, the optimizer and the objective, on a context and a loader that stand."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from megatrain.config.schema import Config, ParallelConfig
from megatrain.config.source import ConfigError
from megatrain.data.held_out import Evaluated
from megatrain.data.loader import Loader
from megatrain.kernels.compiled import require_compiler
from megatrain.kernels.dispatch import require
from megatrain.kernels.sdpa import Choice, Shape, choose
from megatrain.models.batch import NextToken, Objective
from megatrain.models.blanks import Blanks, Mixture
from megatrain.models.gpt import GPT, Embedding, MakeBlock, build_gpt, gpt_block, logical_parameters
from megatrain.models.layers import Build
from megatrain.optim.optimizer import Optimizer
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.param import Parameter
from megatrain.parallel.schedules import chunks_problem
from megatrain.parallel.zero import FlatParameters
from megatrain.runtime.flops import forward_flops, parameter_count
from megatrain.training import Run, schedule_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""train.precision -> dtype of the parameters and activations."""


def assemble(
    config: Config,
    ctx: ParallelContext,
    loader: Loader,
    vocab_size: int,
    *,
    objective: Objective | None = None,
    block: MakeBlock = gpt_block,
    held_out: dict[str, Evaluated] | None = None,
) -> Run:
    """The run of `config` on a context and a loader that already stand; weights are drawn from train.seed.

    block: makes the block of each layer; those of another than the config's may have any parameters.
    """
    train = config.train
    require(train.kernels, ctx.device, DTYPES[train.precision])  # an error now, and not in the first step
    if train.compile == "block":
        require_compiler(ctx.device)
    serving = kernels_of(config, ctx.tp.size, DTYPES[train.precision], ctx.device)  # first, while the device is empty
    build = build_of(config, vocab_size, ctx, serving)
    chunks = build_gpt(build, *layer_pieces(config, vocab_size), ctx.pp.rank, block)
    check_whole(chunks, config, vocab_size, ctx, counted=block is gpt_block)
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


def build_of(config: Config, vocab_size: int, ctx: ParallelContext, serving: Choice | None = None) -> Build:
    """The value that the layers of a run's model are built with on this rank; serving: torch's kernels for causal attention."""
    train = config.train
    return Build(
        Rows(ctx.tp, config.parallel.sequence_parallel),
        DTYPES[train.precision],
        ctx.device,
        config.model,
        vocab_size,
        train.seed,
        recompute=train.recompute,
        loss_chunk=train.loss_chunk,
        kernels=train.kernels,
        compile=train.compile == "block",
        fused=(serving or Choice()).order,
    )


def kernels_of(config: Config, tp_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Which of torch's kernels serve a run's causal attention: tried on a GPU, once, where some layer has no other."""
    model, data = config.model, config.data
    masked = None not in model.windows or model.sparse or data.isolate_documents or data.objective == "glm"
    if masked or model.position == "alibi" or model.attention_dropout > 0 or not model.softmax_fp32:
        return Choice()
    heads, groups = model.num_attention_heads // tp_size, max(1, model.query_groups // tp_size)
    shape = Shape(model.seq_length, config.train.micro_batch_size, heads, groups, model.head_size)
    return choose(shape, dtype, device, config.train.deterministic)


def objective_of(config: Config) -> Objective:
    """The objective of a config: next tokens of whatever samples its data section makes."""
    mix, smoothing, z_loss = config.data.glm.objective_mix, config.train.label_smoothing, config.train.z_loss
    if config.data.objective == "next_token":
        return NextToken(label_smoothing=smoothing, z_loss=z_loss)
    if mix.mode == "sample":
        return Blanks(label_smoothing=smoothing, z_loss=z_loss)
    return Mixture(shares=(mix.blank, mix.sentence, mix.document), label_smoothing=smoothing, z_loss=z_loss)


def units_of(chunks: list[GPT]) -> list[Unit]:
    """The parts of this rank's model, in the order of the forward pass."""
    return [
        Unit(tuple(p for p in part.parameters() if isinstance(p, Parameter)), number, part, isinstance(part, Embedding))
        for number, chunk in enumerate(chunks)
        for part in chunk.units()
    ]


def layer_pieces(config: Config, vocab_size: int) -> tuple[list[range], list[int]]:
    """(layers, stage) of each virtual stage: as parallel.layer_split says, or balanced by FLOPs."""
    schedule = schedule_of(config, 1)
    homes = [schedule.home(virtual)[0] for virtual in range(schedule.virtual_stages)]
    block, head = forward_flops(config.model, vocab_size)
    counts = config.parallel.layer_split or split_layers(homes, config.model.num_layers, block, 0.0, head)
    return ranges_of(counts), homes


def check_whole(chunks: list[GPT], config: Config, vocab_size: int, ctx: ParallelContext, *, counted: bool = True) -> None:
    """All ranks of a model together must have built every layer and, where `counted`, every parameter once.

    Raises ValueError on all of them.
    """
    owned = [p for p in logical_parameters(chunks) if p.spec.owned(ctx)]
    elements = sum(prod(s.stop - s.start for s in p.spec.slices(ctx.tp.size, ctx.tp.rank)) for p in owned)
    layers = sum(len(chunk.stack.blocks) for chunk in chunks) * (ctx.tp.rank == 0)
    of_stage = ctx.tp.all_reduce(torch.tensor([layers, elements], device=ctx.device))
    built = ctx.pp.to_host(ctx.pp.all_reduce(of_stage)).tolist()
    wanted = [config.model.num_layers, parameter_count(config.model, vocab_size)]
    if built[: 1 + counted] != wanted[: 1 + counted]:
        raise ValueError(
            f"the ranks of a model built {built[0]} layers with {built[1]:,} parameters; model.num_layers={wanted[0]} with "
            f"this config makes {wanted[1]:,}. A parameter is built twice or nowhere, or runtime/flops.py counts it wrongly."
        )


def work_of_stages(config: Config, vocab_size: int) -> list[float]:
    """FLOPs of a token's forward pass on each pipeline stage."""
    block, head = forward_flops(config.model, vocab_size)
    pieces, homes = layer_pieces(config, vocab_size)
    work = [0.0] * config.parallel.pipeline_parallel_size
    for layers, home in zip(pieces, homes, strict=True):
        work[home] += len(layers) * block
    work[homes[-1]] += head
    return work


def split_layers(homes: Sequence[int], num_layers: int, layer_cost: float, first_cost: float, last_cost: float) -> list[int]:
    """Layers of each virtual stage, in order, each at least one, so that the slowest rank has as little to do as possible.

    homes: the rank of each virtual stage. Costs, in any unit: of one layer, of what the first virtual stage has besides (embedding),
    and the last (head and loss). Raises ValueError where there are fewer layers than virtual stages.
    """
    virtual_stages = len(homes)
    if num_layers < virtual_stages:
        raise ValueError(f"{num_layers} layers cannot be split over {virtual_stages} virtual stages, at least one on each")
    counts = [1] * virtual_stages
    extra = [0.0] * virtual_stages
    extra[0] += first_cost
    extra[-1] += last_cost

    def cost_with_one_more(virtual: int) -> tuple[float, float]:
        """Work of the rank, then of the virtual stage, if this one had another layer."""
        rank = sum(extra[v] + counts[v] * layer_cost for v, home in enumerate(homes) if home == homes[virtual])
        return rank + layer_cost, extra[virtual] + (counts[virtual] + 1) * layer_cost

    for _ in range(num_layers - virtual_stages):
        counts[min(range(virtual_stages), key=cost_with_one_more)] += 1
    return counts


def ranges_of(counts: Sequence[int]) -> list[range]:
    """Layer indices of each virtual stage."""
    starts = [sum(counts[:v]) for v in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def mesh_shape(parallel: ParallelConfig, world_size: int) -> MeshShape:
    """The mesh of a config: data-parallel ranks are what remains of the world."""
    tp, cp, pp = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size
    return MeshShape(tp, cp, world_size // (tp * cp * pp), pp, parallel.expert_parallel_size, parallel.zero_ranks)


def require_schedule(config: Config) -> None:
    """Raise ConfigError where parallel.schedule cannot have parallel.virtual_pipeline_size chunks."""
    problem = chunks_problem(config.parallel.schedule, config.parallel.virtual_pipeline_size)
    if problem is not None:
        raise ConfigError(problem)
