"""LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467), alone or with the residual addition before them.

With m = mean(x) (0 for RMSNorm) and r = 1 / sqrt(mean((x - m)^2) + eps) over a row of n, n' = (x - m) r:

    y = n' w + b      dx = r (g - mean(g) - n' mean(g n')), g = dy w   (RMSNorm: without mean(g))      dw = sum of dy n', db = sum of dy

Both keep their input and one or two numbers a row. torch's composite RMSNorm on CPU keeps the normalised rows too, in float32 even for
bfloat16 inputs; its LayerNorm there is fused, and serves as it is. Statistics are in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from megatrain.kernels.dispatch import Kernels, jit, next_power, tl, use_triton, warps

ROWS = 32
"""Rows that one program of the Triton backward works through, for one partial sum of weight gradients."""


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    rms: bool,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """x [..., n] normalised over the last dim, times `weight` [n], plus `bias` [n]; rms: RMSNorm, which has no bias."""
    if use_triton(kernels, x.device):
        return _TritonNorm.apply(x, None, weight, bias, eps, rms)[0]
    if rms:
        return _RMSNorm.apply(x, weight, eps)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    rms: bool,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), in one pass over both where Triton serves."""
    if use_triton(kernels, x.device) and x.dtype == residual.dtype:
        y, total = _TritonNorm.apply(x, residual, weight, bias, eps, rms)
        return y, total
    total = x + residual
    return norm(total, weight, bias, eps, rms=rms, kernels=kernels), total


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


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x, residual, weight, bias, y, total, means, scales, n, eps, RMS: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    v = tl.load(x + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row * n + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * n + columns, rounded, mask=inside)
        v = rounded.to(tl.float32)  # what the backward will read
    mean = 0.0
    if not RMS:
        mean = tl.sum(v, 0) / n
        tl.store(means + row, mean)
    centred = tl.where(inside, v - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    tl.store(scales + row, scale)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    out = centred * scale * w
    if BIAS:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + columns, out.to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dy, dtotal, total, weight, means, scales, dx, dweight, dbias, rows, n, RMS: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        here = columns < tl.where(
            row < rows, n, 0
        )  # no flag is made a block: Triton 3.9's interpreter would make integers of it
        v = tl.load(total + row * n + columns, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dy + row * n + columns, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        if not RMS:
            v = tl.where(inside, v - tl.load(means + row, mask=row < rows, other=0.0), 0.0)
        normed = v * scale
        sum_w += g * normed
        sum_b += g
        g = g * w
        out = g - normed * (tl.sum(g * normed, 0) / n)
        if not RMS:
            out -= tl.sum(g, 0) / n
        out = out * scale
        if ADD:
            out += tl.load(dtotal + row * n + columns, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * n + columns, out.to(dx.dtype.element_ty), mask=here)
    tl.store(dweight + program * n + columns, sum_w, mask=inside)
    if BIAS:
        tl.store(dbias + program * n + columns, sum_b, mask=inside)


class _TritonNorm(torch.autograd.Function):
    """(norm(x + residual), x + residual); without a residual the second is empty."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        rms: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.shape[-1]
        x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        rows = x.numel() // n
        total = x if residual is None else torch.empty_like(x)
        y = torch.empty_like(x)
        means, scales = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        block = next_power(n)
        other = x if residual is None else residual.contiguous()
        _forward_kernel[(rows,)](
            x, other, weight, weight if bias is None else bias, y, total, means, scales, n, eps,
            RMS=rms, ADD=residual is not None, BIAS=bias is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, means, scales)
        ctx.settings = rms, residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        if residual is not None:
            return y, total
        nothing = total.new_empty(0)
        ctx.mark_non_differentiable(nothing)
        return y, nothing

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None) -> Any:
        total, weight, means, scales = ctx.saved_tensors
        rms, added, has_bias = ctx.settings
        n = total.shape[-1]
        rows = total.numel() // n
        dy = torch.zeros_like(total) if dy is None else dy.contiguous()
        dtotal = None if not added or dtotal is None else dtotal.contiguous()
        programs = -(-rows // ROWS)
        dx = torch.empty_like(total)
        dweight = torch.empty(programs, n, dtype=torch.float32, device=total.device)
        dbias = torch.empty_like(dweight) if has_bias else dweight
        block = next_power(n)
        _backward_kernel[(programs,)](
            dy, dy if dtotal is None else dtotal, total, weight, means, scales, dx, dweight, dbias, rows, n,
            RMS=rms, ADD=dtotal is not None, BIAS=has_bias, ROWS=ROWS, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        summed = dbias.sum(0).to(weight.dtype) if has_bias else None
        return dx, dx if added else None, dweight.sum(0).to(weight.dtype), summed, None, None
