"""The update of AdamW and Adam on a CPU with BF16 parameters, one pass over memory: 30 bytes a parameter, 28 with masters in halves.

The bits are those of kernels/adamw.py: three products are rounded together with their sums (`fma`), and no others.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic

from megatrain.kernels.cpu import PARTS, Kernel, bits_of, flat, float_of, line
from megatrain.kernels.update import Update

CHUNK = 2048
"""Number of elements that a thread updates at a time: they stay in its first-level cache."""
exact = numba.njit(error_model="numpy", nogil=True)  # no flag: but LLVM still fuses a product and a sum of one loop


@intrinsic
def fma(_context, a, b, c):
    """a b + c in float32, rounded once."""

    def generate(context, builder, signature, given):
        return builder.fma(*given)

    return types.float32(types.float32, types.float32, types.float32), generate


@exact
def _divide(g, divisor, out):
    for i in range(len(g)):
        out[i] = g[i] / divisor


@exact
def _penalise(w, decay, g):
    for i in range(len(g)):
        g[i] = fma(w[i], decay, g[i])


@exact
def _moments(g, m, v, near, share1, beta2, share2, step_size, root, eps):
    for i in range(len(g)):
        new = g[i]
        first = fma(new - m[i], share1, m[i] if near else new)
        second = fma(new * share2, new, v[i] * beta2)
        m[i], v[i] = first, second
        g[i] = (first * step_size) / (np.sqrt(second) / root + eps)


@exact
def _shrink(w, keep):
    for i in range(len(w)):
        w[i] = w[i] * keep


@exact
def _move(w, delta):  # a separate loop, or LLVM would round the product before it together with this sum
    for i in range(len(w)):
        w[i] = w[i] + delta[i]


@exact
def _round(w, parameters):
    for i in range(len(w)):
        parameters[i] = np.uint16(np.uint32(bits_of(w[i]) + np.uint32(0x8000)) >> np.uint32(16))


@exact
def _join(parameters, low, w):
    for i in range(len(w)):
        w[i] = float_of((np.int32(np.int16(parameters[i])) << 16) + np.int32(low[i]))


@exact
def _split(w, low):
    for i in range(len(w)):
        low[i] = np.int16(bits_of(w[i]))


@Kernel
def _adam(parameters, masters, low, grads, exp_avg, exp_avg_sq, numbers, near, l2):
    divisor, step_size, root, keep, decay, share1, beta2, share2, eps = numbers
    n = len(grads)
    for part in prange(PARTS):
        g, room = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        end = n * (part + 1) // PARTS
        for start in range(n * part // PARTS, end, CHUNK):
            count = min(CHUNK, end - start)
            delta, rounded = line(g, 0, count), line(parameters, start, count)
            w = line(masters, start, count) if len(low) == 0 else line(room, 0, count)
            if len(low) > 0:
                _join(rounded, line(low, start, count), w)
            _divide(line(grads, start, count), divisor, delta)
            if l2:
                _penalise(w, decay, delta)
            _moments(
                delta, line(exp_avg, start, count), line(exp_avg_sq, start, count), near, share1, beta2, share2, step_size, root,
                eps,
            )  # fmt: skip
            _shrink(w, keep)
            _move(w, delta)
            _round(w, rounded)
            if len(low) > 0:
                _split(w, line(low, start, count))


def adam(
    update: Update,
    weight_decay: float,
    parameters: torch.Tensor,
    masters: torch.Tensor | None,
    low: torch.Tensor | None,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    decoupled: bool,
) -> None:
    """`adamw.adam_triton` for BF16 parameters on a CPU."""
    if float(update.skip) > 0:
        return
    beta1, beta2 = update.betas
    near = 1 - beta1 < 0.5
    divisor, _, step_size, root = update.scalars.tolist()
    keep = 1 - update.lr * weight_decay if decoupled else 1.0
    share1 = np.float32(1 - beta1) if near else np.float32(1 - beta1) - np.float32(1)
    numbers = np.array([divisor, step_size, root, keep, weight_decay, share1, beta2, 1 - beta2, update.eps], dtype=np.float32)
    none = torch.empty(0) if masters is None else masters
    halves = torch.empty(0, dtype=torch.int16) if low is None else low
    tensors = (parameters, none, halves, grads, exp_avg, exp_avg_sq)
    _adam(grads.numel(), *(flat(x) for x in tensors), numbers, near, weight_decay != 0 and not decoupled)
