"""Collectives along an axis, and the autograd functions built on them in conjugate pairs.

Problem: in tensor and sequence parallelism a tensor changes its layout in the forward pass, and its gradient must change layout
the opposite way. Each function here names the forward; its backward is the conjugate (Shoeybi et al., arXiv:1909.08053, f and g;
Korthikanti et al., arXiv:2205.05198, g-bar):

    forward                                       backward
    copy_to          x -> x (replicated)          all-reduce: every rank used x for its own part
    reduce_from      sum of partial x             identity
    gather_rows      [n/t, ...] -> [n, ...]       reduce-scatter: every rank used all rows
    scatter_sum      partial [n, ...] -> [n/t]    all-gather

An axis of size 1 has no group: every function returns its input and moves nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from megatrain.parallel.mesh import Axis
from megatrain.transport.group import Handle, ReduceOp
from megatrain.transport.host import Reading


class Done(Handle):
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """Always."""
        return True


def all_reduce(x: torch.Tensor, axis: Axis, op: ReduceOp = "sum") -> torch.Tensor:
    """Reduce `x` over the axis in place and return it; any shape, contiguous."""
    if axis.group is not None:
        axis.group.all_reduce(x, op)
    return x


def to_host(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`x` in the host's memory, once what other ranks of the axis add to it is there: on a GPU the host waits here."""
    return start_to_host(x, axis).wait()


def start_to_host(x: torch.Tensor, axis: Axis) -> Reading:
    """Begin to bring `x`, to which other ranks of the axis may add, into the host's memory."""
    return Reading(x) if axis.group is None else axis.group.start_to_host(x)


def start_all_reduce(x: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Handle]:
    """Begin to sum `x` over the axis in place; it may be used once the handle has been waited for."""
    if axis.group is None:
        return x, Done()
    return x, axis.group.all_reduce(x, blocking=False)


def start_gather(x: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Handle]:
    """Begin to gather [n/t, ...] to [n, ...] along dim 0."""
    if axis.group is None:
        return x, Done()
    x = x.contiguous()
    output = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    return output, axis.group.all_gather(output, x, blocking=False)


def start_scatter_sum(x: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Handle]:
    """Begin to sum [n, ...] over the axis and keep this rank's [n/t, ...] of dim 0. Raises ValueError if t does not divide n."""
    if axis.group is None:
        return x, Done()
    if x.shape[0] % axis.size:
        raise ValueError(f"dim 0 of {tuple(x.shape)} cannot be split over the {axis.size} ranks of axis {axis.name}")
    output = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return output, axis.group.reduce_scatter(output, x.contiguous(), blocking=False)


def start_gather_into(output: torch.Tensor, x: torch.Tensor, axis: Axis) -> Handle:
    """Begin to gather [n/t, ...] into `output` [n, ...] along dim 0, of which `x` may be this rank's part."""
    if axis.group is None:
        return _copied(output, x)
    return axis.group.all_gather(output, x, blocking=False)


def start_scatter_sum_into(output: torch.Tensor, x: torch.Tensor, axis: Axis) -> Handle:
    """Begin to sum [n, ...] over the axis into `output` [n/t, ...], which may be this rank's part of `x`, or wider than `x`."""
    if axis.group is None:
        return _copied(output, x)
    return axis.group.reduce_scatter(output, x, blocking=False)


def _copied(output: torch.Tensor, x: torch.Tensor) -> Handle:
    """Let `output` be `x`, whose memory it may be."""
    places = [(of.untyped_storage()._cdata, of.storage_offset()) for of in (output, x)]
    if places[0] != places[1]:
        output.copy_(x)
    return Done()


def gathered(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All rows of `x` [n/t, ...] -> [n, ...], without a gradient."""
    output, handle = start_gather(x, axis)
    handle.wait()
    return output


def scatter_summed(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's rows of the sum of `x` [n, ...] -> [n/t, ...], without a gradient."""
    output, handle = start_scatter_sum(x, axis)
    handle.wait()
    return output


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return all_reduce(dy.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return gathered(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return scatter_summed(dy, ctx.axis), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return scatter_summed(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return gathered(dy, ctx.axis), None


def _apply(function: type[torch.autograd.Function], x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x if axis.group is None else function.apply(x, axis)


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Use a replicated `x` on every rank for a part of the work; the backward sums the gradients over the axis."""
    return _apply(_CopyTo, x, axis)


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum partial results `x` over the axis; the backward is the identity."""
    return _apply(_ReduceFrom, x, axis)


def gather_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[n/t, ...] -> [n, ...] along dim 0; the backward is a reduce-scatter."""
    return _apply(_GatherRows, x, axis)


def scatter_sum(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Partial [n, ...] -> summed [n/t, ...] along dim 0; the backward is an all-gather."""
    return _apply(_ScatterSum, x, axis)
