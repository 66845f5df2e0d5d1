"""Loss on held-out text: the forward half of a step, through the same executor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatrain.data.loader import evaluation_batches
from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.pipeline_parallel import run_schedule
from megatrain.training import SMALLEST_WEIGHT, Run, schedule_of, stage_of, to_micro_batches


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text; the same on every rank."""

    loss: float
    """Mean over the tokens, in nats."""
    accuracy: float
    """Share of the tokens predicted right."""
    tokens: int


def evaluate(run: Run, global_batches: int = 0) -> Evaluation:
    """Mean loss over the run's held-out text, or its first `global_batches` global batches; no dropout, no gradients.

    Raises ValueError where the run has no held-out text.
    """
    if run.held_out is None:
        raise ValueError("there is nothing to evaluate on: data.valid is empty. Give it the prefix of a held-out token store.")
    ctx, train = run.ctx, run.config.train
    batches = evaluation_batches(
        run.held_out, train.global_batch_size, train.micro_batch_size, ctx.dp.rank, ctx.dp.size, global_batches
    )
    stage = stage_of(run)
    sums = torch.zeros(3, dtype=torch.float64, device=ctx.device)  # loss, tokens right, tokens
    for chunk in run.chunks:
        chunk.eval()
    try:
        for batch in batches:
            micro_batches = to_micro_batches(batch, run)
            executed = run_schedule(
                stage, schedule_of(run.config, len(micro_batches), backward=False), micro_batches, scale=1.0
            )
            weight = torch.stack([run.objective.weight(m) for m in micro_batches]).sum().double()
            sums += torch.stack([executed.loss, executed.statistics[0], weight * float(ctx.pp.rank == 0)])
    finally:
        for chunk in run.chunks:
            chunk.train()
    # Tensor-parallel ranks hold the same sums; losses come from the last stage, tokens from the first.
    loss, right, tokens = all_reduce(sums * float(ctx.tp.rank == 0), ctx.world).tolist()
    weight = max(tokens, SMALLEST_WEIGHT)
    return Evaluation(loss / weight, right / weight, round(tokens))
