"""Replicas of the model over the data axis: flat buffers of parameters and gradients (ZeRO stage 0, arXiv:1910.02054).

Problem: d ranks hold the same weights and each sees its own samples; the gradients must be summed. Four ranks, stage 0:

    rank 0..3   parameters [Psi]   gradients [Psi] --all-reduce--> sum on every rank   optimizer states on every rank

All parameters lie in one contiguous buffer per rank, all gradients in another (float32, float64 in float64 runs): one
all-reduce moves everything, q|k|v stay behind one another, and `main_grad` of a parameter is a view.

Communication per step and rank: one all-reduce of Psi float32 numbers, 2 (d-1)/d * 4 Psi bytes; and one of those few gradients
that are partial sums over the tensor-parallel ranks (norms under sequence parallelism, replicated key/value heads), or that the ends
of a pipeline share (tied embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Parameter

ALIGNMENT = 64
"""Elements between the starts of separate matrices, so that each begins on a cache line and a 128-byte GPU segment."""


class FlatParameters:
    """Moves parameters into one buffer and gives each a `main_grad` in another; sums gradients over the replicas."""

    def __init__(self, parameters: Sequence[Parameter], ctx: ParallelContext) -> None:
        """Raises ValueError when there is none, or when they differ in dtype."""
        self.parameters = [p for p in parameters if p.requires_grad]
        self.ctx = ctx
        if not self.parameters:
            raise ValueError("there is no trainable parameter")
        dtypes = {p.dtype for p in self.parameters}
        if len(dtypes) != 1:
            raise ValueError(
                f"trainable parameters must share one dtype to lie in one buffer: found {sorted(map(str, dtypes))}"
            )
        dtype = dtypes.pop()
        offsets = _offsets(self.parameters)
        self._starts = {id(p): start for p, start in zip(self.parameters, offsets, strict=True)}
        size = offsets[-1] + self.parameters[-1].numel()
        self.weights = torch.zeros(size, dtype=dtype, device=ctx.device)
        self.grads = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=ctx.device)
        for parameter in self.parameters:
            view = self.view(self.weights, parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.main_grad = self.view(self.grads, parameter)
        self._hooks = [p.register_post_accumulate_grad_hook(_move_gradient) for p in self.parameters]

    def view(self, buffer: torch.Tensor, parameter: Parameter) -> torch.Tensor:
        """The part of a flat buffer (weights, gradients, optimizer state) that belongs to `parameter`, in its shape."""
        start = self._starts[id(parameter)]
        return buffer[start : start + parameter.numel()].view(parameter.shape)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.grads.zero_()

    def reduce(self) -> None:
        """Sum gradients over the replicas, partial sums over the ranks that hold the same slice, and tied copies over theirs."""
        all_reduce(self.grads, self.ctx.dp_cp)
        partial = [p for p in self.parameters if p.spec.partial_over is not None]
        if partial:
            _sum_partial(partial, self.ctx.tp)
        self._sum_tied()

    def _sum_tied(self) -> None:
        for parameter in self.parameters:
            if parameter.spec.tied is not None:
                all_reduce(parameter.accumulated, getattr(self.ctx, parameter.spec.tied))


def _offsets(parameters: Sequence[Parameter]) -> list[int]:
    offsets, end = [], 0
    for parameter in parameters:
        start = end if parameter.follows else -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + parameter.numel()
    return offsets


def _move_gradient(parameter: Any) -> None:
    """Add what autograd computed (norms, a user's own layer) to the flat buffer; linear layers have added theirs already."""
    if parameter.grad is None:
        return
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def _sum_partial(parameters: Sequence[Parameter], tp: Axis) -> None:
    """Sum each gradient over the ranks that hold the same slice, all in one all-reduce over tp.

    A parameter cut into n distinct slices takes n places in the message, and each rank fills in its own: the ranks of a slice
    are summed without a group of their own.
    """
    slots = [tp.size // p.spec.copies(tp.size) for p in parameters]
    places = [tp.rank // p.spec.copies(tp.size) for p in parameters]
    message = torch.cat([p.accumulated.new_zeros(n * p.numel()) for p, n in zip(parameters, slots, strict=True)])
    mine, start = [], 0
    for parameter, count, place in zip(parameters, slots, places, strict=True):
        mine.append(message[start + place * parameter.numel() :][: parameter.numel()])
        start += count * parameter.numel()
    for parameter, part in zip(parameters, mine, strict=True):
        part.copy_(parameter.accumulated.flatten())
    all_reduce(message, tp)
    for parameter, part in zip(parameters, mine, strict=True):
        parameter.accumulated.copy_(part.view(parameter.shape))
