"""RMSNorm that keeps its input and one number a row (Zhang & Sennrich, arXiv:1910.07467).

torch composes its own on CPU from five operations, which keep the normalised rows too, in float32 even for bfloat16 inputs. With
r = 1 / sqrt(mean(x^2) + eps) over a row of n:

    y = x r w       dx = r (g - x r^2 mean(g x)), g = dy w       dw = sum over rows of dy x r
"""

from __future__ import annotations

from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] scaled to a mean square of 1 and by `weight` [n]; statistics in at least float32."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        normed = x.to(r.dtype) * r
        dy = dy.to(r.dtype)
        dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = dy * weight
        mean = (g * normed).mean(-1, keepdim=True)
        return g.sub_(normed.mul_(mean)).mul_(r).to(x.dtype), dweight, None
