"""Rotation of pairs of numbers (rotary embedding, Su et al., arXiv:2104.09864), of the first r numbers of each head.

    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin      the rest stays; pairs are the halves of the r numbers, or neighbours

A rotation is orthogonal (times the tables' magnitude): its backward is the rotation by the opposite angle.
"""

from __future__ import annotations

from typing import Any

import torch

from megatrain.kernels.dispatch import Kernels, jit, next_power, tl, use_triton


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, kernels: Kernels = "auto"
) -> torch.Tensor:
    """x [s, b, a, d] turned by cos and sin [s, b, r/2]."""
    return _Rotate.apply(x, cos, sin, interleaved, use_triton(kernels, x.device))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, triton: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.settings = interleaved, triton
        return (_rotate_triton if triton else rotate)(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        interleaved, triton = ctx.settings
        return (_rotate_triton if triton else rotate)(dy, cos, -sin, interleaved), None, None, None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The reference: x [s, b, a, d] turned by cos and sin [s, b, r/2]; no gradient."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x1, x2 = _pairs(x, pairs, interleaved)
    y1, y2 = _pairs(y, pairs, interleaved)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    if 2 * pairs < x.shape[-1]:
        y[..., 2 * pairs :] = x[..., 2 * pairs :]
    return y


def _pairs(x: torch.Tensor, pairs: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second numbers of all pairs."""
    if interleaved:
        return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x[..., :pairs], x[..., pairs : 2 * pairs]


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _kernel(
    x, cos, sin, y, stride_token, stride_head, heads, d, pairs, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    here = (head < heads) & (pair < pairs)
    c = tl.load(cos + token * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    s = tl.load(sin + token * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    source = x + token * stride_token + head * stride_head
    target = y + token * heads * d + head * d
    if INTERLEAVED:  # read and written as they lie: two numbers at a time, one of each kind, would be two passes of half words
        both = tl.arange(0, 2 * PAIRS)[None, :]
        inside = (head < heads) & (both < 2 * pairs)
        x1, x2 = tl.split(tl.load(source + both, mask=inside, other=0.0).to(tl.float32).reshape(HEADS, PAIRS, 2))
        turned = tl.join(x1 * c - x2 * s, x2 * c + x1 * s).reshape(HEADS, 2 * PAIRS)
        tl.store(target + both, turned.to(y.dtype.element_ty), mask=inside)
    else:
        x1 = tl.load(source + pair, mask=here, other=0.0).to(tl.float32)
        x2 = tl.load(source + pair + pairs, mask=here, other=0.0).to(tl.float32)
        tl.store(target + pair, (x1 * c - x2 * s).to(y.dtype.element_ty), mask=here)
        tl.store(target + pair + pairs, (x2 * c + x1 * s).to(y.dtype.element_ty), mask=here)
    if REST > 0:
        rest = 2 * pairs + tl.arange(0, REST)[None, :]
        there = (head < heads) & (rest < d)
        tl.store(target + rest, tl.load(source + rest, mask=there, other=0.0), mask=there)


def _rotate_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    s, b, heads, d = x.shape
    pairs = cos.shape[-1]
    # A program takes a token: tokens must lie evenly, and the numbers of a head behind one another.
    if x.stride(3) != 1 or (s > 1 and b > 1 and x.stride(0) != b * x.stride(1)):
        x = x.contiguous()
    stride = x.stride(1) if b > 1 else x.stride(0)
    cos, sin = (table.expand(s, b, pairs).contiguous() for table in (cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rest = d - 2 * pairs
    _kernel[(s * b,)](
        x, cos, sin, y, stride, x.stride(2), heads, d, pairs, INTERLEAVED=interleaved,
        HEADS=next_power(heads), PAIRS=next_power(pairs), REST=next_power(rest) if rest else 0,
    )  # fmt: skip
    return y
