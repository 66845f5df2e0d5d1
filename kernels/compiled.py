"""Stretches of a transformer block between its matrix products, for torch.compile (`train.compile=block`).

    norm | q k v | norm q, k; rotate | attention | output | add, norm | up | activation | down | add

Matrix products keep to themselves: they call collectives, and add weight gradients to buffers that are no outputs. What lies between
them only moves memory, and is what a compiler can fuse. Each stretch is one whole graph (a break is an error), compiled once for its
shapes, its backward included; which tensors to keep for that is the compiler's choice, so nothing here is written with autograd in mind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch

from megatrain.kernels.gated import GATES, PLAIN


def require_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile has no compiler to call."""
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError(
            "train.compile=block needs a C++ compiler, and there is none. Install one (Debian, Ubuntu: apt install g++), "
            "or use train.compile=none."
        )
    if device.type == "cpu" and " " in torch.__file__:
        raise ValueError(
            f"train.compile=block: torch.compile cannot link against a PyTorch whose path has a blank ({torch.__file__}). "
            "Put the virtual environment elsewhere (MEGATRAIN_VENV=/path/without/blanks), or use train.compile=none."
        )


@cache
def compiled(function: Callable[..., Any], purpose: str, **settings: Any) -> Callable[..., Any]:
    """`function` with `settings` bound, compiled to one graph for each set of shapes; layers with equal arguments share it.

    purpose: name of its use. The compiler counts the graphs of a piece of code and refuses more than a few: each purpose has its own
    copy, so that norms of other widths do not count together.
    """
    own = FunctionType(
        function.__code__.replace(), function.__globals__, f"{function.__name__}_{purpose}", function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return partial(torch.compile(own, fullgraph=True, dynamic=False), **settings)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool) -> torch.Tensor:
    """x [..., n] normalised over the last dim in at least float32, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not rms:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), both [..., n]."""
    total = x + residual
    return norm(total, weight, bias, eps, rms), total


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [s, b, a, d] with the first r elements of each head rotated by cos and sin [s, b, r/2]."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        x1, x2 = turned.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.cat([torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).flatten(-2), rest], -1)
    x1, x2 = turned.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


def heads(
    whole: torch.Tensor, tables: tuple[tuple[torch.Tensor, torch.Tensor], ...], d: int, groups: int, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q|k|v [s, b, (a + 2 g) d] -> q [s, b, a, d] and k [s, b, g, d] turned, each half of a head by its own tables where there are two; v.

    v is a copy: a view would keep the q and k that were not turned.
    """
    q, k, v = whole.unflatten(-1, (-1, d)).split([whole.shape[-1] // d - 2 * groups, groups, groups], 2)
    turned = [
        torch.cat([rotary(part, *of, interleaved) for part, of in zip(x.chunk(len(tables), -1), tables, strict=True)], -1)
        for x in (q, k)
    ]
    return turned[0], turned[1], v.clone(memory_format=torch.contiguous_format)


def activation(inner: torch.Tensor, kind: str) -> torch.Tensor:
    """An MLP's activation of x [..., f], or if gated of gate|up [..., 2 f]: [..., f]."""
    if kind not in GATES:
        return PLAIN[kind](inner)
    gate, up = inner.chunk(2, -1)
    return GATES[kind](gate) * up
