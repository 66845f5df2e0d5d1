"""Global gradient norm: every logical element counted once, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Parameter


def local_squared_norm(parameters: Sequence[Parameter], ctx: ParallelContext) -> torch.Tensor:
    """This rank's share of the squared gradient norm: float64 scalar, to be summed over the world.

    Of the ranks that hold the same elements (replicas over dp x cp, copies over tp) the first one counts them; padding is zero.
    The others multiply by zero, which leaves NaN for a copy that is not finite: no rank may update what another one skips.
    """
    present = [p for p in parameters if p.main_grad is not None]
    if not present:
        return torch.zeros((), dtype=torch.float64, device=ctx.device)
    counts = torch.tensor([float(p.spec.owned(ctx) and ctx.dp_cp.rank == 0) for p in present], dtype=torch.float64)
    squares = torch.stack(torch._foreach_norm([p.accumulated for p in present])).double().square()
    return (squares * counts.to(ctx.device, non_blocking=True)).sum()


def clip_divisor(norm: torch.Tensor, clip_grad: float) -> torch.Tensor:
    """What to divide gradients by so that their norm is at most `clip_grad` (0: never clip): at least 1; float64 scalar tensor.

    As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps curves comparable.
    """
    if clip_grad == 0:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / clip_grad).clamp_min(1.0)
