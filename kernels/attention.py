"""Attention, by the kernel that serves: on CPU a block of queries at a time, on GPUs torch's fused kernels.

    keys ->   0   1   2   3        block i of the queries meets the keys that some of its queries may see, in one batched product
    block 0   x                    for all heads; a mask is needed only where a span of keys ends inside the block. Work and scratch
    block 1   x   x                memory: about half of the square when causal, a band with a window; never the square at once.
    block 2   x   x   x
    block 3   x   x   x   x        backward: the block's probabilities are computed again (FlashAttention, arXiv:2205.14135)

torch's fused CPU kernel spends most of its time outside matrix products; this one takes 0.35x (BF16) and 0.7x (float32) of its
time at [512, 4, 8, 64]. Scores are rounded to the inputs' dtype, as in Megatron's unfused core; the softmax is at least float32
unless asked otherwise. On CUDA causal attention is one of torch's fused kernels (`sdpa.py`), other masks and ALiBi are FlexAttention
(`flex_attention.py`); what neither has (dropout keyed by a token's place, a narrow softmax, float64, masks with heads of fewer
than 16) is done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatrain.kernels.attention_dropout import WeightDropout, drop_weights, fits, tiled
from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.kernels.dispatch import Kernels, use_numba
from megatrain.kernels.flex_attention import flex, takes
from megatrain.kernels.sdpa import STEADY, Fused, fused

BLOCK = {"cpu": 128, "cuda": 256}
"""Number of queries in a block."""
SCRATCH = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Largest number of scores at a time: on a CPU they stay in the last cache, on a GPU an operation takes far longer than its launch, while
some five tensors of them, 134 MB each in 16 bits, are in memory at the worst."""


@dataclass(frozen=True)
class Variant:
    """Options of an attention: mask, ALiBi, dropout, dtype of the softmax, kernels."""

    mask: AttentionMask = CAUSAL
    slopes: torch.Tensor | None = None
    """[a] slopes of ALiBi (arXiv:2108.12409): slope times the distance of key and query is subtracted from the score."""
    dropout: WeightDropout | None = None
    wide_softmax: bool = True
    """Whether ALiBi is added in at least float32, else in the dtype of the inputs; torch's softmax is float32 inside either way."""
    order: tuple[Fused, ...] = STEADY
    """torch's fused kernels to use on a GPU, in order of preference (`sdpa.py`)."""
    kernels: Kernels = "auto"
    """Implementation of the softmax on a CPU (`dispatch.py`)."""

    @property
    def fused(self) -> bool:
        """Whether torch's fused causal kernels support these options."""
        return self.mask.only_causal and self.unbiased and self.dropout is None

    @property
    def exact(self) -> bool:
        """Whether there is neither dropout nor a narrow softmax."""
        return self.dropout is None and self.wide_softmax

    @property
    def unbiased(self) -> bool:
        """Whether there is neither ALiBi nor a narrow softmax."""
        return self.slopes is None and self.wide_softmax


PLAIN = Variant()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant = PLAIN) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: q [s, b, a, d], k and v [n, b, g, d], g dividing a, -> [s, b, a d].

    Head i of q uses head i // (a/g) of k and v. The queries are the last s of the n tokens.
    """
    if variant.fused:
        if len(q) < len(k) or (q.device.type == "cuda" and variant.order):
            return fused(q, k, v, variant.order)
    elif q.device.type == "cuda" and variant.exact and takes(q, k):
        return flex(q, k, v, variant.mask, variant.slopes)
    elif variant.dropout is not None and variant.dropout.words is not None and variant.unbiased and fits(q, k, variant.mask):
        return tiled(q, k, v, variant.dropout.words, variant.mask)
    return _BlockAttention.apply(q, k, v, variant).flatten(2)


class _BlockAttention(torch.autograd.Function):
    """Attention by blocks of queries: q [s, b, a, d], k and v [n, b, g, d] -> [s, b, a, d]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
        output = q.new_empty(q.shape)
        groups = k.shape[2]
        queries, keys, values = (_grouped(x, groups).contiguous() for x in (q, k, v))
        ctx.save_for_backward(queries, keys, values)  # not the tensors they were copied from
        ctx.groups, ctx.variant = groups, variant
        target, room = _grouped(output, groups), _Room(queries)
        for block in _blocks(queries, keys, groups, variant):
            p = block.dropped(block.probabilities(block.rows(queries), block.columns(keys), room))
            target[block.part, :, block.start : block.end] = block.by_head(torch.bmm(p, block.columns(values)))
        return output

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        queries, keys, values = ctx.saved_tensors
        groups, wide, scale = ctx.groups, torch.promote_types(dy.dtype, torch.float32), dy.shape[-1] ** -0.5
        dout = _grouped(dy, groups).contiguous()
        dqueries = torch.empty_like(queries)
        dkeys, dvalues = (torch.zeros(x.shape, dtype=wide, device=dy.device) for x in (keys, values))
        room, second = _Room(queries), _Room(queries)
        for block in _blocks(queries, keys, groups, ctx.variant):
            rows, drows, seen = block.rows(queries), block.rows(dout), block.columns(keys)
            p = block.probabilities(rows, seen, room)
            dp = second.of(*p.shape)
            dp = block.dropped(torch.bmm(drows, block.columns(values).transpose(1, 2), out=dp))
            block.add(dvalues, torch.bmm(block.dropped(p).transpose(1, 2), drows))
            # p (dp - sum of dp p), in one pass and in place
            dscores = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            dqueries[block.part, :, block.start : block.end] = block.by_head(_scaled_product(scale, dscores, seen))
            block.add(dkeys, _scaled_product(scale, dscores.transpose(1, 2), rows))
        return *(_ungrouped(dx.to(dy.dtype), groups) for dx in (dqueries, dkeys, dvalues)), None


class _Room:
    """Memory for the scores and the causal mask, shared by the blocks of one call so that it stays in a CPU's cache."""

    def __init__(self, like: torch.Tensor) -> None:
        self.memory, self.mask = like.new_empty(0), like.new_empty(0, 0)

    def of(self, *shape: int) -> torch.Tensor:
        """Uninitialised contiguous tensor of `shape`; overwrites the tensor returned before."""
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)

    def triangle(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Causal mask [size, size]: -inf above the diagonal, else 0."""
        if self.mask.shape[0] != size or self.mask.dtype != dtype:
            self.mask = self.mask.new_full((size, size), -torch.inf, dtype=dtype).triu(1)
        return self.mask


def _scaled_product(scale: float, a: torch.Tensor, b: torch.Tensor, room: _Room | None = None) -> torch.Tensor:
    """scale a b, scaled before it is rounded: a [n, i, j], b [n, j, k] -> [n, i, k]."""
    shape = a.shape[0], a.shape[1], b.shape[2]
    out = a.new_empty(shape) if room is None else room.of(*shape)
    return out.baddbmm_(a, b, beta=0, alpha=scale)


def _softmax(scores: torch.Tensor, block: int = 1) -> torch.Tensor:
    """Softmax of [n, r block, keys] over the keys, in place, by numba; query i of a block sees all but the last block - 1 - i."""
    from megatrain.kernels.cpu_softmax import softmax  # noqa: PLC0415  numba is optional

    return softmax(scores, block)


def _numba_add(total: torch.Tensor, more: torch.Tensor) -> None:
    from megatrain.kernels.cpu_heads import add  # noqa: PLC0415

    add(total, more)


def _operand(x: torch.Tensor) -> torch.Tensor:
    """x as a factor of a product: contiguous if 16-bit on a CPU, where torch else copies it at every product, element by element."""
    return x.contiguous() if x.device.type == "cpu" and x.dtype.itemsize == 2 else x


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[s, b, heads, d] -> a view [b g, heads/g, s, d] where the strides allow, else a copy; each group shares one key head.

    `_operand` makes slices of it contiguous.
    """
    s, b, heads, d = x.shape
    return x.unflatten(2, (groups, heads // groups)).permute(1, 2, 3, 0, 4).reshape(b * groups, heads // groups, s, d)


def _ungrouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[b g, r, s, d] -> a view [s, b, g r, d]; the projection's backward copies it as it writes q|k|v's gradients side by side."""
    return x.unflatten(0, (-1, groups)).flatten(1, 2).permute(2, 0, 1, 3)


@dataclass(frozen=True)
class _Block:
    """Queries start .. end - 1 of the groups `part`, and the keys that they meet. `offset`: place of query 0 in the sequence."""

    part: slice
    start: int
    end: int
    spans: list[slice]
    offset: int
    heads: int
    """Number of query heads of a group, r."""
    groups: int
    """Number of groups (key heads) of a sequence, g."""
    variant: Variant

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The block's rows of x [b g, r, s, d], the r heads of a group one after another: [n, r block, d]."""
        return _operand(x[self.part, :, self.start : self.end].flatten(1, 2))

    def by_head(self, y: torch.Tensor) -> torch.Tensor:
        """Split rows by head: [n, r block, d] -> [n, r, block, d]."""
        return y.unflatten(1, (self.heads, -1))

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """The keys or values, out of [b g, 1, n, d], that the block's queries see: [n, keys, d]."""
        parts = [x[self.part, 0, span] for span in self.spans]
        return _operand(parts[0]) if len(parts) == 1 else torch.cat(parts, 1)

    def add(self, total: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradient of `columns`, [n, keys, d], to that of all keys or values, `total` [b g, 1, n, d]."""
        compiled = use_numba(self.variant.kernels, gradient) and total.dtype == torch.float32 and len(self.spans) == 1
        done = 0
        for span in self.spans:
            if compiled:
                _numba_add(total[self.part, 0, span], gradient)
            else:
                total[self.part, 0, span] += gradient[:, done : done + span.stop - span.start]
            done += span.stop - span.start

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the sequence of the block's queries, and of its keys."""
        queries = torch.arange(self.offset + self.start, self.offset + self.end, device=device)
        return queries, torch.cat([torch.arange(span.start, span.stop, device=device) for span in self.spans])

    def probabilities(self, rows: torch.Tensor, keys: torch.Tensor, room: _Room) -> torch.Tensor:
        """Softmax of the queries `rows` [n, r block, d] over `keys` [n, keys, d], in their dtype: [n, r block, keys]."""
        scores = _scaled_product(rows.shape[-1] ** -0.5, rows, keys.transpose(1, 2), room)
        if self.variant.slopes is not None and self.variant.wide_softmax:
            scores = scores.to(torch.promote_types(rows.dtype, torch.float32))
        by_head = self.by_head(scores)
        if self.variant.slopes is not None:
            by_head += self._bias(self.variant.slopes.to(scores.dtype))
        compiled = use_numba(self.variant.kernels, scores)
        if compiled and self.variant.mask.only_causal:
            return _softmax(scores, self.end - self.start)
        certain = self.variant.mask.seen_by_all(self.offset + self.start)  # if above 0, the one span begins at key 0
        corner = by_head[..., certain:]
        if self.variant.mask.only_causal:
            corner += room.triangle(self.end - self.start, corner.dtype)
        elif corner.shape[-1]:
            corner.masked_fill_(self._hidden(rows.device, certain), -torch.inf)
        return _softmax(scores) if compiled else torch.softmax(scores, -1, out=scores).to(rows.dtype)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, r block, keys] times the factors of dropout."""
        dropout = self.variant.dropout
        if dropout is None:
            return x
        if dropout.words is not None and x.dtype != torch.float64:
            return drop_weights(
                x, dropout.words, self.part.start, self.groups, self.heads, self.offset + self.start, self.spans
            )
        numbers = self._numbers(x.device)
        heads = (numbers % self.groups)[:, None] * self.heads + torch.arange(self.heads, device=x.device)
        factors = dropout.factors(numbers // self.groups, heads, *self.places(x.device))
        return (x * factors.flatten(1, 2)).to(x.dtype)

    def _bias(self, slopes: torch.Tensor) -> torch.Tensor:
        """ALiBi's bias of the scores: [n, r, block, keys]."""
        queries, keys = self.places(slopes.device)
        of_group = slopes.view(self.groups, self.heads)[self._numbers(slopes.device) % self.groups]
        return of_group[:, :, None, None] * -(keys[None, :] - queries[:, None]).abs().to(slopes.dtype)

    def _hidden(self, device: torch.device, first: int) -> torch.Tensor:
        """Mask of hidden keys, from key `first` on: bool [block, keys], or [n, 1, block, keys] if sequences differ."""
        queries, keys = self.places(device)
        if self.variant.mask.uniform:
            return ~self.variant.mask.allowed(queries, keys[first:])
        return ~self.variant.mask.allowed(queries, keys[first:], self._numbers(device) // self.groups)[:, None]

    def _numbers(self, device: torch.device) -> torch.Tensor:
        """Indices [n] of the block's groups among all b g."""
        return torch.arange(self.part.start, self.part.stop, device=device)


def _blocks(queries: torch.Tensor, keys: torch.Tensor, groups: int, variant: Variant) -> Iterator[_Block]:
    """Blocks of the queries [b g, r, s, d], each with the spans of keys [b g, 1, n, d] that it sees; groups: g."""
    count, heads, s, _ = queries.shape
    n = keys.shape[2]
    offset = n - s
    kind = "cpu" if queries.device.type == "cpu" else "cuda"
    height, scratch = BLOCK[kind], SCRATCH[kind]
    if (
        kind == "cpu" and queries.dtype.itemsize == 2 and torch.get_num_threads() > 1
    ):  # threads wait for each other at every operation
        height, scratch = 2 * height, 2 * scratch
    for start in range(0, s, height):
        end = min(start + height, s)
        spans = variant.mask.spans(offset + start, offset + end, n)
        largest = max(1, scratch // (heads * (end - start) * sum(span.stop - span.start for span in spans)))
        size = -(-count // -(-count // largest))  # parts of nearly equal size
        for first in range(0, count, size):
            yield _Block(slice(first, min(first + size, count)), start, end, spans, offset, heads, groups, variant)
