"""Activations: act(x), and the gated ones act(gate) * up (Shazeer, arXiv:2002.05202), of which the inputs are kept and nothing else.

gelu        x Phi(x)                                 d/dx = Phi(x) + x phi(x), the exact one
gelu_tanh   x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)      which is x (1 + tanh u) / 2 (Hendrycks & Gimpel, arXiv:1606.08415)
relu        max(x, 0)                                of which the output is kept
swiglu      silu(g) u                                d/dg silu = sigmoid(g) (1 + g (1 - sigmoid(g)))
geglu       gelu(g) u

The backward of a gate writes the gradients of gate and up beside one another (kernels/beside.py). And it sums over the rows what it
writes, where the matmul before it had a bias: that gradient costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from megatrain.kernels.dispatch import Kernels, jit, multiprocessors, tl, use_numba, use_triton
from megatrain.kernels.gelu_tanh import gelu_tanh

PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""Activations without a gate, by name."""
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"swiglu": functional.silu, "geglu": functional.gelu}
SLOPES: dict[str, Callable[..., torch.Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.grad_input,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    "relu": lambda dy, y, grad_input: torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=grad_input),
    "swiglu": torch.ops.aten.silu_backward.grad_input,
    "geglu": torch.ops.aten.gelu_backward.grad_input,
}
"""Backward of each activation: (dy, x, grad_input), where grad_input receives the gradient of x and may be dy; for relu y instead of x."""
CURVES = {"swiglu": 0, "geglu": 1, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Number of each activation, as the compiled kernels know it."""
BLOCK = 1024
"""Elements that one Triton program takes at a time."""


class Compiled(NamedTuple):
    """forward: (x, up or None, kind) -> act(x) or act(x) up; backward: (x, up or None, dy, kind, summed) -> (gradients, their row sums)."""

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def activated(x: torch.Tensor, kind: str, *, bias: torch.Tensor | None = None, kernels: Kernels = "auto") -> torch.Tensor:
    """act(x) of x [..., f]; kind: a key of PLAIN.

    bias: stands for what was added to x before, [f]; its gradient is made here.
    """
    compiled = _compiled(kernels, x)
    if bias is None and compiled is None and not _by_sigmoid(x, kind):
        return PLAIN[kind](x)
    return _Activated.apply(x, bias, kind, compiled)


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    *,
    bias: torch.Tensor | None = None,
    keep: bool = False,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """act(gate) * up, both [..., f]; kind: a key of GATES.

    bias: stands for what was added to gate|up before, [2 f]; its gradient is made here. keep: act(gate) may be kept, which is faster
    for the reference.
    """
    return _Gated.apply(gate, up, bias, kind, keep, _compiled(kernels, gate))


def _compiled(kernels: Kernels, x: torch.Tensor) -> Compiled | None:
    """The compiled kernels to use for x; None: the reference."""
    if use_triton(kernels, x.device):
        return Compiled(_forward_triton, _backward_triton)
    return Compiled(_forward_numba, _backward_numba) if use_numba(kernels, x) else None


def _by_sigmoid(x: torch.Tensor, kind: str) -> bool:
    return kind == "gelu_tanh" and x.device.type == "cpu"


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, kind: str, compiled: Compiled | None) -> torch.Tensor:
        act = gelu_tanh if _by_sigmoid(x, kind) else PLAIN[kind]
        y = act(x) if compiled is None else compiled.forward(x, None, kind)
        ctx.save_for_backward(y if kind == "relu" else x)
        ctx.settings = kind, compiled, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        kind, compiled, wide = ctx.settings
        summed = ctx.needs_input_grad[1]
        if compiled is not None:
            dx, sums = compiled.backward(x, None, dy, kind, summed)
        else:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            SLOPES[kind](dy, x, grad_input=dx)
            sums = row_sums(dx) if summed else None
        return dx, None if sums is None else sums.to(wide), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
        kind: str,
        keep: bool,
        compiled: Compiled | None,
    ) -> torch.Tensor:
        ctx.settings = kind, compiled, None if bias is None else bias.dtype
        if compiled is not None:
            ctx.save_for_backward(gate, up)
            return compiled.forward(gate, up, kind)
        act = GATES[kind](gate)
        ctx.save_for_backward(gate, up, *([act] if keep else []))
        return act * up if keep else act.mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up, *kept = ctx.saved_tensors
        kind, compiled, wide = ctx.settings
        summed = ctx.needs_input_grad[2]
        if compiled is not None:
            both, sums = compiled.backward(gate, up, dy, kind, summed)
        else:
            both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
            dgate, dup = both.chunk(2, -1)
            torch.mul(dy, kept[0] if kept else GATES[kind](gate), out=dup)
            torch.mul(dy, up, out=dgate)
            SLOPES[kind](dgate, gate, grad_input=dgate)
            sums = row_sums(both) if summed else None
        return *both.chunk(2, -1), None if sums is None else sums.to(wide), None, None, None


def row_sums(dy: torch.Tensor) -> torch.Tensor:
    """Sum of dy [..., n] over its rows, in float32 inside: [n], in dy's dtype (for another one torch on CPU copies dy)."""
    return dy.flatten(0, -2).sum(0)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., f] as contiguous rows [n, f]: a view if they are, as in the parts of one matmul's output.

    Reshaping to two dims removes dims of size 1, whose stride may be anything and which `contiguous` does not change.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


# --- numba ----------------------------------------------------------------------------------------------------------------


def _forward_numba(x: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    from megatrain.kernels.cpu_gated import activate  # noqa: PLC0415  numba is optional

    return activate(_rows_of(x), None if up is None else _rows_of(up), CURVES[kind]).view(x.shape)


def _backward_numba(
    x: torch.Tensor, up: torch.Tensor | None, dy: torch.Tensor, kind: str, summed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_backward_triton` by numba; returns the sums always."""
    from megatrain.kernels.cpu_gated import activate_back  # noqa: PLC0415

    given = dy.reshape(-1, dy.shape[-1]).contiguous()
    dx, sums = activate_back(_rows_of(x), None if up is None else _rows_of(up), given, CURVES[kind])
    return dx.view(*x.shape[:-1], dx.shape[1]), sums if summed else None


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _act(x, CURVE: tl.constexpr):
    if CURVE == 0:
        return x / (1.0 + tl.exp(-x))
    if CURVE == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if CURVE == 2:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return tl.where(x > 0.0, x, x * 0.0)  # so that NaN stays


@jit
def _slope(x, CURVE: tl.constexpr):
    if CURVE == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    if CURVE == 1:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    if CURVE == 2:
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        return sigmoid * (1.0 + x * (1.0 - sigmoid) * (1.5957691216057308 + 0.21406840426447 * x * x))
    return tl.where(x > 0.0, 1.0, 0.0)


@jit
def _forward_kernel(
    x, up, y, columns, stride_x, stride_up, CURVE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    out = _act(tl.load(x + row * stride_x + column, mask=here, other=0.0).to(tl.float32), CURVE)
    if GATED:
        out *= tl.load(up + row * stride_up + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, out.to(y.dtype.element_ty), mask=here)


@jit
def _backward_kernel(
    x, up, dy, dx, dup, sums, sums_up, rows, columns, stride_x, stride_up, stride_out, CURVE: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    total_up = tl.zeros((BLOCK,), tl.float32)
    for i in range(EACH):
        row = program * EACH + i
        here = column < tl.where(row < rows, columns, 0)
        v = tl.load(x + row * stride_x + column, mask=here, other=0.0).to(tl.float32)
        d = tl.load(dy + row * columns + column, mask=here, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load(up + row * stride_up + column, mask=here, other=0.0).to(tl.float32)
            of_up = d * _act(v, CURVE)
            tl.store(dup + row * stride_out + column, of_up.to(dup.dtype.element_ty), mask=here)
            total_up += of_up
            d = d * u
        out = d * _slope(v, CURVE)
        tl.store(dx + row * stride_out + column, out.to(dx.dtype.element_ty), mask=here)
        total += out
    if BIAS:
        inside = column < columns
        tl.store(sums + program * stride_out + column, total, mask=inside)
        if GATED:
            tl.store(sums_up + program * stride_out + column, total_up, mask=inside)


def _forward_triton(x: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        x = _rows_of(x)
        up = x if up is None else _rows_of(up)
        rows, columns = x.shape
        settings: dict[str, Any] = {"CURVE": CURVES[kind], "GATED": kind in GATES, "BLOCK": BLOCK}
        _forward_kernel[(rows, -(-columns // BLOCK))](x, up, y, columns, x.stride(0), up.stride(0), **settings)
    return y


def _backward_triton(
    x: torch.Tensor, up: torch.Tensor | None, dy: torch.Tensor, kind: str, summed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gradient of x [..., f] or of gate|up [..., 2 f], its sum over the rows in float32 if `summed`, else None)."""
    parts = 1 if up is None else 2
    f = x.shape[-1]
    both = torch.empty(*x.shape[:-1], parts * f, dtype=x.dtype, device=x.device)
    if both.numel() == 0:
        return both, both.new_zeros(parts * f, dtype=torch.float32) if summed else None
    out, x = both.view(-1, parts * f), _rows_of(x)
    up = x if up is None else _rows_of(up)
    rows, blocks = len(x), -(-f // BLOCK)
    # With sums, eight programs for each multiprocessor: all run at once, and the partial sums stay few.
    each = max(1, rows * blocks // (8 * multiprocessors(x.device))) if summed else 1
    programs = -(-rows // each)
    dx, dup = (out, out) if parts == 1 else out.split(f, 1)
    partial = torch.empty(programs, parts * f, dtype=torch.float32, device=x.device) if summed else out
    sums, sums_up = (partial, partial) if parts == 1 else partial.split(f, 1)
    settings: dict[str, Any] = {"CURVE": CURVES[kind], "GATED": kind in GATES, "BIAS": summed, "EACH": each, "BLOCK": BLOCK}
    _backward_kernel[(programs, blocks)](
        x, up, dy.contiguous(), dx, dup, sums, sums_up, rows, f, x.stride(0), up.stride(0), parts * f, **settings
    )
    return both, partial.sum(0) if summed else None
