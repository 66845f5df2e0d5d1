"""Counter-based randomness: each number is a function of (seed, what it is for, its index); there is no state to save or share.

The problem: two layouts of one model must start from the same weights and drop the same activations, although no rank sees
all of them. With a stateful generator a rank would have to draw, and throw away, the numbers of all others. Here it asks for
its own. A logical weight [8, 6] whose rows lie on 4 ranks:

    rank 0: normal(key, (8, 6), (slice(0, 2), slice(0, 6)))     rows 0-1 of what one process would draw
    rank 1: normal(key, (8, 6), (slice(2, 4), slice(0, 6)))     rows 2-3
    ...                                                         nothing is communicated

The generator is lowbias32 (Chris Wellons' search for 32-bit finalisers of low bias, nullprogram.com/blog/2018/07/31), a
bijection `mix` of 32-bit words. Two rounds of it, with one word of the key before each, make a number of a counter:

    number(word; a, b) = mix(mix(word ^ a) ^ b)

and two such numbers make a new key of a key and a word (`_descend`): the way from a key to one per sequence, per position, per
high half of a 64-bit index. Everything is wrapping int32 arithmetic: the same bits on every device, 2-4 ns a number on one CPU
thread in blocks that stay in the cache (int64 generators such as Philox: 13-26 ns). Not for cryptography.

Normals use only operations that IEEE 754 rounds exactly (+ - * / sqrt, in float64), so they too are the same bits everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from megatrain.kernels.attention_dropout import WeightDropout, Words
from megatrain.kernels.dispatch import Kernels, use_triton
from megatrain.kernels.dropout import dropout_triton

_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Numbers made at a time: on a CPU the buffers (256 KiB each) should stay in the second-level cache, yet a torch call's
work be well above the cost of making it (1 microsecond); on a GPU, without Triton, only memory is bounded."""

_SMALL = 1 << 12
"""Elements up to which a dropout mask on a CPU is remembered for its backward, and for ranks of the same process that drop the same:
to make so few numbers is a matter of calls, some 20 of them."""

_WORD = (1 << 32) - 1

_SPLIT = (0x1E3779B9, 0x05EBCA6B)
"""Any two words: they make the second half of a descended key differ from the first."""

Word = int | torch.Tensor
"""A 32-bit word as a signed int, or an int32 tensor of them that broadcasts."""


@dataclass(frozen=True)
class Key:
    """Two 32-bit words (signed, as int32 holds them) that say what a stream of numbers is for."""

    first: int
    second: int


def key(seed: int, *what: str | int) -> Key:
    """The key of `seed` and a purpose, as in key(1234, "dropout", step, layer). Other arguments, an unrelated stream."""
    digest = hashlib.blake2b(json.dumps([seed, *what]).encode("ascii"), digest_size=8).digest()
    return Key(*(int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])))


def bits(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Numbers start .. start + count - 1 of the key's stream: int32 [count], each of the 2^32 values equally likely.

    Number i depends on (key, i) alone; indices are 64-bit and wrap around at 2^64.
    """
    output = torch.empty(count, dtype=torch.int32, device=device)
    counters = torch.arange(min(count, _block(output.device)), dtype=torch.int32, device=device)
    scratch = torch.empty_like(counters)
    done = 0
    while done < count:
        high, low = divmod((start + done) % (1 << 64), 1 << 32)
        size = min(count - done, len(counters), (1 << 32) - low)
        block = torch.add(counters[:size], _signed(low), out=output[done : done + size])
        above = torch.full((1,), _signed(high), dtype=torch.int32, device=device)
        _number(block, scratch[:size], *_descend(above, key.first, key.second))
        done += size
    return output


def normal(
    key: Key, shape: Sequence[int], slices: Sequence[slice] | None = None, *, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The part `slices` (one per dim, step 1; None: all) of the logical tensor `shape` of standard normals, float32.

    An element depends on the key and on its row-major index in the logical tensor, so the parts of any layout fit together to
    the bit. Time and memory are those of the part. Box-Muller (1958) from two 32-bit uniforms; the largest value is 6.76.
    Raises ValueError where `slices` do not fit `shape`.
    """
    rows, columns = _indices(tuple(shape), slices, torch.device(device))
    output = torch.empty(len(rows), len(columns), dtype=torch.float32, device=device)
    block = _block(output.device)
    width = max(1, min(len(columns), block))
    height = max(1, block // width)
    for row in range(0, len(rows), height):
        for column in range(0, len(columns), width):
            index = rows[row : row + height, None] + columns[None, column : column + width]
            words = _descend(index.to(torch.int32), *_descend((index >> 32).to(torch.int32), key.first, key.second))
            output[row : row + height, column : column + width] = _box_muller(*words)
    return output.reshape([_range(n, part)[1] for n, part in zip(shape, _parts(shape, slices), strict=True)])


Places = tuple[range, ...]
"""Positions in a sequence, of one row after the other, as ranges of neighbours."""


def dropout(
    x: torch.Tensor, p: float, key: Key, samples: torch.Tensor, places: Places | None = None, *, kernels: Kernels = "auto"
) -> torch.Tensor:
    """Zero each element of `x` [s, b, h] with probability `p` and scale the others by 1 / (1 - p).

    `places` are the positions of the rows of x in their sequence (None: 0 .. s - 1), and `samples` [b] int64, below 2^32, is the
    place of each sequence in the global batch: an element's fate depends on (key, sample, position, column) and not on how sequences
    are grouped into micro-batches or spread over ranks. The backward makes the mask again; but for the smallest ones it is never
    stored. Triton makes the same bits (kernels/dropout.py); float64 has the reference everywhere.
    Raises ValueError on a probability outside [0, 1) or where `samples` or `places` do not fit `x`.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout={p} is not a probability below 1. Use a value from 0.0 (off) to less than 1, such as 0.1.")
    if x.dim() != 3 or samples.shape != x.shape[1:2]:
        raise ValueError(f"dropout wants x [s, b, h] and samples [b]; got x {list(x.shape)} and samples {list(samples.shape)}")
    places = places or (range(len(x)),)
    if sum(map(len, places)) != len(x):
        raise ValueError(f"dropout wants the place of each row; got {sum(map(len, places))} places for x {list(x.shape)}")
    if p == 0:
        return x
    return _Dropout.apply(x, p, key, samples, places, use_triton(kernels, x.device) and x.dtype != torch.float64)


def attention_dropout(
    p: float, key: Key, samples: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Factors 0, with probability `p`, or 1 / (1 - p) of attention's weights: float32 [n, r, q, k].

    samples [n] and heads [n, r]: whose weights, by place in the global batch and number in the whole model; queries [q], keys [k]:
    their places in the sequence. A weight's fate depends on (key, sample, head, query, key) alone.
    """
    a, c = _descend(samples.to(torch.int32), *_descend_from_zero(key))
    a, c = _descend(heads.to(torch.int32), a[:, None], c[:, None])
    a, c = _descend(queries.to(torch.int32), a[..., None], c[..., None])
    words = keys.to(torch.int32).expand(*a.shape, len(keys)).clone()
    _number(words, torch.empty_like(words), a[..., None], c[..., None])
    return (words >= _threshold(p)).to(torch.float32).mul_(1 / (1 - p))


def weight_dropout(p: float, key: Key, samples: torch.Tensor, first_head: int, triton: bool) -> WeightDropout:
    """`attention_dropout` as attention's kernels take it.

    samples [b] int64: place of each sequence in the global batch; first_head: number in the whole model of the first one here; triton:
    whether its kernels serve.
    """

    def factors(sequences: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return attention_dropout(p, key, samples[sequences], heads + first_head, queries, keys)

    words = Words(_descend_from_zero(key), _SPLIT, _threshold(p), 1 / (1 - p), samples.contiguous(), first_head)
    return WeightDropout(factors, words if triton else None)


class _Dropout(torch.autograd.Function):
    """Dropout is linear and its own transpose: backward is forward on the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, p: float, key: Key, samples: torch.Tensor, places: Places, triton: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(samples)
        ctx.arguments = p, key, places, triton
        if not triton:
            return _drop(x, p, key, samples, places)
        settings = _descend_from_zero(key), _SPLIT, _threshold(p), 1 / (1 - p)
        parts = x.split([len(part) for part in places])
        samples = samples.to(x.device)
        made = [dropout_triton(rows, samples, part.start, *settings) for rows, part in zip(parts, places, strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (samples,) = ctx.saved_tensors
        p, key, places, triton = ctx.arguments
        return _Dropout.apply(gradients[0], p, key, samples, places, triton), None, None, None, None, None


def _drop(x: torch.Tensor, p: float, key: Key, samples: torch.Tensor, places: Places) -> torch.Tensor:
    """Dropout of `x` [s, b, h]."""
    if x.numel() > _SMALL or x.device.type != "cpu":
        return _drop_in_blocks(x, p, key, samples, places)
    return x * _small_mask(p, key, tuple(samples.tolist()), places, x.shape[-1]) * (1 / (1 - p))


@lru_cache(maxsize=1 << 10)
def _small_mask(p: float, key: Key, samples: tuple[int, ...], places: Places, h: int) -> torch.Tensor:
    """Which elements of [s, b, h] stay: bool."""
    ones = torch.ones(sum(map(len, places)), len(samples), h)
    return _drop_in_blocks(ones, p, key, torch.tensor(samples), places) != 0


def _drop_in_blocks(x: torch.Tensor, p: float, key: Key, samples: torch.Tensor, places: Places) -> torch.Tensor:
    """Dropout of `x` [s, b, h], a block of rows at a time. Each row (position, sample) has a key; its counter is the column."""
    s, b, h = x.shape
    a, c = _row_keys(key, samples.to(x.device), places)
    rows = x.reshape(s * b, h)
    output = torch.empty_like(rows)
    height = max(1, min(_block(x.device) // max(h, 1), s * b))
    columns = torch.arange(h, dtype=torch.int32, device=x.device)
    words, scratch = (torch.empty(height, h, dtype=torch.int32, device=x.device) for _ in range(2))
    threshold = _threshold(p)
    for row in range(0, s * b, height):
        part = slice(row, min(row + height, s * b))
        counters = columns.expand(part.stop - row, h)
        block = _number(words[: len(counters)].copy_(counters), scratch[: len(counters)], a[part], c[part])
        keep = torch.ge(block, threshold, out=output[part])  # 1 or 0 in the dtype of x: no mask beside the output
        keep.mul_(rows[part]).mul_(1 / (1 - p))
    return output.view(s, b, h)


def _threshold(p: float) -> int:
    """The word below which p 2^32 of the 2^32 signed words lie, and at least one does not."""
    return min(round(p * (1 << 32)), _WORD) - (1 << 31)


def _row_keys(key: Key, samples: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of (sample, position) for the s positions `places`: two int32 tensors [s * b, 1]."""
    of_sample = _descend(samples.to(torch.int32), *_descend_from_zero(key))
    ranges = [torch.arange(part.start, part.stop, dtype=torch.int32, device=samples.device) for part in places]
    positions = ranges[0] if len(ranges) == 1 else torch.cat(ranges)
    a, c = _descend(positions[:, None], *of_sample)
    return a.view(-1, 1), c.view(-1, 1)


def _descend_from_zero(key: Key) -> tuple[int, int]:
    """`_descend` of the word 0, which is the upper half of any place in a batch, in Python's integers."""
    first, second = _mix_word(_mix_word(key.first) ^ key.second), _mix_word(key.first ^ _SPLIT[0])
    return _signed(first), _signed(_mix_word(second ^ key.second ^ _SPLIT[1]))


def _mix_word(word: int) -> int:
    """lowbias32 of one word, signed or not -> 0 .. 2^32 - 1."""
    word &= _WORD
    word = (word ^ word >> 16) * 0x7FEB352D & _WORD
    word = (word ^ word >> 15) * 0x846CA68B & _WORD
    return word ^ word >> 16


def _mix(words: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """lowbias32 of every word of the int32 tensor `words`, in place; `scratch` is a buffer of the same shape.

    torch shifts int32 arithmetically: the mask clears the copies of the sign bit.
    """
    torch.bitwise_right_shift(words, 16, out=scratch)
    words.bitwise_xor_(scratch.bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    torch.bitwise_right_shift(words, 15, out=scratch)
    words.bitwise_xor_(scratch.bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    torch.bitwise_right_shift(words, 16, out=scratch)
    return words.bitwise_xor_(scratch.bitwise_and_(0xFFFF))


def _number(words: torch.Tensor, scratch: torch.Tensor, a: Word, b: Word) -> torch.Tensor:
    """mix(mix(words ^ a) ^ b), in place; a and b broadcast to `words`, `scratch` has its shape."""
    return _mix(_mix(words.bitwise_xor_(a), scratch).bitwise_xor_(b), scratch)


def _descend(words: torch.Tensor, a: Word, b: Word) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys below key (a, b), one per word: two int32 tensors of the broadcast shape, or 64 random bits a word."""
    wide = words ^ a
    both = torch.stack((wide, wide ^ _SPLIT[0]))  # in one go: for a few numbers, calls are what costs
    scratch = torch.empty_like(both)
    first, second = _mix(both, scratch)
    first.bitwise_xor_(b)
    second.bitwise_xor_(b ^ _SPLIT[1])
    first, second = _mix(both, scratch)
    return first, second


def _box_muller(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Standard normals, float64, of two int32 tensors of random words."""
    uniform, turn = (_fraction(word) for word in (u, v))
    return (-2 * _log(uniform)).sqrt_().mul_(_cos_turn(turn))


def _fraction(words: torch.Tensor) -> torch.Tensor:
    """The middle of each word's 2^-32 wide share of (0, 1): float64, exact."""
    return words.to(torch.float64).add_((1 << 31) + 0.5).mul_(2.0**-32)


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of float64 x > 0 by exactly rounded operations: x = 2^e m, log m = 2 atanh((m - 1) / (m + 1))."""
    m, e = torch.frexp(x)  # m in [1/2, 1)
    low = m < math.sqrt(0.5)
    m = torch.where(low, m * 2, m)
    s = (m - 1) / (m + 1)  # |s| < 0.172
    series = _horner(s * s, lambda k: 1 / (2 * k + 1), 8)
    return (e - low.to(e.dtype)).to(torch.float64).mul_(math.log(2)).add_(series.mul_(s).mul_(2))


def _cos_turn(x: torch.Tensor) -> torch.Tensor:
    """cos(2 pi x) of float64 x in [0, 1] to 1e-11 by exactly rounded operations: 2 sin^2(pi (x - 1/2)) - 1."""
    y = (x - 0.5).mul_(math.pi)
    sine = _horner(y * y, lambda k: (-1) ** k / math.factorial(2 * k + 1), 9).mul_(y)
    return sine.mul_(sine).mul_(2).sub_(1)


def _horner(x: torch.Tensor, coefficient: Callable[[int], float], terms: int) -> torch.Tensor:
    """The polynomial sum of coefficient(k) x^k for k < terms, one rounding per operation (no fused multiply-add)."""
    total = torch.full_like(x, coefficient(terms - 1))
    for k in reversed(range(terms - 1)):
        total.mul_(x).add_(coefficient(k))
    return total


def _indices(shape: tuple[int, ...], slices: Sequence[slice] | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major indices of a part of a tensor, as rows [m] + columns [n] (int64), columns being the last dim."""
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    columns = rows
    stride = math.prod(shape)
    for dim, part in enumerate(_parts(shape, slices)):
        start, length = _range(shape[dim], part)
        stride //= max(shape[dim], 1)
        steps = torch.arange(start, start + length, dtype=torch.int64, device=device) * stride
        if dim == len(shape) - 1:
            columns = steps
        else:
            rows = (rows[:, None] + steps).reshape(-1)
    return rows, columns


def _parts(shape: Sequence[int], slices: Sequence[slice] | None) -> Sequence[slice]:
    """`slices`, or a full slice per dim. Raises ValueError where there is not one per dim."""
    if slices is None:
        return [slice(None)] * len(shape)
    if len(slices) != len(shape):
        raise ValueError(f"{len(slices)} slices for the {len(shape)} dims of shape {tuple(shape)}; give one slice per dim")
    return slices


def _range(length: int, part: slice) -> tuple[int, int]:
    """Start and length of `part` of a dim. Raises ValueError unless its step is 1."""
    start, stop, step = part.indices(length)
    if step != 1:
        raise ValueError(f"{part} has step {step}; a part of a tensor is a slice with step 1")
    return start, max(0, stop - start)


def _block(device: torch.device) -> int:
    """Numbers to make at a time on a device."""
    return _BLOCK["cpu" if device.type == "cpu" else "cuda"]


def _signed(word: int) -> int:
    """A 32-bit word as int32 holds it."""
    return word - (1 << 32) if word >> 31 else word
