"""The executor: runs a schedule's instructions over this rank's chunks of the model.

One stage so far. A forward keeps its output until the backward of the same micro-batch; the last chunk ends in the objective.
Gradients accumulate in each parameter's `main_grad`, so a step with many micro-batches is a longer list, not another path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatrain.parallel.schedules import Instruction

Chunk = Callable[[torch.Tensor | None, Any], torch.Tensor]
"""(hidden states of the chunk before or None, micro-batch) -> hidden states."""

FinalLoss = Callable[[torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
"""(the last chunk's hidden states, micro-batch) -> (summed loss with its gradient, statistics [k] to add up)."""


@dataclass
class Executed:
    """What a run of a schedule leaves behind besides gradients: both detached, at least float32, on the model's device."""

    loss: torch.Tensor
    """Sum of the losses of this rank's micro-batches (undivided)."""
    statistics: torch.Tensor
    """Sum of the objective's statistics, [k]."""


def run_schedule(
    program: Sequence[Instruction], chunk: Chunk, loss: FinalLoss, micro_batches: Sequence[Any], scale: torch.Tensor | float
) -> Executed:
    """Execute `program`; backward instructions differentiate each micro-batch's loss times `scale` (1 / global weight)."""
    saved: dict[int, torch.Tensor] = {}
    executed: Executed | None = None
    backward_follows = {i.micro_batch for i in program if i.kind == "backward"}
    for instruction in program:
        m = instruction.micro_batch
        if instruction.kind == "backward":
            total = saved.pop(m)
            torch.autograd.backward(total * scale)
            continue
        with torch.set_grad_enabled(m in backward_follows):
            total, statistics = loss(chunk(None, micro_batches[m]), micro_batches[m])
        if m in backward_follows:
            saved[m] = total
        executed = _add(executed, total.detach().double(), statistics.detach().double())
    if executed is None:
        raise ValueError("a schedule without a forward instruction computes nothing")
    return executed


def _add(executed: Executed | None, loss: torch.Tensor, statistics: torch.Tensor) -> Executed:
    if executed is None:
        return Executed(loss, statistics)
    return Executed(executed.loss + loss, executed.statistics + statistics)
