"""Losses that a layer before the head makes itself, such as a router's load balance (arXiv:2101.03961, section 2.2).

The head's loss is the only one that a pipeline differentiates, and it lies on the last stage. A layer of any stage therefore attaches its
loss to what it puts out: the forward hands x on, and the backward of x starts that of the loss, with the factor that every loss of the
step has (`MicroBatch.scale`). So like the head's it is to be a sum over the tokens of the micro-batch that this rank has, not a mean: the
step divides by the objective's weight, whatever the micro-batches and replicas.

    x, loss  -->  attach_loss  -->  x                 forward
    dy, scale  <--  attach_loss  <--  dy              backward; here the loss is added to the statistic of its name

The statistic is added to in the backward, since that runs once for each micro-batch while a forward runs twice under recomputation. In
evaluation nothing is added: there the loss is the objective's alone.
"""

from __future__ import annotations

from typing import Any

import torch

from megatrain.models.batch import MicroBatch
from megatrain.parallel.mesh import Rows


def attach_loss(x: torch.Tensor, loss: torch.Tensor, name: str, batch: MicroBatch, rows: Rows) -> torch.Tensor:
    """x itself, in whose backward `loss` is differentiated too.

    loss: scalar, a sum over the rows of this rank; where tp splits no rows, the same on all of its ranks. name: of a statistic that the
    objective declares, where the sum is reported. Collective over tp where its ranks have different rows. Raises ValueError for a loss
    that is no scalar, or a name that the objective does not declare.
    """
    if not torch.is_grad_enabled() and not batch.sums:
        return x
    if loss.dim():
        raise ValueError(f"the loss {name!r} has shape {list(loss.shape)}; attach a scalar (.sum())")
    if name not in batch.sums or name == "loss":
        declared = ", ".join(sorted(batch.sums.keys() - {"loss"})) or "none"
        raise ValueError(f"{name!r} is no statistic of the objective, which declares {declared}: add it to its `statistics`")
    attached: torch.Tensor = _Attached.apply(x, loss, name, batch, rows)
    return attached


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, name: str, batch: MicroBatch, rows: Rows) -> torch.Tensor:
        ctx.of, ctx.name, ctx.rows = batch, name, rows
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (loss,) = ctx.saved_tensors
        total = loss.double()  # a copy
        ctx.of.sums[ctx.name].add_(ctx.rows.tp.all_reduce(total) if ctx.rows.split else total)
        return dy, torch.ones_like(loss) * ctx.of.scale, None, None, None
