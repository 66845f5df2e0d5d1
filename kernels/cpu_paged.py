"""Attention over paged keys on a CPU (kernels/paged_attention.py): each query's keys are read where they lie, in float32 or BF16.

A query goes over the keys it sees in tiles, group by group: all heads of a group, and neighbouring queries, read a tile while it is in the
cache. Its sums are in the order of its own keys, whatever other queries and blocks there are.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from megatrain.kernels.cpu import PARTS, SPLIT, Kernel, bits_of, clear, flat, float_of, jit, jit_sums, line

TILE = 64
"""Number of keys in a tile."""
HEIGHT = 8
"""Largest number of queries of a sequence that go over the keys together."""
ORDER = np.array([int(f"{part:05b}"[::-1], 2) for part in range(PARTS)])
"""The first of the items of each part, then every `PARTS`th: neighbours are far apart, so that a few items keep several threads busy."""


@intrinsic
def number(_context, x):
    """A float32 as it is, or that of the 16 bits of a BF16."""

    def generate(context, builder, signature, given):
        if signature.args[0] == types.float32:
            return given[0]
        return builder.bitcast(
            builder.shl(builder.zext(given[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), ir.FloatType()
        )

    return types.float32(x), generate


@jit
def _exp(x):
    """e^x of a float32 of at most 0, to 2e-7 of itself; 0 below -87 (Cephes, expf.c)."""
    near = x * np.float32(1.44269504088896341) + np.float32(12582912.0)
    whole = near - np.float32(12582912.0)
    rest = x - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1.0)
    y = y * float_of((bits_of(near) + 127) << 23)
    return y if not x < np.float32(-87.0) else np.float32(0.0)


@jit_sums
def _dot(x, at, keys, a, d):
    """Product of d numbers of x, from `at` on, with those of a key. Unsigned indices: numba would look at each whether it is negative."""
    total = np.float32(0.0)
    for i in range(d):
        j = np.uint64(i)
        total += x[at + j] * number(keys[a + j])
    return total


@jit_sums
def _dots(x, at, keys, a, b, c, e, d):
    """Products with four keys."""
    first = second = third = fourth = np.float32(0.0)
    for i in range(d):
        j = np.uint64(i)
        first += x[at + j] * number(keys[a + j])
        second += x[at + j] * number(keys[b + j])
        third += x[at + j] * number(keys[c + j])
        fourth += x[at + j] * number(keys[e + j])
    return first, second, third, fourth


@jit_sums
def _weights(scores, top, count):
    """Replace scores by e^(score - top); their sum."""
    total = np.float32(0.0)
    for i in range(count):
        scores[i] = _exp(scores[i] - top)
        total += scores[i]
    return total


@jit
def _scale(x, at, factor, d):
    for i in range(d):
        x[at + np.uint64(i)] *= factor


@jit
def _add(out, at, values, a, weight, d):
    for i in range(d):
        j = np.uint64(i)
        out[at + j] += weight * number(values[a + j])


@jit
def _add_four(out, at, values, a, b, c, e, first, second, third, fourth, d):
    for i in range(d):
        j = np.uint64(i)
        out[at + j] += (
            first * number(values[a + j])
            + second * number(values[b + j])
            + (third * number(values[c + j]) + fourth * number(values[e + j]))
        )


@jit
def _scores(q, at, keys, places, begin, scores, count, d):
    """Products of a query with the keys that lie at `places`, from the place numbered `begin` on."""
    for j in range(0, count - 3, 4):
        scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = _dots(
            q, at, keys, places[begin + j], places[begin + j + 1], places[begin + j + 2], places[begin + j + 3], d
        )
    for j in range(count - count % 4, count):
        scores[j] = _dot(q, at, keys, places[begin + j], d)


@jit
def _mix(weights, values, places, begin, out, at, count, d):
    """out += the values that lie at `places` times their weights."""
    for j in range(0, count - 3, 4):
        _add_four(
            out, at, values, places[begin + j], places[begin + j + 1], places[begin + j + 2], places[begin + j + 3], weights[j],
            weights[j + 1], weights[j + 2], weights[j + 3], d,
        )  # fmt: skip
    for j in range(count - count % 4, count):
        _add(out, at, values, places[begin + j], weights[j], d)


@jit
def _tilt(scores, slope, away, count):
    """ALiBi: less for each place between query and key; `away` of the first."""
    for j in range(count):
        scores[j] -= slope * np.float32(abs(away - j))


@jit
def _largest(x, top, count):
    for i in range(count):
        top = max(top, x[i])
    return top


@jit
def _tile(
    q, keys, values, out, first, repeat, d, places, begin, scores, count, slopes, steepest, away, tops, totals, state
):  # fmt: skip
    """`count` keys of a tile, from `begin` on, for the heads of a group, whose queries and results begin at `first`."""
    for number_of in range(repeat):
        at, head = np.uint64(first + number_of * d), state + number_of
        _scores(q, at, keys, places, begin, scores, count, d)
        if len(slopes) > 0:
            _tilt(scores, slopes[steepest + number_of], away, count)
        top = _largest(scores, tops[head], count)
        fade = _exp(tops[head] - top)
        if fade != np.float32(1.0):
            _scale(out, at, fade, d)
        totals[head] = totals[head] * fade + _weights(scores, top, count)
        tops[head] = top
        _mix(scores, values, places, begin, out, at, count, d)


@Kernel
def _attend(q, keys, values, out, blocks, seen, slots, longest, slopes, order, groups, repeat, d, items):
    """blocks: as `blocks_of`; seen: for each query its place, and the first and last (excluded) of the keys it sees, twice."""
    for part in prange(PARTS):
        scores, places = np.empty(TILE, np.float32), np.empty(TILE, np.uint64)
        tops, totals = np.empty(HEIGHT * repeat, np.float32), np.empty(HEIGHT * repeat, np.float32)
        for item in range(order[part], items, PARTS):
            block, group = item // groups, item % groups
            sequence, token, count = blocks[4 * block], blocks[4 * block + 1], blocks[4 * block + 2]
            begin, end = seen[5 * token + 1], 0
            for number_of in range(count):
                clear(line(out, ((token + number_of) * groups + group) * repeat * d, repeat * d))
                begin, end = min(begin, seen[5 * (token + number_of) + 1]), max(end, seen[5 * (token + number_of) + 4])
            for head in range(count * repeat):
                tops[head], totals[head] = np.float32(-3e38), np.float32(0.0)
            for start in range(begin // TILE * TILE, end, TILE):
                for j in range(min(TILE, longest - start)):
                    places[j] = np.uint64((slots[sequence * longest + start + j] * groups + group) * d)
                for number_of in range(count):
                    mine = 5 * (token + number_of)
                    for span in range(2):
                        first, last = max(start, seen[mine + 2 * span + 1]), min(start + TILE, seen[mine + 2 * span + 2])
                        if first < last:
                            _tile(
                                q, keys, values, out, ((token + number_of) * groups + group) * repeat * d, repeat, d, places,
                                first - start, scores, last - first, slopes, group * repeat, seen[mine] - first, tops, totals,
                                number_of * repeat,
                            )  # fmt: skip
            for head in range(count * repeat):
                at = ((token + head // repeat) * groups + group) * repeat * d + head % repeat * d
                _scale(out, np.uint64(at), np.float32(1.0) / totals[head], d)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: torch.Tensor,
    seen: torch.Tensor,
    slots: torch.Tensor,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """q [t, a, d], keys and values [slots, g, d], contiguous -> [t, a d].

    blocks: `blocks_of` with `HEIGHT`; seen: int64 [t, 5], each query's place and the two spans of keys it sees; slots: int64 [n, longest]
    of each sequence's keys; slopes: [a].
    """
    tokens, heads, d = q.shape
    groups = keys.shape[1]
    scaled = (q.float() * d**-0.5).contiguous()
    out = torch.empty(tokens, heads, d)
    biases = flat(torch.empty(0) if slopes is None else slopes.float().contiguous())
    # On several threads always: a loop that is compiled for one thread may round otherwise, and which serves would depend on others.
    _attend(
        SPLIT, flat(scaled), flat(keys), flat(values), flat(out), flat(blocks), flat(seen), flat(slots), slots.shape[1], biases,
        ORDER, groups, heads // groups, d, len(blocks) * groups,
    )  # fmt: skip
    return out.flatten(1).to(q.dtype)
