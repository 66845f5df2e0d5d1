"""Attention over a paged cache on a GPU (kernels/paged_attention.py): a program for some queries of a sequence, all heads of a group, and
`SPLIT` keys of it where there is one query (flash-decoding), which a second kernel joins; else all keys that they see.

A tile of queries has the group's heads one after the other, each with HEIGHT queries: keys and values are read once for all of them.
Splits and tiles begin at the same keys whatever the sequences beside them are, so that a query's sums keep their order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from megatrain.kernels.dispatch import bound, jit, jit_varying, next_power, tl

TILE = 64
"""Number of keys in a tile."""
SPLIT = 256
"""Number of keys of a program with a single query."""
LARGEST_HEAD = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
"""Largest head dim of each dtype served."""


@jit
def _keys_of(table, places, block, end):
    """Slots of keys at `places` of a sequence whose blocks stand in `table`; int64."""
    here = places < end
    return tl.load(table + places // block, mask=here, other=0).to(tl.int64) * block + places % block


@jit
def _queries_of(blocks, which, SEVERAL: tl.constexpr):
    """The block's sequence, the row of its first query, how many queries it has, and the first one's place before the sequence's end."""
    sequence, token, live, back = which, which, 1, 1
    if SEVERAL:
        sequence, token = tl.load(blocks + 4 * which), tl.load(blocks + 4 * which + 1)
        live, back = tl.load(blocks + 4 * which + 2), tl.load(blocks + 4 * which + 3)
    return sequence, token, live, back


@jit
def _seen(
    away, places, columns, shared, window, size, near, everywhere, PREFIX: tl.constexpr, WINDOW: tl.constexpr,
    SPARSE: tl.constexpr,
):  # fmt: skip
    """Whether queries at `places` see the keys `columns`, as AttentionMask.sees: bool [M, N]."""
    seen = away >= 0
    if PREFIX:
        seen = seen | (columns < shared)[None, :]
    if WINDOW:
        seen = seen & (tl.abs(away) < window)
    if SPARSE:
        close = places[:, None] // size - (columns // size)[None, :] < near
        seen = seen & (close | (columns < everywhere)[None, :])
    return seen


@jit_varying("table_s", "tokens", "window", "near", "everywhere")
def _attend_kernel(
    q, k, v, y, tops, totals, table, lengths, blocks, prefix, slopes, bits, groups, repeat, block, table_s, tokens,
    q_t, q_h, k_s, k_g, v_s, v_g, window, size, near, everywhere,
    SEVERAL: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr, SPARSE: tl.constexpr, SLOPES: tl.constexpr,
    PARTIAL: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, HEIGHT: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    which, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token, live, back = _queries_of(blocks, which, SEVERAL)
    length = tl.load(lengths + sequence).to(tl.int32)
    rows, dims = tl.arange(0, M), tl.arange(0, DIMS)
    number, mine = rows % HEIGHT, (rows // HEIGHT < repeat) & (rows % HEIGHT < live)
    line, head = (token + number).to(tl.int64), group * repeat + rows // HEIGHT
    first, shared = length - back, 0
    places, limit = first + number, first + live
    if PREFIX:
        shared = tl.load(prefix + sequence).to(tl.int32)
        limit = tl.minimum(length, tl.maximum(limit, shared))
    inside = mine[:, None] & (dims < D)[None, :]
    query = tl.load(q + (line * q_t + head * q_h)[:, None] + dims[None, :], mask=inside, other=0.0)
    begin, end = split * KEYS, limit
    if PARTIAL:
        end = tl.minimum(limit, begin + KEYS)
    if WINDOW:
        begin = tl.maximum(begin, (first - window + 1) // N * N)
    table, k, v = table + sequence.to(tl.int64) * table_s, k + group.to(tl.int64) * k_g, v + group.to(tl.int64) * v_g
    top, total, steep = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, DIMS], tl.float32)
    if SLOPES:
        steep = tl.load(slopes + head, mask=mine, other=0.0) * 1.4426950408889634
    for at in range(bound(begin), bound(end), N):
        columns = at + tl.arange(0, N)
        slots = _keys_of(table, columns, block, end)
        there = (columns < end)[:, None] & (dims < D)[None, :]
        key = tl.load(k + slots[:, None] * k_s + dims[None, :], mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * bits
        away = places[:, None] - columns[None, :]
        seen = _seen(away, places, columns, shared, window, size, near, everywhere, PREFIX, WINDOW, SPARSE)
        if SLOPES:
            scores -= steep[:, None] * tl.abs(away).to(tl.float32)
        scores = tl.where(seen & (columns < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen no key yet
        p, fade = tl.exp2(scores - level[:, None]), tl.exp2(top - level)
        value = tl.load(v + slots[:, None] * v_s + dims[None, :], mask=there, other=0.0)
        out = out * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = higher
    at_head = line * (groups * repeat) + head
    if PARTIAL:
        at_head += split.to(tl.int64) * tokens * groups * repeat
        mine, inside = mine & (split * KEYS < limit), inside & (split * KEYS < limit)
        tl.store(tops + at_head, top, mask=mine)
        tl.store(totals + at_head, total, mask=mine)
    else:
        out = out / tl.where(mine, total, 1.0)[:, None]
    tl.store(y + at_head[:, None] * D + dims[None, :], out.to(y.dtype.element_ty), mask=inside)


@jit_varying("tokens")
def _join_kernel(sums, tops, totals, y, lengths, heads, tokens, KEYS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, DIMS)
    count = tl.cdiv(tl.load(lengths + token).to(tl.int32), KEYS)
    at = token * heads + head
    highest, total, out = float("-inf"), 0.0, tl.zeros([DIMS], tl.float32)
    for split in range(0, bound(count)):
        highest = tl.maximum(highest, tl.load(tops + at + split * tokens * heads))
    for split in range(0, bound(count)):
        here = at + split * tokens * heads
        factor = tl.exp2(tl.load(tops + here) - highest)
        total += factor * tl.load(totals + here)
        out += factor * tl.load(sums + here * D + dims, mask=dims < D, other=0.0)
    tl.store(y + at * D + dims, (out / total).to(y.dtype.element_ty), mask=dims < D)


def takes(dtype: torch.dtype, d: int) -> bool:
    """Whether the kernels support queries of this dtype and head dim."""
    return d <= LARGEST_HEAD.get(dtype, 0)


def blocks_of(counts: tuple[int, ...], height: int) -> np.ndarray:
    """Blocks of at most `height` queries of sequences with `counts` queries each: int32 [blocks, 4].

    The sequence, the first query's row, the number of queries, and how far the first one's place is before the sequence's end.
    """
    queries = np.asarray(counts)
    each = -(-queries // height)
    sequences = np.arange(len(queries)).repeat(each)
    within = (np.arange(len(sequences)) - (each.cumsum() - each)[sequences]) * height
    left = queries[sequences] - within
    rows = (queries.cumsum() - queries)[sequences] + within
    return np.stack([sequences, rows, np.minimum(height, left), left], 1).astype(np.int32)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    block: int,
    blocks: torch.Tensor | None,
    height: int,
    prefix: torch.Tensor | None,
    window: int | None,
    sparse: tuple[int, int, int] | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """As `paged_attention`; blocks: those of `blocks_of` with `height`, None for a single query of each sequence."""
    q = q if q.stride(2) == 1 else q.contiguous()
    (tokens, heads, d), groups = q.shape, keys.shape[1]
    y = torch.empty(tokens, heads, d, dtype=q.dtype, device=q.device)
    splits = 1 if blocks is not None else -(-table.shape[1] * block // SPLIT)
    sums, tops, totals = y, y, y
    if splits > 1:
        sums = torch.empty(splits, tokens, heads, d, dtype=torch.float32, device=q.device)
        tops, totals = torch.empty(2, splits, tokens, heads, dtype=torch.float32, device=q.device)
    repeat = heads // groups
    size, local, everywhere = sparse or (1, 0, 0)
    _attend_kernel[(tokens if blocks is None else len(blocks), groups, splits)](
        q, keys, values, sums, tops, totals, table, lengths, lengths if blocks is None else blocks,
        lengths if prefix is None else prefix, lengths if slopes is None else slopes, d**-0.5 * math.log2(math.e), groups, repeat,
        block, table.stride(0), tokens, *q.stride()[:2], *keys.stride()[:2], *values.stride()[:2], window or 0, size, local,
        everywhere * size, SEVERAL=blocks is not None, PREFIX=prefix is not None, WINDOW=window is not None,
        SPARSE=sparse is not None, SLOPES=slopes is not None, PARTIAL=splits > 1, KEYS=SPLIT, **tiles(d, repeat, height, q.dtype),
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(tokens, heads)](
            sums, tops, totals, y, lengths, heads, tokens, KEYS=SPLIT, D=d, DIMS=max(16, next_power(d)), num_warps=1
        )  # fmt: skip
    return y.flatten(1)


def tiles(d: int, repeat: int, height: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile settings: `height` queries of each of a group's `repeat` heads."""
    rows, narrow = max(16, next_power(repeat) * height), dtype.itemsize == 2
    return {
        "D": d,
        "DIMS": max(16, next_power(d)),
        "HEIGHT": height,
        "M": rows,
        "N": TILE if narrow else TILE // 4,
        "num_warps": 8 if rows * d > 64 * 64 or not narrow else 4,
        "num_stages": 2 if narrow else 1,
    }


def height_of(repeat: int, dtype: torch.dtype) -> int:
    """Number of queries of a head in a tile of several queries; float32 sums of products in float32 need the more registers."""
    return max(1, (64 if dtype.itemsize == 2 else 16) // next_power(repeat))
