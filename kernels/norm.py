"""LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467), alone or with the residual addition before them.

With m = mean(x) (0 for RMSNorm) and r = 1 / sqrt(mean((x - m)^2) + eps) over a row of n, n' = (x - m) r:

    y = n' w + b      dx = r (g - mean(g) - n' mean(g n')), g = dy w   (RMSNorm: without mean(g))      dw = sum of dy n', db = sum of dy

Where a bias was added to the residual last, its gradient is the sum of dx over the rows, which compiled kernels make beside dw and db.

Both keep their input and one or two numbers a row. torch's composite RMSNorm on CPU keeps the normalised rows too, in float32 even for
bfloat16 inputs; its LayerNorm there is fused, and serves as it is. Statistics are in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from megatrain.kernels.dispatch import Kernels, jit, multiprocessors, next_power, tl, use_numba, use_triton, warps

WIDEST_BYTES = 16_384
"""Widest row, in bytes, that fits one program's registers beside the sums for weight and bias; a wider one is read twice, in blocks, and
its sums are a separate pass."""
WIDE_BLOCK, SUMS_BLOCK = 4096, 1024
"""Elements of a row wider than WIDEST_BYTES that its backward, and the pass for its sums, take at a time."""
NARROWEST = 128
"""Narrowest row, in elements, that numba's kernels normalise; on a CPU torch is faster for narrower ones."""
LEAST_ROWS = 4
"""Fewest rows for one program of the Triton backward, which makes one partial sum of weight gradients."""


def norm_compiled(kernels: Kernels, x: torch.Tensor) -> bool:
    """Whether a compiled kernel normalises x [..., n]: Triton's or numba's."""
    return use_triton(kernels, x.device) or (x.shape[-1] >= NARROWEST and use_numba(kernels, x))


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
    if norm_compiled(kernels, x):
        return _CompiledNorm.apply(x, None, weight, bias, None, eps, rms, False, kernels)[0]
    if rms:
        return _RMSNorm.apply(x, weight, eps)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def norm_beside(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    rms: bool,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x), x), for an x that is used beside its norm: compiled kernels add both gradients in the norm's backward."""
    if norm_compiled(kernels, x):
        y, same = _CompiledNorm.apply(x, None, weight, bias, None, eps, rms, True, kernels)
        return y, same
    return norm(x, weight, bias, eps, rms=rms, kernels=kernels), x


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
    """(norm(x + residual), x + residual), both [..., n]; in one pass where compiled."""
    if norm_compiled(kernels, x) and x.dtype == residual.dtype:
        y, total = _CompiledNorm.apply(x, residual, weight, bias, None, eps, rms, True, kernels)
        return y, total
    total = x + residual
    return norm(total, weight, bias, eps, rms=rms, kernels=kernels), total


def add_biased_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual_bias: torch.Tensor,
    eps: float,
    *,
    rms: bool,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_norm` with a bias added to residual before, whose gradient is a sum of its backward. Needs `norm_compiled` and one dtype.

    residual_bias: stands for what was added to residual before, [n]; its gradient is made here, in float32.
    """
    y, total = _CompiledNorm.apply(x, residual, weight, bias, residual_bias, eps, rms, True, kernels)
    return y, total


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


class _CompiledNorm(torch.autograd.Function):
    """(norm(x + residual), x + residual), or (norm(x), x) without a residual; the second is empty unless the caller uses it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual_bias: torch.Tensor | None,
        eps: float,
        rms: bool,
        beside: bool,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        triton = use_triton(kernels, x.device)
        forward = _forward_triton if triton else _forward_numba
        x, other = x.contiguous(), None if residual is None else residual.contiguous()
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        y, total, means, scales = forward(x, other, weight, bias, eps, rms)
        ctx.save_for_backward(total, weight, means, scales)
        ctx.settings = rms, residual is not None, bias is not None, triton
        ctx.set_materialize_grads(False)
        if beside:
            return y, total if residual is not None else x.view_as(x)
        nothing = total.new_empty(0)
        ctx.mark_non_differentiable(nothing)
        return y, nothing

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None) -> Any:
        total, weight, means, scales = ctx.saved_tensors
        rms, added, has_bias, triton = ctx.settings
        dy = torch.zeros_like(total) if dy is None else dy.contiguous()
        dtotal = None if dtotal is None else dtotal.contiguous()
        before: bool = ctx.needs_input_grad[4]
        backward = _backward_triton if triton else _backward_numba
        dx, summed = backward(dy, dtotal, total, weight, means, scales, rms, has_bias, before)
        own = summed[: 1 + has_bias].to(weight.dtype)
        before_sum = summed[-1] if before else None
        return dx, dx if added else None, own[0], own[1] if has_bias else None, before_sum, *[None] * 4


# --- numba ----------------------------------------------------------------------------------------------------------------


def _forward_numba(*given: Any) -> tuple[torch.Tensor, ...]:
    from megatrain.kernels.cpu_norm import forward  # noqa: PLC0415  numba is optional

    return forward(*given)


def _backward_numba(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from megatrain.kernels.cpu_norm import backward  # noqa: PLC0415

    *_, biased, before = given
    dx, sums = backward(*given)
    return dx, sums[[True, biased, before]]


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
        v = rounded.to(tl.float32)  # the values that the backward will read
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
    dy, dtotal, total, weight, means, scales, dx, dweight, dbias, dbefore, rows, n, RMS: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, BEFORE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    for i in range(EACH):
        row = program * EACH + i
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
        if BEFORE:
            sum_x += out  # 0 beyond the last row
    tl.store(dweight + program * n + columns, sum_w, mask=inside)
    if BIAS:
        tl.store(dbias + program * n + columns, sum_b, mask=inside)
    if BEFORE:
        tl.store(dbefore + program * n + columns, sum_x, mask=inside)


@jit
def _wide_backward_kernel(
    dy, dtotal, total, weight, means, scales, dx, RMS: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    mean = 0.0
    if not RMS:
        mean = tl.load(means + row)
    along = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        v = tl.load(total + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        g = g * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        along += g * (v - mean) * scale
        plain += g
    slope, shift = tl.sum(along, 0) / N, tl.sum(plain, 0) / N
    for start in range(0, N, BLOCK):  # the second read of the row comes from the cache
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        v = tl.load(total + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        g = g * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        out = g - (v - mean) * scale * slope
        if not RMS:
            out -= shift
        out = out * scale
        if ADD:
            out += tl.load(dtotal + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * N + columns, out.to(dx.dtype.element_ty), mask=inside)


@jit
def _sums_kernel(
    dy,
    total,
    means,
    scales,
    dx,
    dweight,
    dbias,
    dbefore,
    rows,
    n,
    RMS: tl.constexpr,
    BIAS: tl.constexpr,
    BEFORE: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    for i in range(EACH):
        row = program * EACH + i
        here = columns < tl.where(row < rows, n, 0)
        v = tl.load(total + row * n + columns, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dy + row * n + columns, mask=here, other=0.0).to(tl.float32)
        if not RMS:
            v -= tl.load(means + row, mask=row < rows, other=0.0)
        sum_w += g * v * tl.load(scales + row, mask=row < rows, other=0.0)
        sum_b += g
        if BEFORE:
            sum_x += tl.load(dx + row * n + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(dweight + program * n + columns, sum_w, mask=inside)
    if BIAS:
        tl.store(dbias + program * n + columns, sum_b, mask=inside)
    if BEFORE:
        tl.store(dbefore + program * n + columns, sum_x, mask=inside)


def _forward_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool
) -> tuple[torch.Tensor, ...]:
    """(y, x + residual or x, means, scales) for x and `residual` [..., n], weight and bias [n], contiguous.

    means and scales: [rows] float32.
    """
    n = x.shape[-1]
    rows = x.numel() // n
    total = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    means, scales = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block = next_power(n)
    other = x if residual is None else residual
    _forward_kernel[(rows,)](
        x, other, weight, weight if bias is None else bias, y, total, means, scales, n, eps,
        RMS=rms, ADD=residual is not None, BIAS=bias is not None, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return y, total, means, scales


def _backward_triton(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    means: torch.Tensor,
    scales: torch.Tensor,
    rms: bool,
    has_bias: bool,
    before: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [..., n], sums [1 to 3, n] in float32: gradients of weight, of bias if has_bias, and the sum of dx if `before`)."""
    n = total.shape[-1]
    rows = total.numel() // n
    # Two programs for each multiprocessor: all run at once, and the partial sums stay few, whatever the number of rows.
    each = max(LEAST_ROWS, -(-rows // (2 * multiprocessors(total.device))))
    programs = -(-rows // each)
    dx = torch.empty_like(total)
    partial = torch.empty(1 + has_bias + before, programs, n, dtype=torch.float32, device=total.device)
    dweight, dbias, dbefore = partial[0], partial[1] if has_bias else dy, partial[-1] if before else dy
    block = next_power(n)
    added_dy = dy if dtotal is None else dtotal
    settings: dict[str, Any] = {"RMS": rms, "ADD": dtotal is not None}
    if block * total.element_size() <= WIDEST_BYTES:
        _backward_kernel[(programs,)](
            dy, added_dy, total, weight, means, scales, dx, dweight, dbias, dbefore, rows, n, **settings,
            BIAS=has_bias, BEFORE=before, EACH=each, BLOCK=block, num_warps=warps(block * total.element_size()),
        )  # fmt: skip
    else:
        wide = {"N": n, "BLOCK": WIDE_BLOCK, "num_warps": warps(WIDE_BLOCK)}
        _wide_backward_kernel[(rows,)](dy, added_dy, total, weight, means, scales, dx, **settings, **wide)
        sums = {"RMS": rms, "BIAS": has_bias, "BEFORE": before, "EACH": each, "BLOCK": SUMS_BLOCK}
        _sums_kernel[(programs, -(-n // SUMS_BLOCK))](
            dy, total, means, scales, dx if before else dy, dweight, dbias, dbefore, rows, n, **sums
        )
    return dx, partial.sum(1)
