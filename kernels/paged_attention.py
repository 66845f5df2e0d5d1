"""Attention of decoding over a paged cache: one query a sequence, whose keys and values lie in blocks anywhere in one store.

    table      sequence 0:  7 2 5      tokens 0 .. block - 1 of sequence 0 lie in the slots of block 7, the next ones in those of 2
    (blocks)   sequence 1:  1          (PagedAttention, arXiv:2309.06180)

    keys ->    [tile 0][tile 1][ti     each tile: largest score, sum of exponentials, their product with the values
                   \\      |     /      then the tiles of a sequence are joined in their order (Milakov & Gimelshein, arXiv:1805.02867)
                    result

Tiles have `TILE` keys whatever the sequences beside it are, and every product is one tile's own: a sequence's result does not change by
a bit on a CPU when others, longer or shorter, are beside it, or when its blocks lie elsewhere. All is in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.kernels.dispatch import Kernels

TILE = 128
"""Number of keys in a tile."""
SCRATCH = 1 << 20
"""Largest number of elements of keys that are gathered at a time, so that they stay in a CPU's cache."""


@dataclass(frozen=True)
class Pages:
    """Where the keys and values of each of n sequences lie."""

    table: torch.Tensor
    """[n, most blocks] int32 or int64: numbers of a sequence's blocks, in order; what stands behind its last is not read."""
    lengths: torch.Tensor
    """[n] number of each sequence's keys, at least 1; the last one is the query's own."""
    block: int
    """Number of tokens in a block."""

    _tiles: dict[AttentionMask, _Tiles] = field(default_factory=dict, init=False, compare=False, repr=False)

    def slots(self, places: torch.Tensor) -> torch.Tensor:
        """Slots of the keys at places [n, k] of each sequence, [n, k]."""
        return self.table.gather(1, (places // self.block).to(torch.int64)) * self.block + places % self.block

    def tiles(self, mask: AttentionMask) -> _Tiles:
        """The tiles of keys that the queries see; made once, since every layer asks for the same."""
        if mask not in self._tiles:
            self._tiles[mask] = _Tiles.of(self, mask)
        return self._tiles[mask]


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
    """softmax(q k^T / sqrt(d)) v of each sequence's last token: q [n, a, d], keys and values [slots, g, d] -> [n, a d], in q's dtype.

    The token at place p of a sequence lies in slot table[p // block] block + p % block. Head i uses group i // (a/g). window and
    sparse hide keys as in `AttentionMask.within`; slopes [a] are ALiBi's, by places in the sequence.
    """
    return _reference(q, keys, values, pages, CAUSAL.within(window, sparse), slopes)


def _reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, mask: AttentionMask, slopes: torch.Tensor | None
) -> torch.Tensor:
    n, heads, d = q.shape
    groups, wide = keys.shape[1], torch.promote_types(q.dtype, torch.float32)
    tiles = pages.tiles(mask)
    rows = _padded(q.to(wide) * d**-0.5).view(n, groups, heads // groups, -1)
    by_group = None if slopes is None else slopes.to(wide).view(groups, -1, 1)
    shape = n, tiles.most, groups, heads // groups
    tops = rows.new_full(shape, -torch.inf)
    totals, sums = rows.new_zeros(shape), rows.new_zeros(*shape, rows.shape[-1])
    size = max(1, SCRATCH // (TILE * groups * d))
    for first in range(0, len(tiles.sequences), size):
        part = slice(first, first + size)
        those, order = tiles.sequences[part], tiles.orders[part]
        k, v = (_gathered(x, tiles.slots[part], wide) for x in (keys, values))
        scores = torch.bmm(rows[those].flatten(0, 1), k.transpose(1, 2)).view(len(those), groups, -1, TILE)
        if by_group is not None:
            scores -= by_group * tiles.distances[part, None, None].to(wide)
        scores.masked_fill_(tiles.hidden[part, None, None], -torch.inf)
        top = scores.amax(-1)
        weights = scores.sub_(top[..., None]).exp_()
        tops[those, order], totals[those, order] = top, weights.sum(-1)
        sums[those, order] = torch.bmm(weights.flatten(0, 1), v).view(*top.shape, -1)
    return _joined(tops, totals, sums)[..., :d].to(q.dtype).reshape(n, heads * d)


def _gathered(x: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values x [slots, g, d] of tiles, slots [tiles, TILE], group by group: [tiles g, TILE, d], d `_padded`."""
    groups = x.shape[1]
    rows = slots[:, None] * groups + torch.arange(groups, device=slots.device)[:, None]
    return _padded(x.view(-1, x.shape[2]).index_select(0, rows.flatten()).to(dtype)).unflatten(0, (-1, TILE))


def _padded(x: torch.Tensor) -> torch.Tensor:
    """x [..., d] with zeros to a multiple of 16: MKL's products of small matrices round by where in a cache line they begin."""
    return functional.pad(x, (0, -x.shape[-1] % 16)) if x.shape[-1] % 16 else x


def _joined(tops: torch.Tensor, totals: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Largest scores and sums of exponentials of tiles [n, tiles, g, r], products with the values [n, tiles, g, r, d] -> [n, g, r, d].

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
class _Tiles:
    """Tiles of keys that are not hidden as a whole, of all sequences."""

    sequences: torch.Tensor
    """[tiles] the sequence of each."""
    orders: torch.Tensor
    """[tiles] its place among the sequence's tiles."""
    slots: torch.Tensor
    """[tiles, TILE] slots of its keys; of hidden keys, any."""
    hidden: torch.Tensor
    """[tiles, TILE] whether the query sees the key not."""
    distances: torch.Tensor
    """[tiles, TILE] places between key and query."""
    most: int
    """Largest number of tiles of a sequence."""

    @staticmethod
    def of(pages: Pages, mask: AttentionMask) -> _Tiles:
        most = -(-int(pages.lengths.max()) // TILE)
        places = torch.arange(most * TILE, device=pages.table.device)[None, :]
        last = pages.lengths[:, None].long() - 1
        seen = mask.sees(last, places)
        slots = pages.slots(torch.minimum(places, last)).long()  # what lies behind a sequence's end is not read, and may be NaN
        by_tile = [x.unflatten(1, (most, TILE)) for x in (slots, ~seen, last - places)]
        sequences, orders = (~by_tile[1]).any(-1).nonzero(as_tuple=True)
        slots, hidden, distances = (x[sequences, orders] for x in by_tile)
        return _Tiles(sequences, orders, slots, hidden, distances, most)
