"""Dropout whose mask is made in registers: a number is read and one is written, and no mask, word or counter is ever in memory.

The generator, and the reference, are `parallel/rng.py`'s: an element's fate is a word of (key, sample, position, column). Torch makes that
word in some twenty passes over int32 tensors, 240 bytes an element; one program here makes the two words of its row's key, then a word a
column, about 25 integer operations, while 4 bytes go by (16-bit numbers; the backward is the same).

    row r of x [s, b, h]:   sample = samples[r % b], position = first + r / b
    key --sample--> two words --position--> two words (a, c)        y = x / (1 - p) where mix(mix(column ^ a) ^ c) >= threshold, else 0
"""

from __future__ import annotations

import torch

from megatrain.kernels.dispatch import jit, jit_varying, tl

BLOCKS = (2048, 1024, 512, 256)
"""Columns that a program takes: of these the number that leaves the fewest lanes idle behind the end of a row."""
EACH_WARP = 512
"""Of a block: 16 for each thread, so that what a row's key costs each of them is a seventh of the work."""


@jit
def _mix(x):
    """lowbias32 of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def number(word, a, c):
    """The number of a counter under a key of two words, all uint32."""
    return _mix(_mix(word ^ a) ^ c)


@jit
def descend(word, a, c, SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr):
    """The key below a key, of a word."""
    return number(word, a, c), number(word, a ^ SPLIT_FIRST, c ^ SPLIT_SECOND)


@jit_varying("first", "key_first", "key_second", "threshold")
def _dropout_kernel(
    x, y, samples, first, batch, columns, key_first, key_second, threshold, scale, SPLIT_FIRST: tl.constexpr,
    SPLIT_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample = tl.load(samples + row % batch).to(tl.uint32)
    position = (first + row // batch).to(tl.uint32)
    a, c = key_first.to(tl.uint32), key_second.to(tl.uint32)
    a, c = descend(sample, a, c, SPLIT_FIRST, SPLIT_SECOND)
    a, c = descend(position, a, c, SPLIT_FIRST, SPLIT_SECOND)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    word = number(column.to(tl.uint32), a, c).to(tl.int32, bitcast=True)
    stays = (word >= threshold).to(tl.float32)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # In this order, as the reference: what is not finite is not hidden by a mask.
    tl.store(y + at, (value * stays * scale).to(y.dtype.element_ty), mask=inside)


def dropout_triton(
    x: torch.Tensor,
    samples: torch.Tensor,
    first: int,
    key: tuple[int, int],
    split: tuple[int, int],
    threshold: int,
    scale: float,
) -> torch.Tensor:
    """Dropout of x [s, b, h], of any dtype but float64.

    samples [b] int64, first: as in `rng.dropout`. key, split: two words each, signed, of the key below which samples lie and of how the
    second word of a key is told from the first; threshold: signed words below it drop; scale: what the others are multiplied by.
    """
    s, b, h = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block = min(BLOCKS, key=lambda block: -(-h // block) * block)
    _dropout_kernel[(s * b, -(-h // block))](
        x.contiguous(), y, samples.contiguous(), first, b, h, *key, threshold, scale,
        SPLIT_FIRST=split[0], SPLIT_SECOND=split[1], BLOCK=block, num_warps=max(1, block // EACH_WARP),
    )  # fmt: skip
    return y
