"""Parameters that lie behind one another, so that one matmul serves several, and gradients that are added where they belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatrain.kernels.matmul import add_matmul, matmul
from megatrain.parallel.mesh import Axis
from megatrain.parallel.param import Parameter, ParamSpec, claim

Postponed = list[Callable[[], None]]
"""Weight gradients of one micro-batch that wait for their turn (a split backward)."""


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenation along dim 0, for reading; a view, without copying, where the tensors lie behind one another in one storage."""
    view = _view_over(tensors)
    return torch.cat([t.detach() for t in tensors]) if view is None else view


def _view_over(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view of tensors that lie behind one another in one storage; None where they do not."""
    first = tensors[0].detach()
    end = first.storage_offset()
    for tensor in tensors:
        same_storage = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and tensor.is_contiguous() and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


def make_parameters(specs: Sequence[ParamSpec], tp: Axis, dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    """This rank's zero-filled parameters of equal width, behind one another in one storage."""
    shapes = [spec.local_shape(tp.size) for spec in specs]
    storage = torch.zeros((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=dtype, device=device)
    parameters: list[Parameter] = []
    for spec, rows in zip(specs, storage.split([shape[0] for shape in shapes]), strict=True):
        parameters.append(Parameter(rows, spec, follows=bool(parameters)))
    return parameters


def add_weight_gradient(parameters: Sequence[nn.Parameter], dy: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Accumulate dy^T x ([tokens, out], [tokens, in]) into the parameters' joined main_grad, or return it piecewise to autograd."""
    return _accumulate(parameters, lambda out, first: add_matmul(out, dy.t(), x, first), lambda: matmul(dy.t(), x))


def add_bias_gradient(parameters: Sequence[nn.Parameter], dy: torch.Tensor) -> list[torch.Tensor | None]:
    """Accumulate the sum of dy [tokens, out] over tokens into the parameters' joined main_grad, or return it piecewise.

    Like a product, it is added up in float32 and comes in the dtype of dy: asked for another, torch on CPU copies all of dy first.
    """
    return _accumulate(parameters, lambda out, first: out.copy_(dy.sum(0)) if first else out.add_(dy.sum(0)), lambda: dy.sum(0))


def bias_place(biases: Sequence[nn.Parameter]) -> torch.Tensor:
    """Stands for the joined biases [out] that a matmul has added to its output already, without their values.

    Who makes the gradient of that output sums it over the tokens in the same pass, and gives the sum as this tensor's gradient, in at
    least float32; it goes where `add_bias_gradient` would have brought it.
    """
    place: torch.Tensor = _Place.apply(*biases)
    return place


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *biases: nn.Parameter) -> torch.Tensor:
        ctx.biases = biases
        wide = torch.promote_types(biases[0].dtype, torch.float32)
        return biases[0].new_empty((), dtype=wide).expand(sum(len(b) for b in biases))

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor) -> Any:
        def add(out: torch.Tensor, first: bool) -> object:
            return out.copy_(total) if first else out.add_(total)

        return tuple(_accumulate(ctx.biases, add, lambda: total.to(ctx.biases[0].dtype)))


def _accumulate(
    parameters: Sequence[nn.Parameter], add: Callable[[torch.Tensor, bool], object], compute: Callable[[], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Add a gradient to the parameters' main_grad where they have one; else return it, cut into their rows.

    `add` does so in one go, for buffers that lie behind one another, and where it is told that it is the first writes them;
    `compute` returns the gradient of all rows.
    """
    if not any(p.requires_grad for p in parameters):
        return [None] * len(parameters)
    claims = [claim(p) for p in parameters]
    there = [buffer for buffer, _ in claims if buffer is not None]
    firsts = {first for _, first in claims}
    view = _view_over(there) if len(there) == len(parameters) and len(firsts) == 1 else None
    if view is not None:
        add(view, firsts.pop())
        return [None] * len(parameters)
    left: list[torch.Tensor | None] = []
    pieces = compute().split([p.shape[0] for p in parameters])
    for parameter, (buffer, first), piece in zip(parameters, claims, pieces, strict=True):
        if buffer is not None:
            _ = buffer.copy_(piece) if first else buffer.add_(piece)
        left.append(piece if buffer is None and parameter.requires_grad else None)
    return left
