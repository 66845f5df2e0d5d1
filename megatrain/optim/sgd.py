"""Stochastic gradient descent with momentum, as one function on lists of flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sgd_step(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_divisor: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """m <- momentum m + (g / grad_divisor + weight_decay w); w <- w - lr m. In place; nothing changes where `skip` is 1.

    `grad_divisor` and `skip` are scalar tensors on the device; a skipped step multiplies by one and adds zero.
    """
    keep = skip > 0
    for w, g, m in zip(weights, grads, momentum_buffers, strict=True):
        update = torch.where(keep, m, (g / grad_divisor).add_(w, alpha=weight_decay).add_(m, alpha=momentum))
        m.copy_(update)
        w.sub_(torch.where(keep, torch.zeros_like(m), m), alpha=lr)
