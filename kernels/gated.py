"""Gated activations: activation(gate) * up (Shazeer, arXiv:2002.05202), of which gate and up are kept, and nothing else.

swiglu   silu(g) u      d/dg silu = sigmoid(g) (1 + g (1 - sigmoid(g)))
geglu    gelu(g) u      d/dg gelu = Phi(g) + g phi(g), the exact one
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from megatrain.kernels.dispatch import Kernels, jit, tl, use_triton

PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""Activations without a gate."""
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"swiglu": functional.silu, "geglu": functional.gelu}
BLOCK = 1024
"""Elements that one Triton program takes."""


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str, *, keep: bool = False, kernels: Kernels = "auto") -> torch.Tensor:
    """activation(gate) * up, both [..., f]; kind: a key of GATES.

    keep: what the backward reads twice may be kept, which is faster without Triton.
    """
    triton = use_triton(kernels, gate.device)
    if keep and not triton:
        return GATES[kind](gate) * up
    return _Gated.apply(gate, up, kind, triton)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: str, triton: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.settings = kind, triton
        return _forward_triton(gate, up, kind) if triton else GATES[kind](gate) * up

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        kind, triton = ctx.settings
        if triton:
            return (*_backward_triton(gate, up, dy, kind), None, None)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            act = GATES[kind](gate)
        (dgate,) = torch.autograd.grad(act, gate, dy * up)
        return dgate, dy * act.detach(), None, None


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _activate(g, SILU: tl.constexpr):
    if SILU:
        return g / (1.0 + tl.exp(-g))
    return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))


@jit
def _slope(g, SILU: tl.constexpr):
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        return sigmoid * (1.0 + g * (1.0 - sigmoid))
    return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * tl.exp(-0.5 * g * g) * 0.3989422804014327


@jit
def _forward_kernel(gate, up, y, rows, columns, stride_gate, stride_up, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    g = tl.load(gate + row * stride_gate + column, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (_activate(g, SILU) * u).to(y.dtype.element_ty), mask=here)


@jit
def _backward_kernel(gate, up, dy, dgate, dup, rows, columns, stride_gate, stride_up, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    g = tl.load(gate + row * stride_gate + column, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + column, mask=here, other=0.0).to(tl.float32)
    d = tl.load(dy + row * columns + column, mask=here, other=0.0).to(tl.float32)
    tl.store(dgate + row * columns + column, (d * u * _slope(g, SILU)).to(dgate.dtype.element_ty), mask=here)
    tl.store(dup + row * columns + column, (d * _activate(g, SILU)).to(dup.dtype.element_ty), mask=here)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., f] as rows [n, f] whose numbers lie behind one another: a view where they do, as in the parts of one matmul's output.

    A dim of size 1 may have any stride, which says nothing of where the next row is, and `contiguous` leaves it: reshaped it is gone.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], -(-x.shape[-1] // BLOCK)


def _forward_triton(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() > 0:
        gate, up = _rows_of(gate), _rows_of(up)
        settings: dict[str, Any] = {"SILU": kind == "swiglu", "BLOCK": BLOCK}
        _forward_kernel[_grid(gate)](gate, up, y, *gate.shape, gate.stride(0), up.stride(0), **settings)
    return y


def _backward_triton(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dgate.numel() > 0:
        gate, up = _rows_of(gate), _rows_of(up)
        settings: dict[str, Any] = {"SILU": kind == "swiglu", "BLOCK": BLOCK}
        _backward_kernel[_grid(gate)](
            gate, up, dy.contiguous(), dgate, dup, *gate.shape, gate.stride(0), up.stride(0), **settings
        )
    return dgate, dup
