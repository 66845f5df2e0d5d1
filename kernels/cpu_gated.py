"""Activations on a CPU in BF16, one pass each way, with the sums for a bias (kernels/gated.py)."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from megatrain.kernels.cpu import PARTS, Kernel, clear, exp, flat, jit, line, narrow, wide


@jit
def _normal(x):
    """(Phi(x), phi(x)) of the normal distribution, within 1.5e-7 (Abramowitz & Stegun 7.1.26)."""
    z = abs(x) * np.float32(0.7071067811865476)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * z)
    y = np.float32(1.061405429)
    y = y * t - np.float32(1.453152027)
    y = y * t + np.float32(1.421413741)
    y = y * t - np.float32(0.284496736)
    y = y * t + np.float32(0.254829592)
    bell = exp(-z * z)
    tail = np.float32(0.5) * y * t * bell
    return (tail if x < np.float32(0.0) else np.float32(1.0) - tail), bell * np.float32(0.3989422804014327)


@jit
def _sigmoid(x):
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@jit
def _act(x, curve):
    if curve == 0:
        return x * _sigmoid(x)
    if curve == 1:
        return x * _normal(x)[0]
    if curve == 2:
        return x * _sigmoid(x * (np.float32(1.5957691216057308) + np.float32(0.0713548162726) * x * x))
    return x if not x < np.float32(0.0) else np.float32(0.0)


@jit
def _slope(x, curve):
    if curve == 0:
        s = _sigmoid(x)
        return s * (np.float32(1.0) + x * (np.float32(1.0) - s))
    if curve == 1:
        share, density = _normal(x)
        return share + x * density
    if curve == 2:
        s = _sigmoid(x * (np.float32(1.5957691216057308) + np.float32(0.0713548162726) * x * x))
        inner = np.float32(1.5957691216057308) + np.float32(0.2140644488178) * x * x
        return s * (np.float32(1.0) + x * (np.float32(1.0) - s) * inner)
    return np.float32(1.0) if not x <= np.float32(0.0) else np.float32(0.0)


@jit
def _act_row(x, y, curve):
    for i in range(len(x)):
        y[i] = narrow(_act(wide(x[i]), curve))


@jit
def _gate_row(x, up, y, curve):
    for i in range(len(x)):
        y[i] = narrow(_act(wide(x[i]), curve) * wide(up[i]))


@jit
def _slope_row(x, dy, dx, total, curve):
    for i in range(len(x)):
        d = wide(dy[i]) * _slope(wide(x[i]), curve)
        dx[i] = narrow(d)
        total[i] += d


@jit
def _gate_slope_row(x, up, dy, dx, total, curve):
    for i in range(len(x)):
        d = wide(dy[i]) * wide(up[i]) * _slope(wide(x[i]), curve)
        dx[i] = narrow(d)
        total[i] += d


@jit
def _up_row(x, dy, dup, total, curve):
    for i in range(len(x)):
        d = wide(dy[i]) * _act(wide(x[i]), curve)
        dup[i] = narrow(d)
        total[i] += d


# Each curve is a loop of its own, in which the compiler knows the number.


@jit
def _act_line(x, y, curve):
    if curve == 0:
        _act_row(x, y, 0)
    elif curve == 1:
        _act_row(x, y, 1)
    elif curve == 2:
        _act_row(x, y, 2)
    else:
        _act_row(x, y, 3)


@jit
def _slope_line(x, dy, dx, total, curve):
    if curve == 1:
        _slope_row(x, dy, dx, total, 1)
    elif curve == 2:
        _slope_row(x, dy, dx, total, 2)
    else:
        _slope_row(x, dy, dx, total, 3)


@jit
def _gate_line(x, up, y, curve):
    if curve == 0:
        _gate_row(x, up, y, 0)
    else:
        _gate_row(x, up, y, 1)


@jit
def _gate_slope_line(x, up, dy, dx, dup, total, total_up, curve):
    if curve == 0:
        _gate_slope_row(x, up, dy, dx, total, 0)
        _up_row(x, dy, dup, total_up, 0)
    else:
        _gate_slope_row(x, up, dy, dx, total, 1)
        _up_row(x, dy, dup, total_up, 1)


@Kernel
def _activate(x, stride, y, rows, columns, curve):
    for part in prange(PARTS):
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            _act_line(line(x, row * stride, columns), line(y, row * columns, columns), curve)


@Kernel
def _activate_back(x, stride, dy, dx, sums, rows, columns, curve):
    for part in prange(PARTS):
        total = line(sums, part * columns, columns)
        clear(total)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            at = row * columns
            _slope_line(line(x, row * stride, columns), line(dy, at, columns), line(dx, at, columns), total, curve)


@Kernel
def _gate(x, stride, up, stride_up, y, rows, columns, curve):
    for part in prange(PARTS):
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            _gate_line(
                line(x, row * stride, columns), line(up, row * stride_up, columns), line(y, row * columns, columns), curve
            )


@Kernel
def _gate_back(x, stride, up, stride_up, dy, both, sums, rows, columns, curve):
    for part in prange(PARTS):
        total = line(sums, part * 2 * columns, 2 * columns)
        clear(total)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            out = line(both, 2 * row * columns, 2 * columns)
            _gate_slope_line(
                line(x, row * stride, columns), line(up, row * stride_up, columns), line(dy, row * columns, columns),
                line(out, 0, columns), line(out, columns, columns), line(total, 0, columns), line(total, columns, columns), curve,
            )  # fmt: skip


def activate(x: torch.Tensor, up: torch.Tensor | None, curve: int) -> torch.Tensor:
    """act(x), or act(x) up: [rows, f], from x and `up` [rows, f] with contiguous rows. curve: number of act in gated.CURVES."""
    rows, columns = x.shape
    y = torch.empty(rows, columns, dtype=x.dtype)
    if up is None:
        _activate(y.numel(), flat(x), x.stride(0), flat(y), rows, columns, curve)
    else:
        _gate(y.numel(), flat(x), x.stride(0), flat(up), up.stride(0), flat(y), rows, columns, curve)
    return y


def activate_back(x: torch.Tensor, up: torch.Tensor | None, dy: torch.Tensor, curve: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradients [rows, f] of x, or [rows, 2 f] of x and `up` beside one another; their sums over the rows, float32).

    dy: [rows, f], contiguous.
    """
    rows, columns = x.shape
    width = columns if up is None else 2 * columns
    dx, sums = torch.empty(rows, width, dtype=x.dtype), torch.empty(PARTS, width)
    if up is None:
        _activate_back(dx.numel(), flat(x), x.stride(0), flat(dy), flat(dx), flat(sums), rows, columns, curve)
    else:
        _gate_back(
            dx.numel(), flat(x), x.stride(0), flat(up), up.stride(0), flat(dy), flat(dx), flat(sums), rows, columns, curve
        )
    return dx, sums.sum(0)
