"""Tensors that lie beside one another: the parts of one matmul's output (q|k|v, gate|up), and their gradients.

A kernel that makes the gradients of several parts writes them into one buffer [..., sum of widths], each its own columns. What reads
them together, the matmuls of the backward, then takes the buffer as it lies; parts that come from elsewhere are copied into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def beside(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts [..., n_i] as one tensor [..., sum of n_i], without a gradient: a view where they lie so in one storage, else a copy."""
    view = _view_over(parts)
    return torch.cat([part.detach() for part in parts], -1) if view is None else view


def together(*parts: torch.Tensor) -> torch.Tensor:
    """`beside` with a gradient: each part [..., n_i] gets its columns of the whole's."""
    return parts[0] if len(parts) == 1 else _Together.apply(*parts)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.widths = [part.shape[-1] for part in parts]
        return beside(parts)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return tuple(dy.split(ctx.widths, -1))


def _view_over(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """View [..., sum of n_i] over parts [..., n_i] that are adjacent in one storage, row by row; None if they are not."""
    first = parts[0].detach()
    at, storage = first.storage_offset(), first.untyped_storage()
    for part in parts:
        same_rows = part.shape[:-1] == first.shape[:-1] and part.stride()[:-1] == first.stride()[:-1]
        same_storage = part.dtype == first.dtype and part.untyped_storage()._cdata == storage._cdata
        if not (same_rows and same_storage and part.storage_offset() == at and part.stride(-1) == 1):
            return None
        at += part.shape[-1]
    whole = (*first.shape[:-1], at - first.storage_offset())
    return first.as_strided(whole, first.stride())
