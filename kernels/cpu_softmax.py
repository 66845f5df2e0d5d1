"""Softmax on a CPU in BF16, in place and in one pass: of a block of attention scores (kernels/attention.py), and of logits, with the
sums that a cross-entropy needs (kernels/cross_entropy.py)."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from megatrain.kernels.cpu import PARTS, Kernel, clear, exp, flat, jit, jit_sums, line, narrow, wide


@jit
def _largest(x):
    """Largest of the BF16 numbers x, by comparing integers, which vectorises; bits of negative ones are inverted to order them."""
    top = np.int16(-0x8000)
    for i in range(len(x)):
        bits = np.int16(x[i])
        key = np.int16(bits ^ np.int16(np.int16(bits >> np.int16(15)) & np.int16(0x7FFF)))
        top = key if key > top else top
    return wide(np.uint16(top ^ np.int16(np.int16(top >> np.int16(15)) & np.int16(0x7FFF))))


@jit_sums
def _exponentials(x, y, top):
    total = np.float32(0.0)
    for i in range(len(x)):
        y[i] = exp(wide(x[i]) - top)
        total += y[i]
    return total


@jit
def _scale(x, y, factor):
    for i in range(len(x)):
        y[i] = narrow(x[i] * factor)


@Kernel
def _softmax(x, rows, keys, block):
    for part in prange(PARTS):
        room = np.empty(keys, np.float32)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            seen = keys - block + 1 + row % block
            here, wider = line(x, row * keys, seen), line(room, 0, seen)
            total = _exponentials(here, wider, _largest(here))
            _scale(wider, here, np.float32(1.0) / total)
            clear(line(x, row * keys + seen, keys - seen))


@Kernel
def _statistics(x, stride, ids, top, total):
    for part in prange(PARTS):
        rows = len(top)
        room = np.empty(ids, np.float32)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            here = line(x, row * stride, ids)
            top[row] = _largest(here)
            total[row] = _exponentials(here, room, top[row])
            _scale(room, here, np.float32(1.0))


@jit
def _slopes(x, factor, spread):
    for i in range(len(x)):
        x[i] = narrow(wide(x[i]) * factor - spread)


@Kernel
def _gradient(x, stride, ids, width, factor, spread):
    for part in prange(PARTS):
        rows = len(factor)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            _slopes(line(x, row * stride, ids), factor[row], spread[row])
            clear(line(x, row * stride + ids, width - ids))


def softmax(x: torch.Tensor, block: int) -> torch.Tensor:
    """Softmax of x [..., keys], contiguous, in place. Row r sees all keys but the last block - 1 - r % block, which become 0."""
    keys = x.shape[-1]
    _softmax(x.numel(), flat(x), x.numel() // keys, keys, block)
    return x


def statistics(logits: torch.Tensor, ids: int, top: torch.Tensor, total: torch.Tensor) -> None:
    """Write the largest of the first `ids` of each row of logits [n, width] and the sum of exp(x - largest), [n] float32.

    The logits are replaced by these exponentials. Rows are contiguous.
    """
    _statistics(len(logits) * ids, flat(logits), logits.stride(0), ids, flat(top), flat(total))


def gradient(logits: torch.Tensor, ids: int, factor: torch.Tensor, spread: torch.Tensor) -> None:
    """Multiply the first `ids` elements of each row of logits [n, width] by factor and subtract spread, both [n] float32; zero the rest."""
    width = logits.shape[1]
    _gradient(logits.numel(), flat(logits), logits.stride(0), ids, width, flat(factor), flat(spread))
