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
"""Candidate numbers of columns a program takes; the one with the fewest idle lanes at a row's end is used."""
EACH_WARP = 512
"""Columns of a block for each warp: 16 for each thread, so that computing the row's key is a seventh of its work."""


@jit
def _mix(x):
    """Hash of a uint32: lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def number(word, a, c):
    """Random word of counter `word` under key (a, c), all uint32."""
    return _mix(_mix(word ^ a) ^ c)


@jit
def descend(word, a, c, SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr):
    """Key (two uint32) derived from key (a, c) for `word`: a sample, a head or a position."""
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
    # In the reference's order, so that NaN and infinity are not hidden by a dropped element.
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

    samples [b] int64, first: as in `rng.dropout`. key: the two words, as signed int32, from which the samples' keys are derived; split:
    the two constants of `descend`; threshold: elements whose signed word is below it are dropped; scale: factor of the others.
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
