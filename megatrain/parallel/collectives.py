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


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return ctx.axis.all_reduce(dy.clone(memory_format=torch.contiguous_format)), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return axis.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return axis.gathered(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return ctx.axis.scatter_summed(dy), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return axis.scatter_summed(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return ctx.axis.gathered(dy), None


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
