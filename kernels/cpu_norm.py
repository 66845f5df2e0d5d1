"""LayerNorm and RMSNorm on a CPU in BF16, one pass over memory each way: with the residual addition before them forward, and backward
with the other gradient of what was added and the sums for weight, bias and a bias before the addition (kernels/norm.py)."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from megatrain.kernels.cpu import PARTS, Kernel, clear, flat, jit, jit_sums, line, narrow, wide


@jit_sums
def _read(x, y):
    total = np.float32(0.0)
    for i in range(len(x)):
        y[i] = wide(x[i])
        total += y[i]
    return total


@jit_sums
def _add(x, residual, out, y):
    total = np.float32(0.0)
    for i in range(len(x)):
        out[i] = narrow(wide(x[i]) + wide(residual[i]))
        y[i] = wide(out[i])  # the values that the backward will read
        total += y[i]
    return total


@jit_sums
def _centre(x, mean):
    total = np.float32(0.0)
    for i in range(len(x)):
        x[i] -= mean
        total += x[i] * x[i]
    return total


@jit
def _write(x, scale, weight, bias, y):
    for i in range(len(x)):
        y[i] = narrow(x[i] * scale * weight[i] + bias[i])


@jit
def _normalise(x, mean, scale, y):
    for i in range(len(x)):
        y[i] = (wide(x[i]) - mean) * scale


@jit_sums
def _weigh(dy, weight, normed, y):
    along = np.float32(0.0)
    for i in range(len(dy)):
        y[i] = wide(dy[i]) * weight[i]
        along += y[i] * normed[i]
    return along


@jit_sums
def _total(x):
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i]
    return total


@jit
def _add_products(dy, normed, total):
    for i in range(len(dy)):
        total[i] += wide(dy[i]) * normed[i]


@jit
def _add_numbers(x, total):
    for i in range(len(x)):
        total[i] += wide(x[i])


@jit
def _slope(g, normed, slope, shift, scale):
    for i in range(len(g)):
        g[i] = (g[i] - normed[i] * slope - shift) * scale


@jit
def _round(x, y):
    for i in range(len(x)):
        y[i] = narrow(x[i])


@jit
def _round_sum(x, more, y):
    for i in range(len(x)):
        y[i] = narrow(x[i] + wide(more[i]))


@Kernel
def _forward(x, residual, weight, bias, y, total, means, scales, rows, n, eps, rms):
    for part in prange(PARTS):
        room = np.empty(n, np.float32)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            at = row * n
            if len(residual) > 0:
                mean = _add(line(x, at, n), line(residual, at, n), line(total, at, n), room) / np.float32(n)
            else:
                mean = _read(line(x, at, n), room) / np.float32(n)
            mean = np.float32(0.0) if rms else mean
            scale = np.float32(1.0) / np.sqrt(_centre(room, mean) / np.float32(n) + np.float32(eps))
            means[row], scales[row] = mean, scale
            _write(room, scale, weight, bias, line(y, at, n))


@Kernel
def _backward(dy, dtotal, total, weight, means, scales, dx, sums, rows, n, rms, biased, before):
    for part in prange(PARTS):
        mine = line(sums, part * 3 * n, 3 * n)
        clear(mine)
        sum_w, sum_b, sum_x = line(mine, 0, n), line(mine, n, n), line(mine, 2 * n, n)
        normed, g = np.empty(n, np.float32), np.empty(n, np.float32)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            at = row * n
            given, out = line(dy, at, n), line(dx, at, n)
            _normalise(line(total, at, n), means[row], scales[row], normed)
            slope = _weigh(given, weight, normed, g) / np.float32(n)
            shift = np.float32(0.0) if rms else _total(g) / np.float32(n)
            _add_products(given, normed, sum_w)
            if biased:
                _add_numbers(given, sum_b)
            _slope(g, normed, slope, shift, scales[row])
            if len(dtotal) > 0:
                _round_sum(g, line(dtotal, at, n), out)
            else:
                _round(g, out)
            if before:
                _add_numbers(out, sum_x)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, x + residual or x, means, scales) for x and `residual` [..., n], contiguous; means and scales: [rows] float32."""
    n = x.shape[-1]
    rows = x.numel() // n
    y, means, scales = torch.empty_like(x), torch.empty(rows), torch.empty(rows)
    total = x if residual is None else torch.empty_like(x)
    shift = torch.zeros(n) if bias is None else bias.float()
    other = x.new_empty(0) if residual is None else residual
    tensors = (x, other, weight.float(), shift, y, total, means, scales)
    _forward(x.numel(), *(flat(tensor) for tensor in tensors), rows, n, eps, rms)
    return y, total, means, scales


def backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    means: torch.Tensor,
    scales: torch.Tensor,
    rms: bool,
    biased: bool,
    before: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, sums [3, n] in float32: for weight, for bias where `biased`, and of dx where `before`) of dy and dtotal, contiguous."""
    n = total.shape[-1]
    rows = total.numel() // n
    dx, sums = torch.empty_like(total), torch.empty(PARTS, 3, n)
    tensors = (dy, total.new_empty(0) if dtotal is None else dtotal, total, weight.float(), means, scales, dx, sums)
    _backward(total.numel(), *(flat(tensor) for tensor in tensors), rows, n, rms, biased, before)
    return dx, sums.sum(0)
