"""Global gradient norm: every logical element counted once, whatever the layout."""

from __future__ import annotations

import torch

from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.zero import FlatParameters


def local_squared_norm(flat: FlatParameters, ctx: ParallelContext) -> torch.Tensor:
    """This rank's share of the squared gradient norm: float64 scalar, to be summed over the world.

    A rank looks at the gradients that it owns. Of ranks that own the same elements (replicas at ZeRO stage 0, copies over tp) the
    first one counts them; padding is zero. The others multiply by zero, which leaves NaN for a copy that is not finite: no rank
    may update what another one skips.
    """
    segments = list(flat.segments())
    alone = flat.stage > 0 or ctx.dp_cp.rank == 0
    counts = torch.tensor([float(alone and s.parameter.spec.owned(ctx)) for s in segments], dtype=torch.float64)
    if not segments:
        return torch.zeros((), dtype=torch.float64, device=ctx.device)
    squares = torch.stack(torch._foreach_norm([s.gradient for s in segments])).double().square()
    return (squares * counts.to(ctx.device, non_blocking=True)).sum()


def clip_divisor(norm: torch.Tensor, clip_grad: float) -> torch.Tensor:
    """What to divide gradients by so that their norm is at most `clip_grad` (0: never clip): at least 1; float64 scalar tensor.

    As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps curves comparable.
    """
    if clip_grad == 0:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / clip_grad).clamp_min(1.0)
