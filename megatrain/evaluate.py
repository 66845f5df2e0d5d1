"""Loss on held-out text: forward passes only, through the executor that also trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from megatrain.data.held_out import Evaluated, evaluation_batches
from megatrain.training import SMALLEST_WEIGHT, Model, forward, to_micro_batches
from megatrain.transport.host import Reading


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out text; the same on every rank."""

    total_loss: float
    """Sum over the tokens, in nats."""
    weight: float
    """Number of tokens, or what else the objective weighs."""
    statistics: dict[str, float]
    """Sum of each of the objective's statistics."""
    sets: dict[str, Evaluation] = field(default_factory=dict)
    """Results of each validation set, by name."""

    @property
    def loss(self) -> float:
        """Mean over the tokens, in nats."""
        return self.total_loss / max(self.weight, SMALLEST_WEIGHT)

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return round(self.weight)

    @property
    def accuracy(self) -> float:
        """Share of the tokens whose most probable prediction is right; nan for an objective that does not say."""
        return self.statistics.get("correct", math.nan) / max(self.weight, SMALLEST_WEIGHT)

    @property
    def cloze_accuracy(self) -> float | None:
        """Share of the blanks of which every token is predicted right; None without blanks."""
        blanks = self.statistics.get("blanks", 0.0)
        return self.statistics["blanks_filled"] / blanks if blanks else None


class Interrupted(Exception):
    """A rank was told to stop during an evaluation; raised on all ranks."""


def evaluate(run: Model, global_batches: int = 0, stopping: Callable[[], bool] | None = None) -> Evaluation:
    """Mean loss over the run's held-out text, or over the first `global_batches` global batches of each set; no dropout, no gradients.

    stopping: called on every rank before each global batch, which costs an all-reduce of 4 bytes; its result is read one batch later.

    Raises ValueError if the run has no held-out text, Interrupted on all ranks if `stopping()` is true on one.
    """
    if not run.held_out:
        raise ValueError("there is nothing to evaluate on: data.valid is empty. Give it the prefix of a held-out token store.")
    for chunk in run.chunks:
        chunk.eval()
    try:
        sums = torch.stack([_sums(run, held_out, global_batches, stopping) for held_out in run.held_out.values()])
    finally:
        for chunk in run.chunks:
            chunk.train()
    # Tensor-parallel ranks hold the same sums; losses come from the last stage, weights from the first.
    rows = run.ctx.world.to_host(run.ctx.world.all_reduce(sums * float(run.ctx.tp.rank == 0))).tolist()
    names, together = run.objective.statistics, map(sum, zip(*rows, strict=True))
    whole, *each = [Evaluation(loss, weight, dict(zip(names, k, strict=True))) for loss, *k, weight in (together, *rows)]
    return replace(whole, sets=dict(zip(run.held_out, each, strict=True)))


def _sums(run: Model, held_out: Evaluated, global_batches: int, stopping: Callable[[], bool] | None) -> torch.Tensor:
    """This rank's sums over a validation set: (loss, the objective's k statistics, weight), float64 [k + 2]."""
    ctx, train = run.ctx, run.config.train
    batches = evaluation_batches(
        held_out, train.global_batch_size, train.micro_batch_size, ctx.dp.rank, ctx.dp.size, global_batches
    )
    sums = torch.zeros(len(run.objective.statistics) + 2, dtype=torch.float64, device=ctx.device)
    wishes: Reading | None = None
    for batch in batches:
        _heed(wishes)
        if stopping is not None:
            mine = torch.full((), float(stopping()), device=ctx.device)
            wishes = ctx.world.start_to_host(ctx.world.all_reduce(mine))
        micro_batches = run.prepare(to_micro_batches(batch, run))
        weight = torch.stack([run.objective.weight(m) for m in micro_batches]).sum().double()
        sums += torch.cat([forward(run, micro_batches).sums, weight[None] * float(ctx.pp.rank == 0)])
    _heed(wishes)
    return sums


def _heed(wishes: Reading | None) -> None:
    """Raise Interrupted if any rank wished to stop; `wishes`: the number of such ranks, None before the first batch."""
    if wishes is not None and bool(wishes.wait()):
        raise Interrupted
