"""Causal attention on CPU, a block of queries at a time: matrix products over exactly the keys that a block may see.

    keys ->   0   1   2   3        block i of the queries meets keys 0 .. end of block i, in one batched product for all heads;
    block 0   x                    only the last piece, on the diagonal, needs a mask. Work and scratch memory: about half of
    block 1   x   x                the square, and never the whole square at once.
    block 2   x   x   x
    block 3   x   x   x   x        backward: the block's probabilities are computed again (FlashAttention, arXiv:2205.14135)

torch's fused CPU kernel spends most of its time outside matrix products; this one takes 0.5x (BF16) and 0.9x (float32) of its
time at [512, 4, 8, 64]. Scores are rounded to the inputs' dtype, as in Megatron's unfused core; the softmax is at least float32.
On other devices, and where queries continue a cache, torch's fused attention serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

BLOCK = 128
"""Queries in a block."""
SCRATCH = 1 << 21
"""Largest number of scores at a time, so that they stay in a CPU's last cache."""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: q [s, b, a, d], k and v [n, b, g, d], g dividing a, -> [s, b, a d].

    Head i of q uses head i // (a/g) of k and v. Causal: the queries are the last s of the n tokens, and see none after themselves.
    """
    if q.device.type == "cpu" and causal and q.shape[0] == k.shape[0]:
        return _BlockAttention.apply(q, k, v).flatten(2)
    return _fused(q, k, v, causal)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """torch's kernel, which wants [b, heads, s, d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if causal and 1 < queries < keys:  # a prompt continued from a cache: the triangle is not square
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    y = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and queries == keys, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.permute(2, 0, 1, 3).flatten(2)


class _BlockAttention(torch.autograd.Function):
    """q [s, b, a, d], k and v [s, b, g, d] -> [s, b, a, d]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, output)
        queries, target = _grouped(q, k.shape[2]), _grouped(output, k.shape[2])
        keys, values = _grouped(k, k.shape[2]), _grouped(v, k.shape[2])
        for part, start, end in _blocks(queries):
            rows = _rows(queries, part, start, end)
            p = _probabilities(rows, _rows(keys, part, 0, end), start)
            target[part, :, start:end] = torch.bmm(p.to(q.dtype), _rows(values, part, 0, end)).unflatten(1, (-1, end - start))
        return output

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        q, k, v, output = ctx.saved_tensors
        groups, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
        queries, keys, values, dout = (_grouped(x, groups) for x in (q, k, v, dy))
        delta = (output * dy).sum(-1, dtype=wide, keepdim=True)  # [s, b, a, 1]
        delta = _grouped(delta, groups)
        dq = q.new_empty(q.shape)
        dkeys, dvalues = (torch.zeros(x.shape, dtype=wide) for x in (keys, values))
        for part, start, end in _blocks(queries):
            rows, drows = _rows(queries, part, start, end), _rows(dout, part, start, end)
            seen, dseen = _rows(keys, part, 0, end), _rows(values, part, 0, end)
            p = _probabilities(rows, seen, start)
            dp = torch.bmm(drows, dseen.transpose(1, 2)).to(wide)
            dvalues[part, 0, :end] += torch.bmm(p.to(q.dtype).transpose(1, 2), drows)
            scores = dp.sub_(_rows(delta, part, start, end)).mul_(p).mul_(q.shape[-1] ** -0.5).to(q.dtype)
            _grouped(dq, groups)[part, :, start:end] = torch.bmm(scores, seen).unflatten(1, (-1, end - start))
            dkeys[part, 0, :end] += torch.bmm(scores.transpose(1, 2), rows)
        return dq, _ungrouped(dkeys, k), _ungrouped(dvalues, v)


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[s, b, heads, d] -> a view [b g, heads/g, s, d] where the strides allow, else a copy; each group shares one key head."""
    s, b, heads, d = x.shape
    return x.unflatten(2, (groups, heads // groups)).permute(1, 2, 3, 0, 4).reshape(b * groups, heads // groups, s, d)


def _ungrouped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[b g, 1, s, d] -> [s, b, g, d] in the dtype of `like`."""
    s, b, groups, d = like.shape
    return x.view(b, groups, s, d).permute(2, 0, 1, 3).to(like.dtype, memory_format=torch.contiguous_format)


def _rows(x: torch.Tensor, part: slice, start: int, end: int) -> torch.Tensor:
    """Rows start .. end of [b g, r, s, d], all r heads of a group behind one another: [part, r (end - start), d]."""
    return x[part, :, start:end].flatten(1, 2)


def _blocks(queries: torch.Tensor) -> Iterator[tuple[slice, int, int]]:
    """(which groups, first query, end) of every block of [b g, r, s, d]."""
    count, heads, s, _ = queries.shape
    for start in range(0, s, BLOCK):
        end = min(start + BLOCK, s)
        size = max(1, SCRATCH // (heads * (end - start) * end))
        for first in range(0, count, size):
            yield slice(first, min(first + size, count)), start, end


def _probabilities(rows: torch.Tensor, keys: torch.Tensor, start: int) -> torch.Tensor:
    """Causal softmax of the queries `rows` [n, r block, d], the first of them number `start`, over `keys` [n, end, d]."""
    end = keys.shape[1]
    block = end - start
    scores = (
        torch.bmm(rows, keys.transpose(1, 2)).to(torch.promote_types(rows.dtype, torch.float32)).mul_(rows.shape[-1] ** -0.5)
    )
    corner = scores.view(-1, block, end)[:, :, start:]
    corner.masked_fill_(torch.ones(block, block, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, -1)
