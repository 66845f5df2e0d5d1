"""Copies of BF16 on a CPU that also sum: gradients of heads into rows of q|k|v, with their sum over tokens (kernels/rotary.py), and of
a block's keys and values added to those of all (kernels/attention.py)."""

from __future__ import annotations

import torch
from numba import prange

from megatrain.kernels.cpu import PARTS, Kernel, clear, flat, jit, line, wide


@jit
def _copy(x, y):
    for i in range(len(x)):
        y[i] = x[i]


@jit
def _join(x, total):
    for i in range(len(x)):
        total[i] += wide(x[i])


@Kernel
def _place(x, stride_s, stride_b, stride_head, y, start, width, sums, tokens, batch, heads, d):
    for part in prange(PARTS):
        mine = line(sums, part * width + start, heads * d)
        clear(mine)
        for token in range(tokens * part // PARTS, tokens * (part + 1) // PARTS):
            at = (token // batch) * stride_s + (token % batch) * stride_b
            for head in range(heads):
                to = token * width + start + head * d
                _copy(line(x, at + head * stride_head, d), line(y, to, d))
            _join(line(y, token * width + start, heads * d), mine)


@Kernel
def _add(x, total, stride, rows, n):
    for part in prange(rows):
        _join(line(x, part * n, n), line(total, part * stride, n))


def place(x: torch.Tensor, rows: torch.Tensor, start: int, sums: torch.Tensor) -> None:
    """Copy heads x [s, b, heads, d], each head contiguous, to columns `start` .. of rows [s, b, width], contiguous.

    sums [PARTS, width] float32: the same columns become sums over parts of the tokens.
    """
    s, b, heads, d = x.shape
    _place(x.numel(), flat(x), *x.stride()[:3], flat(rows), start, rows.shape[2], flat(sums), s * b, b, heads, d)


def add(total: torch.Tensor, more: torch.Tensor) -> None:
    """total [n, keys, d] += more [n, keys, d]; total is float32 with contiguous keys, `more` BF16 and contiguous."""
    rows, keys, d = more.shape
    _add(more.numel(), flat(more), flat(total), total.stride(0), rows, keys * d)
