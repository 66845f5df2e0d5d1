"""Attention of decoding over a paged cache: the last queries of each sequence, whose keys and values lie in blocks anywhere in one store.

    table      sequence 0:  7 2 5      tokens 0 .. block - 1 of sequence 0 lie in the slots of block 7, the next ones in those of 2
    (blocks)   sequence 1:  1          (PagedAttention, arXiv:2309.06180)

    keys ->    [tile 0][tile 1][ti     each tile: a query's largest score, sum of exponentials, their product with the values
                   \\      |     /      then the tiles are joined in their order (Milakov & Gimelshein, arXiv:1805.02867)
                    result

A query's result does not change by a bit on a CPU, whatever sequences are beside it, wherever the blocks lie, and whether it is
computed alone or together with queries before it: tiles have `TILE` keys and begin at multiples of it, and a product has `ROWS` rows
or a multiple. All is in float32 at least. The reference gathers tiles for batched products; numba (kernels/cpu_paged.py, in float32 too)
and Triton (kernels/paged_triton.py) read them where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.kernels.dispatch import Kernels, numba_lacks, use_triton
from megatrain.kernels.paged_triton import attend, blocks_of, height_of, takes

TILE = 128
"""Number of keys in a tile."""
HEIGHT = 64
"""Largest number of queries of a sequence that are worked on together."""
ROWS = 4
"""The rows of a product are a multiple: MKL rounds products of fewer rows otherwise, and of numbers that do not begin at 64 bytes."""
SCRATCH = 1 << 18
"""Number of elements of keys, or of results of tiles, that are made at a time, so that they stay in a CPU's cache."""


@dataclass(frozen=True)
class Pages:
    """Where the keys and values of each of n sequences lie, and which queries there are."""

    table: torch.Tensor
    """[n, most blocks] int32 or int64: numbers of a sequence's blocks, in order; what stands behind its last is not read."""
    lengths: torch.Tensor
    """[n] number of each sequence's keys, at least 1; the last one is its last query's own."""
    block: int
    """Number of tokens in a block."""
    counts: tuple[int, ...] | None = None
    """Number of queries of each sequence: its last tokens, at least one, one sequence after the other; None: one each."""
    prefix: torch.Tensor | None = None
    """[n] number of first keys that all of a sequence's queries see; None: none."""

    _parts: dict[AttentionMask, list[_QueryTiles]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def height(self) -> int:
        """Number of queries in a block of them."""
        return 1 if self.counts is None else min(HEIGHT, max(self.counts))

    _spans: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _blocks: dict[int, torch.Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def blocks(self, height: int) -> torch.Tensor:
        """The queries in blocks of `height` (`blocks_of`), on the device; made once, as parts are."""
        if height not in self._blocks:
            of, device = torch.from_numpy(blocks_of(self.counts or (1,) * len(self.lengths), height)), self.table.device
            host = torch.empty(of.shape, dtype=of.dtype, pin_memory=device.type == "cuda").copy_(of)
            self._blocks[height] = host.to(device, non_blocking=True)  # for a copy from other memory the host would wait
        return self._blocks[height]

    def spans(self, window: int | None, sparse: tuple[int, int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each query's place and the two spans of keys it sees [t, 5]; slots of each sequence's keys [n, longest].

        int64; made once, since every layer asks for the same.
        """
        if (window, sparse) not in self._spans:
            self._spans[window, sparse] = _spans(self, window, sparse)
        return self._spans[window, sparse]

    def slots(self, sequences: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Slots of the keys at places [i, k] of sequences [i]: int64 [i, k]."""
        blocks = (places // self.block).to(torch.int64)
        return self.table[sequences].gather(1, blocks).to(torch.int64) * self.block + places % self.block

    def parts(self, mask: AttentionMask) -> list[_QueryTiles]:
        """The work in parts; made once, since every layer asks for the same."""
        if mask not in self._parts:
            self._parts[mask] = list(_parts(self, mask))
        return self._parts[mask]


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    *,
    window: int | None = None,
    sparse: tuple[int, int, int] | None = None,
    slopes: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of each query: q [t, a, d], keys and values [slots, g, d] -> [t, a d], in q's dtype.

    The token at place p of a sequence lies in slot table[p // block] block + p % block. Head i uses group i // (a/g). A query sees the
    keys up to its own and those of its prefix; window and sparse hide some of them, as in `AttentionMask.within`; slopes [a] are
    ALiBi's, by places in the sequence.
    """
    by = served_by(kernels, q.device, q.dtype, q.shape[2])
    if by == "triton":
        repeat = q.shape[1] // keys.shape[1]
        height = 1 if pages.counts is None else height_of(repeat, q.dtype)
        several = None if pages.counts is None else pages.blocks(height)
        where = pages.table, pages.lengths, pages.block, several, height, pages.prefix
        return attend(q, keys, values, *where, window, sparse, slopes)
    if by == "numba":
        from megatrain.kernels import cpu_paged  # noqa: PLC0415  numba is optional

        return cpu_paged.attend(q, keys, values, pages.blocks(cpu_paged.HEIGHT), *pages.spans(window, sparse), slopes)
    return _reference(q, keys, values, pages, CAUSAL.within(window, sparse), slopes)


def served_by(kernels: Kernels, device: torch.device, dtype: torch.dtype, d: int) -> str:
    """Which implementation attends with heads of d elements: triton, numba (in float32 too), or torch."""
    if use_triton(kernels, device) and takes(dtype, d):
        return "triton"
    on_cpu = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return "numba" if on_cpu and kernels in ("auto", "numba") and numba_lacks() is None else "torch"


def _reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, mask: AttentionMask, slopes: torch.Tensor | None
) -> torch.Tensor:
    _, heads, d = q.shape
    groups, wide = keys.shape[1], torch.promote_types(q.dtype, torch.float32)
    by_head = None if slopes is None else slopes.to(wide).view(groups, -1, 1, 1)
    output = torch.empty_like(q)
    for part in pages.parts(mask):
        rows = functional.pad(q[part.queries].to(wide) * d**-0.5, (0, -d % 16))  # [blocks, height, a, d]
        rows = rows.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        rows = functional.pad(rows, (0, 0, 0, -rows.shape[2] % ROWS))
        found = _of_tiles(rows, keys, values, part, heads // groups, by_head)[..., :d]
        by_query = found.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [blocks, g, r, height, d] -> [blocks, height, a, d]
        output[part.queries[part.live]] = by_query[part.live].to(q.dtype)
    return output.flatten(1)


def _of_tiles(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: _QueryTiles, repeat: int, by_head: torch.Tensor | None
) -> torch.Tensor:
    """Scaled queries [blocks, g, rows, d] -> [blocks, g, r, height, d]; of a block's rows, r times its height are used."""
    count, groups, _, d = rows.shape
    height = part.queries.shape[1]
    tops = rows.new_full((count, part.most, groups, repeat, height), -torch.inf)
    totals, sums = torch.zeros_like(tops), rows.new_zeros(*tops.shape, d)
    size = max(1, SCRATCH // (TILE * groups * d))
    for first in range(0, len(part.blocks), size):
        now = slice(first, first + size)
        blocks, orders = part.blocks[now], part.orders[now]
        k, v = (_gathered(x, part.slots[now], rows.dtype) for x in (keys, values))
        products = torch.bmm(rows[blocks].flatten(0, 1), k.transpose(1, 2)).unflatten(0, (-1, groups))
        scores = products[:, :, : repeat * height].unflatten(2, (repeat, height))
        if by_head is not None:
            scores -= by_head * part.distances[now, None, None].to(scores.dtype)
        scores.masked_fill_(part.hidden[now, None, None], -torch.inf)
        top = scores.amax(-1)
        weights = scores.sub_(top.clamp_min(torch.finfo(top.dtype).min)[..., None]).exp_()  # without a key seen, all are 0
        tops[blocks, orders], totals[blocks, orders] = top, weights.sum(-1)
        products = torch.bmm(products.flatten(0, 1), v).unflatten(0, (-1, groups))
        sums[blocks, orders] = products[:, :, : repeat * height].unflatten(2, (repeat, height))
    return _joined(tops, totals, sums)


def _gathered(x: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values x [slots, g, d] of tiles, slots [tiles, TILE], group by group: [tiles g, TILE, d], d a multiple of 16."""
    groups, d = x.shape[1:]
    rows = slots[:, None] * groups + torch.arange(groups, device=slots.device)[:, None]
    found = x.view(-1, d).index_select(0, rows.flatten()).to(dtype)
    return functional.pad(found, (0, -d % 16)).unflatten(0, (-1, TILE))


def _joined(tops: torch.Tensor, totals: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Largest scores and sums of exponentials of tiles [n, tiles, ...], products with the values [n, tiles, ..., d] -> [n, ..., d].

    Tile by tile: torch would divide a long sum by its length, which is the longest sequence's.
    """
    factors = (tops - tops.amax(1, keepdim=True)).exp_()
    totals.mul_(factors)
    sums.mul_(factors[..., None])
    total, out = totals[:, 0], sums[:, 0]
    for tile in range(1, tops.shape[1]):
        total += totals[:, tile]
        out += sums[:, tile]
    return out / total[..., None]


@dataclass(frozen=True)
class _QueryTiles:
    """Some blocks of queries, and the tiles of keys that any of their queries see."""

    queries: torch.Tensor
    """[blocks, height] rows of q; behind a sequence's last query, any."""
    live: torch.Tensor
    """[blocks, height] whether it is a query of the block's sequence."""
    blocks: torch.Tensor
    """[tiles] the block of each tile."""
    orders: torch.Tensor
    """[tiles] its place among the sequence's tiles."""
    slots: torch.Tensor
    """[tiles, TILE] slots of its keys; of keys that are hidden, any."""
    hidden: torch.Tensor
    """[tiles, height, TILE] whether the query sees the key not."""
    distances: torch.Tensor
    """[tiles, height, TILE] places between key and query."""
    most: int
    """Largest number of tiles of a sequence."""


def _parts(pages: Pages, mask: AttentionMask) -> Iterator[_QueryTiles]:
    """Parts of a call's work, of some `SCRATCH` scores for each head."""
    device, height = pages.table.device, pages.height
    lengths = pages.lengths.to(torch.int64)
    counts = torch.ones_like(lengths) if pages.counts is None else torch.tensor(pages.counts, device=device)
    blocks = -(-counts // height)
    sequences = torch.arange(len(lengths), device=device).repeat_interleave(blocks)
    within = (torch.arange(len(sequences), device=device) - (blocks.cumsum(0) - blocks)[sequences]) * height
    within = within[:, None] + torch.arange(height, device=device)  # [blocks, height]: which of its sequence's queries
    live = within < counts[sequences, None]
    queries = torch.minimum(within, counts[sequences, None] - 1) + (counts.cumsum(0) - counts)[sequences, None]
    places = within + (lengths - counts)[sequences, None]
    size = max(1, SCRATCH // (height * TILE * -(-int(lengths.max()) // TILE)))
    for first in range(0, len(sequences), size):
        part = slice(first, first + size)
        ends = lengths[sequences[part], None]
        most = -(-int(ends.max()) // TILE)
        keys = torch.arange(most * TILE, device=device)[None, :]
        prefix = None if pages.prefix is None else pages.prefix.to(torch.int64)[sequences[part], None, None]
        seen = mask.sees(places[part, :, None], keys[:, None], prefix) & live[part, :, None] & (keys < ends)[:, None]
        # What lies behind a sequence's end is not read: it may be NaN.
        slots = pages.slots(sequences[part], torch.minimum(keys, ends - 1)).unflatten(-1, (most, TILE))
        by_tile = seen.unflatten(-1, (most, TILE)).transpose(1, 2)
        chosen, orders = by_tile.flatten(2).any(-1).nonzero(as_tuple=True)
        distances = (places[part][chosen, :, None] - keys.view(most, TILE)[orders, None]).abs()
        yield _QueryTiles(
            queries[part], live[part], chosen, orders, slots[chosen, orders], ~by_tile[chosen, orders], distances, most
        )


def _spans(pages: Pages, window: int | None, sparse: tuple[int, int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Pages.spans`: a query sees two spans of keys at most, those of the first blocks, and those up to its own or its prefix's last."""
    lengths = pages.lengths.to(torch.int64)
    counts = torch.ones_like(lengths) if pages.counts is None else torch.tensor(pages.counts)
    sequences = torch.arange(len(lengths)).repeat_interleave(counts)
    ends = lengths[sequences]
    places = ends - counts.cumsum(0)[sequences] + torch.arange(len(sequences))
    last, first = places + 1, torch.zeros_like(places)
    if pages.prefix is not None:
        last = torch.maximum(last, torch.minimum(ends, pages.prefix.to(torch.int64)[sequences]))
    if window is not None:
        first, last = (places - window + 1).clamp_min(0), torch.minimum(last, places + window)
    middle = first
    if sparse is not None:
        size, local, everywhere = sparse
        near = (torch.div(places, size, rounding_mode="floor") - local + 1) * size
        middle = torch.maximum(first, torch.minimum(last, torch.full_like(last, everywhere * size)))
        seen = torch.stack([places, first, middle, torch.minimum(last, torch.maximum(near, middle)), last], 1)
    else:
        seen = torch.stack([places, first, middle, first, last], 1)
    longest = int(lengths.max())
    keys = torch.minimum(torch.arange(longest)[None, :], lengths[:, None] - 1)
    return seen, pages.slots(torch.arange(len(lengths)), keys)
