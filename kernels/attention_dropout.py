"""Attention whose weights are dropped by a token's place, in one Triton kernel forward and two backward: no square is in memory.

    y_i = sum_j w_ij P_ij v_j        P = softmax(q k^T / sqrt(d)), masked; w_ij = 0 with probability p, else 1 / (1 - p)

A weight's fate is a word of (key, sample, head, query, key's place), `parallel/rng.py`'s. A row's two words are made once a tile,
after which a weight costs one word, some 30 instructions in registers with its mask. Tiles as in FlashAttention-2 (arXiv:2307.08691):

    forward     a program takes a tile of queries through its keys with an online softmax, and saves each query's log-sum-exp
    queries     the same loop computes dq, with D = y dy for each query, which is the sum of P dP over its keys with dropout too
    keys        a program takes a tile of keys through the queries that see it, in all heads that share it, for dk and dv: no atomics

Sums are float32, scores are not rounded. Windows, documents and prefixes are looked at within a tile, and tiles that they leave empty at
either end of a row or column are not visited. Other attention (ALiBi, block-sparse masks, float32) is computed by blocks of
queries (`attention.py`), whose weights, in memory, are multiplied by `drop_weights`, which makes the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.kernels.dispatch import bound, jit, jit_varying, next_power, tl
from megatrain.kernels.dropout import descend, number

LARGEST_HEAD = 128
"""Largest head dim d: tiles of a larger one do not fit the registers."""
DTYPES = (torch.bfloat16, torch.float16)
QUERIES, KEYS = 64, 64
"""Rows and columns of a tile."""
COLUMNS = 1024
"""Largest number of weights of a row that a Triton program of `drop_weights` takes."""

Factors = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(sequence indices [n], head indices [n, r], positions of queries [q] and of keys [k]) -> factors of the weights [n, r, q, k], each 0 or
1 / (1 - p)."""


@dataclass(frozen=True)
class Words:
    """Random key and dropout rate from which kernels make the factors (`parallel/rng.py`)."""

    key: tuple[int, int]
    """The two words, as signed int32, of the key from which the samples' keys are derived."""
    split: tuple[int, int]
    """The two constants that are XORed into a key to derive the second word of the next (`dropout.descend`)."""
    threshold: int
    """Threshold as signed int32: weights whose word is below it are dropped."""
    scale: float
    """Factor of the weights that are kept, 1 / (1 - p)."""
    samples: torch.Tensor
    """[b] int64 index of each sequence in the global batch."""
    first_head: int
    """Index of this rank's first head among the model's heads."""

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Runtime arguments of the kernels, in their order."""
        return (self.samples, self.first_head, *self.key, self.threshold, self.scale)

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        return {"SPLIT_FIRST": self.split[0], "SPLIT_SECOND": self.split[1]}


@dataclass(frozen=True)
class WeightDropout:
    """Dropout of attention's weights: `factors` in plain PyTorch, `words` for Triton's kernels."""

    factors: Factors
    words: Words | None = None


# --- weights in memory ----------------------------------------------------------------------------------------------------


@jit_varying("first_group", "first_query", "first_key", "second_key", "first_head", "key_first", "key_second", "threshold")
def _weights_kernel(
    x, y, samples, first_head, key_first, key_second, threshold, scale, first_group, groups, heads, queries, first_query,
    columns, near, first_key, second_key, SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = first_group + row // (heads * queries)
    head = first_head + group % groups * heads + row // queries % heads
    sample = tl.load(samples + group // groups).to(tl.uint32)
    a, c = descend(sample, key_first.to(tl.uint32), key_second.to(tl.uint32), SPLIT_FIRST, SPLIT_SECOND)
    a, c = descend(head.to(tl.uint32), a, c, SPLIT_FIRST, SPLIT_SECOND)
    a, c = descend((first_query + row % queries).to(tl.uint32), a, c, SPLIT_FIRST, SPLIT_SECOND)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.where(column < near, first_key + column, second_key + column - near)
    word = number(place.to(tl.uint32), a, c).to(tl.int32, bitcast=True)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    weight = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.where(word >= threshold, scale, 0.0)
    tl.store(y + at, (weight * factor).to(y.dtype.element_ty), mask=inside)


def drop_weights(
    x: torch.Tensor, words: Words, first_group: int, groups: int, heads: int, first_query: int, spans: list[slice]
) -> torch.Tensor:
    """Weights [n, heads q, k] of groups first_group .. first_group + n - 1, out of all b g, times their factors.

    groups: number of groups of a sequence; heads: query heads of a group; first_query: position of the first query; spans: one or two
    ranges of positions of the keys.
    """
    y = torch.empty_like(x)
    n, rows, columns = x.shape
    if y.numel() > 0:
        first, second = spans[0], spans[-1]
        block = min(COLUMNS, next_power(columns))
        _weights_kernel[(n * rows, -(-columns // block))](
            x, y, *words.numbers, first_group, groups, heads, rows // heads, first_query, columns, first.stop - first.start,
            first.start, second.start, **words.constants, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return y


# --- tiles ----------------------------------------------------------------------------------------------------------------


@jit
def _tile(x, rows, stride, dims, s, D: tl.constexpr):
    """Load rows of one head, 0 outside it: [rows, dims]."""
    inside = (rows < s)[:, None] & (dims < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=inside, other=0.0)


@jit
def _put(x, values, rows, stride, dims, s, D: tl.constexpr):
    inside = (rows < s)[:, None] & (dims < D)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * stride + dims[None, :], values.to(x.dtype.element_ty), mask=inside)


@jit
def _head_key(samples, sequence, head, key_first, key_second, SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr):
    sample = tl.load(samples + sequence).to(tl.uint32)
    a, c = descend(sample, key_first.to(tl.uint32), key_second.to(tl.uint32), SPLIT_FIRST, SPLIT_SECOND)
    return descend(head.to(tl.uint32), a, c, SPLIT_FIRST, SPLIT_SECOND)


@jit
def _of(x, rows, stride, s):
    """Load the integer x holds for each row's token (document or prefix), -1 beyond the sequence: [rows]."""
    return tl.load(x + rows.to(tl.int64) * stride, mask=rows < s, other=-1).to(tl.int32)


@jit
def _before(documents, stride, which, s, BLOCK: tl.constexpr):
    """First position of document `which`: the number of tokens of earlier documents, since documents are numbered in order."""
    count = tl.zeros([BLOCK], tl.int32)
    for at in range(0, bound(s), BLOCK):
        rows = at + tl.arange(0, BLOCK)
        count += ((_of(documents, rows, stride, s) < which) & (rows < s)).to(tl.int32)
    return tl.sum(count, 0)


@jit
def _seen(rows, columns, limits, mine, theirs, window, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """Mask of seen keys, as `AttentionMask.sees`. rows, limits, mine: queries' positions, prefixes, documents; columns, theirs: keys'."""
    seen = columns <= rows
    if PREFIX:
        seen = seen | (columns < limits)
    if WINDOW:
        seen = seen & (rows - columns < window) & (columns - rows < window)
    if DOCUMENTS:
        seen = seen & (mine == theirs)
    return seen


@jit
def _keys_met(
    start, limits, documents, stride, window, s,
    PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(first, stop) of the keys that queries start .. start + M - 1 may see; first begins a tile. limits: the queries' prefixes."""
    first, last = 0, tl.minimum(start + M, s)
    if PREFIX:
        last = tl.minimum(tl.maximum(last, tl.max(limits, 0)), s)
    if WINDOW:
        first = tl.maximum(start - window + 1, 0)
    if DOCUMENTS:
        first = tl.maximum(
            first, _before(documents, stride, tl.load(documents + start.to(tl.int64) * stride).to(tl.int32), s, 256)
        )
    return first // N * N, last


@jit
def _queries_met(
    start, limits, l_s, documents, d_s, window, s,
    PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(first, stop) of the queries that may see keys start .. start + N - 1; first begins a tile."""
    first, last = start, s
    if PREFIX:
        furthest = tl.zeros([256], tl.int32)
        for at in range(0, bound(start), 256):
            furthest = tl.maximum(furthest, _of(limits, at + tl.arange(0, 256), l_s, s))
        first = tl.where(tl.max(furthest, 0) > start, 0, first)
    if WINDOW:
        first = tl.maximum(first, start - window + 1)
        last = tl.minimum(last, start + N - 1 + window)
    if DOCUMENTS:
        here = tl.load(documents + start.to(tl.int64) * d_s).to(tl.int32)
        first = tl.maximum(first, _before(documents, d_s, here, s, 256))
        latest = tl.load(documents + tl.minimum(start + N, s).to(tl.int64) * d_s - d_s).to(tl.int32)
        last = tl.minimum(last, _before(documents, d_s, latest + 1, s, 256))
    return first // M * M, last


@jit_varying("first_head", "key_first", "key_second", "threshold", "window")
def _forward_kernel(
    q, k, v, y, lse, samples, first_head, key_first, key_second, threshold, scale, s, heads, repeat, bits,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, y_s, y_b,
    limits, l_s, l_b, documents, d_s, d_b, window,
    SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, DIMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(s, M)
    which, start = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * M  # the tiles with the most keys first
    sequence, head = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    rows, dims = start + tl.arange(0, M), tl.arange(0, DIMS)
    k += sequence * k_b + head // repeat * k_h
    v += sequence * v_b + head // repeat * v_h
    query = _tile(q + sequence * q_b + head * q_h, rows, q_s, dims, s, D)
    a, c = _head_key(samples, sequence, first_head + head, key_first, key_second, SPLIT_FIRST, SPLIT_SECOND)
    a, c = descend(rows.to(tl.uint32), a, c, SPLIT_FIRST, SPLIT_SECOND)
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, DIMS], tl.float32)
    limits += sequence * l_b
    documents += sequence * d_b
    limit, mine, theirs = rows, rows, rows
    if PREFIX:
        limit = _of(limits, rows, l_s, s)
    if DOCUMENTS:
        mine = _of(documents, rows, d_s, s)
    begin, end = _keys_met(start, limit, documents, d_s, window, s, PREFIX, DOCUMENTS, WINDOW, M, N)
    for at in range(bound(begin), bound(end), N):
        columns = at + tl.arange(0, N)
        if DOCUMENTS:
            theirs = _of(documents, columns, d_s, s)
        seen = _seen(
            rows[:, None], columns[None, :], limit[:, None], mine[:, None], theirs[None, :], window, PREFIX, DOCUMENTS, WINDOW
        )
        key = _tile(k, columns, k_s, dims, s, D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * bits
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen no key yet
        p, fade = tl.exp2(scores - level[:, None]), tl.exp2(top - level)
        word = number(columns.to(tl.uint32)[None, :], a[:, None], c[:, None]).to(tl.int32, bitcast=True)
        kept = tl.where(word >= threshold, p * scale, 0.0)
        value = _tile(v, columns, v_s, dims, s, D)
        out = out * fade[:, None] + tl.dot(kept.to(value.dtype), value, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = higher
    _put(y + sequence * y_b + head * D, out / total[:, None], rows, y_s, dims, s, D)
    tl.store(lse + which.to(tl.int64) * s + rows, top + tl.log2(total), mask=rows < s)


@jit_varying("first_head", "key_first", "key_second", "threshold", "window")
def _queries_kernel(
    q, k, v, y, dy, dq, lse, delta, samples, first_head, key_first, key_second, threshold, scale, s, heads, repeat, bits, root,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, y_s, y_b,
    limits, l_s, l_b, documents, d_s, d_b, window,
    SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, DIMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(s, M)
    which, start = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * M
    sequence, head = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    rows, dims = start + tl.arange(0, M), tl.arange(0, DIMS)
    k += sequence * k_b + head // repeat * k_h
    v += sequence * v_b + head // repeat * v_h
    of_head = sequence * y_b + head * D
    query = _tile(q + sequence * q_b + head * q_h, rows, q_s, dims, s, D)
    grad = _tile(dy + of_head, rows, y_s, dims, s, D)
    sums = tl.sum(_tile(y + of_head, rows, y_s, dims, s, D).to(tl.float32) * grad.to(tl.float32), 1)
    saved = which.to(tl.int64) * s + rows
    tl.store(delta + saved, sums, mask=rows < s)
    level = tl.load(lse + saved, mask=rows < s, other=float("inf"))
    a, c = _head_key(samples, sequence, first_head + head, key_first, key_second, SPLIT_FIRST, SPLIT_SECOND)
    a, c = descend(rows.to(tl.uint32), a, c, SPLIT_FIRST, SPLIT_SECOND)
    out = tl.zeros([M, DIMS], tl.float32)
    limits += sequence * l_b
    documents += sequence * d_b
    limit, mine, theirs = rows, rows, rows
    if PREFIX:
        limit = _of(limits, rows, l_s, s)
    if DOCUMENTS:
        mine = _of(documents, rows, d_s, s)
    begin, end = _keys_met(start, limit, documents, d_s, window, s, PREFIX, DOCUMENTS, WINDOW, M, N)
    for at in range(bound(begin), bound(end), N):
        columns = at + tl.arange(0, N)
        if DOCUMENTS:
            theirs = _of(documents, columns, d_s, s)
        seen = _seen(
            rows[:, None], columns[None, :], limit[:, None], mine[:, None], theirs[None, :], window, PREFIX, DOCUMENTS, WINDOW
        )
        key = _tile(k, columns, k_s, dims, s, D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * bits
        p = tl.where(seen, tl.exp2(scores - level[:, None]), 0.0)
        value = _tile(v, columns, v_s, dims, s, D)
        dp = tl.dot(grad, tl.trans(value), input_precision="ieee")
        word = number(columns.to(tl.uint32)[None, :], a[:, None], c[:, None]).to(tl.int32, bitcast=True)
        ds = p * (tl.where(word >= threshold, dp * scale, 0.0) - sums[:, None])
        out += tl.dot(ds.to(key.dtype), key, input_precision="ieee")
    _put(dq + of_head, out * root, rows, y_s, dims, s, D)


@jit_varying("first_head", "key_first", "key_second", "threshold", "window")
def _keys_kernel(
    q, k, v, dy, dk, dv, lse, delta, samples, first_head, key_first, key_second, threshold, scale, s, groups, repeat, bits, root,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, y_s, y_b, g_s, g_b,
    limits, l_s, l_b, documents, d_s, d_b, window,
    SPLIT_FIRST: tl.constexpr, SPLIT_SECOND: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, DIMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(s, N)
    which, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * N  # the tiles with the most queries first
    sequence, group = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    columns, dims = start + tl.arange(0, N), tl.arange(0, DIMS)
    key = _tile(k + sequence * k_b + group * k_h, columns, k_s, dims, s, D)
    value = _tile(v + sequence * v_b + group * v_h, columns, v_s, dims, s, D)
    dkey, dvalue = tl.zeros([N, DIMS], tl.float32), tl.zeros([N, DIMS], tl.float32)
    limits += sequence * l_b
    documents += sequence * d_b
    theirs = columns
    if DOCUMENTS:
        theirs = _of(documents, columns, d_s, s)
    begin, end = _queries_met(start, limits, l_s, documents, d_s, window, s, PREFIX, DOCUMENTS, WINDOW, M, N)
    for number_of_head in range(0, bound(repeat)):
        head = group * repeat + number_of_head
        saved = (sequence * groups * repeat + head) * s
        first, second = _head_key(samples, sequence, first_head + head, key_first, key_second, SPLIT_FIRST, SPLIT_SECOND)
        for at in range(bound(begin), bound(end), M):
            rows = at + tl.arange(0, M)
            limit, mine = rows, rows
            if PREFIX:
                limit = _of(limits, rows, l_s, s)
            if DOCUMENTS:
                mine = _of(documents, rows, d_s, s)
            seen = _seen(
                rows[None, :],
                columns[:, None],
                limit[None, :],
                mine[None, :],
                theirs[:, None],
                window,
                PREFIX,
                DOCUMENTS,
                WINDOW,
            )
            query = _tile(q + sequence * q_b + head * q_h, rows, q_s, dims, s, D)
            level = tl.load(lse + saved + rows, mask=rows < s, other=float("inf"))
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * bits
            p = tl.where(seen, tl.exp2(scores - level[None, :]), 0.0)
            a, c = descend(rows.to(tl.uint32), first, second, SPLIT_FIRST, SPLIT_SECOND)
            word = number(columns.to(tl.uint32)[:, None], a[None, :], c[None, :]).to(tl.int32, bitcast=True)
            factor = tl.where(word >= threshold, scale, 0.0)
            grad = _tile(dy + sequence * y_b + head * D, rows, y_s, dims, s, D)
            dvalue += tl.dot((p * factor).to(grad.dtype), grad, input_precision="ieee")
            dp = tl.dot(value, tl.trans(grad), input_precision="ieee") * factor
            sums = tl.load(delta + saved + rows, mask=rows < s, other=0.0)
            ds = p * (dp - sums[None, :])
            dkey += tl.dot(ds.to(query.dtype), query, input_precision="ieee")
    at_group = sequence * g_b + group * D
    _put(dk + at_group, dkey * root, columns, g_s, dims, s, D)
    _put(dv + at_group, dvalue, columns, g_s, dims, s, D)


# --- autograd -------------------------------------------------------------------------------------------------------------


def fits(q: torch.Tensor, k: torch.Tensor, mask: AttentionMask) -> bool:
    """Whether the tiled kernels support this attention: q [s, b, a, d], k [n, b, g, d]."""
    return len(q) == len(k) and q.shape[-1] <= LARGEST_HEAD and q.dtype in DTYPES and mask.causal and mask.sparse is None


def tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words: Words, mask: AttentionMask = CAUSAL) -> torch.Tensor:
    """Attention with dropout: q [s, b, a, d], k and v [s, b, g, d], g dividing a, d at most 128 -> [s, b, a d]."""
    return _Tiled.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)), words, mask).flatten(2)


class _Tiled(torch.autograd.Function):
    """q [s, b, a, d], k and v [s, b, g, d] -> [s, b, a, d]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words: Words, mask: AttentionMask) -> torch.Tensor:
        s, b, heads, d = q.shape
        y, lse = q.new_empty(q.shape), torch.empty(b * heads, s, dtype=torch.float32, device=q.device)
        masked, kinds = _masked(mask, words, s)
        if y.numel() > 0:
            _forward_kernel[(-(-s // QUERIES) * b * heads,)](
                q, k, v, y, lse, *words.numbers, s, heads, heads // k.shape[2], d**-0.5 * math.log2(math.e),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:2], *masked, **words.constants, **kinds, **_tiles(d),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.words, ctx.mask = words, mask
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        q, k, v, y, lse = ctx.saved_tensors
        words, (s, b, heads, d), groups = ctx.words, q.shape, k.shape[2]
        masked, kinds = _masked(ctx.mask, words, s)
        dq, dk, dv, delta = torch.empty_like(y), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
        dy = dy.contiguous()
        if dq.numel() > 0:
            lie = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:2])
            sizes = heads // groups, d**-0.5 * math.log2(math.e), d**-0.5
            _queries_kernel[(-(-s // QUERIES) * b * heads,)](
                q, k, v, y, dy, dq, lse, delta, *words.numbers, s, heads, *sizes, *lie, *masked,
                **words.constants, **kinds, **_tiles(d),
            )  # fmt: skip
            _keys_kernel[(-(-s // KEYS) * b * groups,)](
                q, k, v, dy, dk, dv, lse, delta, *words.numbers, s, groups, *sizes, *lie, *dk.stride()[:2], *masked,
                **words.constants, **kinds, **_tiles(d, QUERIES if _few(d) else QUERIES // 2),
            )  # fmt: skip
        return dq, dk, dv, None, None


def _masked(mask: AttentionMask, words: Words, s: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A mask as arguments of the kernels: tensors, each with its strides of tokens and sequences, and flags for those present.

    A window is cut to the sequence's length: the kernels add it to positions, in 32 bits.
    """
    absent = (words.samples, 0, 0)  # a valid address, never read
    prefix, documents = mask.prefix, mask.documents
    limits = absent if prefix is None else (prefix, *((0, *prefix.stride()) if prefix.dim() == 1 else prefix.stride()))
    numbers = absent if documents is None else (documents, *documents.stride())
    kinds = {"PREFIX": prefix is not None, "DOCUMENTS": documents is not None, "WINDOW": mask.window is not None}
    return (*limits, *numbers, min(mask.window or 0, s)), kinds


def _tiles(d: int, queries: int = QUERIES) -> dict[str, Any]:
    """Tile settings of the kernels. queries: rows of a tile; fewer leave the keys' backward registers for its sums."""
    return {"D": d, "DIMS": max(16, next_power(d)), "M": queries, "N": KEYS, "num_warps": 4 if _few(d) else 8, "num_stages": 2}


def _few(d: int) -> bool:
    """Whether a head dim needs few registers: elements that are not loaded as vectors need an address each."""
    return d <= 64 and d % 8 == 0
