"""Global gradient norm: every logical element counted once, whatever the layout."""

from __future__ import annotations

import torch

from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.flat import Segment
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.zero import FlatParameters


def _counts(segment: Segment, flat: FlatParameters, ctx: ParallelContext) -> bool:
    """Whether this rank is the one, of those that own these elements, that counts them."""
    return (flat.stage > 0 or ctx.dp_cp.rank == 0) and segment.parameter.spec.owned(ctx)


def local_squared_norm(flat: FlatParameters, ctx: ParallelContext) -> torch.Tensor:
    """This rank's share of the squared gradient norm: float64 scalar, to be summed over the world.

    A rank looks at the gradients that it owns. Of ranks that own the same elements (replicas at ZeRO stage 0, copies over tp) the
    first one counts them; padding is zero. The others multiply by zero, which leaves NaN for a copy that is not finite: no rank
    may update what another one skips.
    """
    segments = list(flat.segments())
    counts = torch.tensor([float(_counts(s, flat, ctx)) for s in segments], dtype=torch.float64)
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


PARTS = ("embedding", "attention", "mlp", "norm", "head")
"""Of a model, for reports; biases belong to their matrices' part."""


def part_of(name: str) -> str:
    """The part that a parameter's logical name belongs to."""
    if name.startswith(("embedding.tokens", "embedding.positions")):
        return "embedding"
    return next(
        (part for part, mark in (("norm", "norm"), ("attention", ".attention."), ("mlp", ".mlp.")) if mark in name), "head"
    )


def part_norms(flat: FlatParameters, ctx: ParallelContext, loss_scale: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Part -> (norm of its gradients, norm of its weights), over the whole model (collective over the world; before the update)."""
    squares = torch.zeros(len(PARTS), 2, dtype=torch.float64, device=ctx.device)
    for segment in flat.segments():
        if _counts(segment, flat, ctx):
            row = squares[PARTS.index(part_of(segment.parameter.spec.name))]
            row += torch.stack([x.double().square().sum() for x in (segment.gradient, segment.weight)])
    gradients, weights = all_reduce(squares, ctx.world).sqrt().unbind(1)
    rows = torch.stack([gradients / loss_scale, weights], 1).tolist()
    return {part: (gradient, weight) for part, (gradient, weight) in zip(PARTS, rows, strict=True) if weight > 0}
