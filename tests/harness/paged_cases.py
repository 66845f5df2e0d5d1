"""Sequences whose keys and values lie in pages, and what attention over them is."""

import math

import torch

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.kernels.paged_attention import Pages


class Cases:
    """Sequences of these lengths with some queries, keys and values, which `paged` writes into blocks wherever it likes."""

    def __init__(self, lengths, groups, repeat, d, dtype, device="cpu"):
        generator = torch.Generator().manual_seed(groups * repeat * d)

        def some(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.q = [some(n, groups * repeat, d) for n in lengths]
        self.keys, self.values = ([some(n, groups, d) for n in lengths] for _ in range(2))
        self.slopes = torch.arange(1, groups * repeat + 1, device=device) / 16
        self.device = device

    def paged(self, which, counts=None, prefix=None, block=16, seed=0):
        """The last queries, keys, values and pages of sequences `which`; NaN lies in all other slots, nonsense behind a row's blocks."""
        lengths = [len(self.keys[i]) for i in which]
        blocks = [-(-n // block) for n in lengths]
        order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(seed)).split([*blocks, 3])
        keys, values = (self.keys[0].new_full((block * (sum(blocks) + 3), *self.keys[0].shape[1:]), math.nan) for _ in range(2))
        table = torch.full((len(which), max(blocks)), 1 << 20)
        for row, i in enumerate(which):
            table[row, : blocks[row]] = order[row]
            slots = (order[row][:, None] * block + torch.arange(block)).flatten()[: lengths[row]]
            keys[slots], values[slots] = self.keys[i], self.values[i]
        q = torch.cat([self.q[i][-count:] for i, count in zip(which, counts or [1] * len(which), strict=True)])
        first = None if prefix is None else torch.tensor(prefix, device=self.device)
        where = table.to(self.device), torch.tensor(lengths, device=self.device), block, counts and tuple(counts), first
        return q, keys, values, Pages(*where)

    def exact(self, i, count=1, window=None, sparse=None, slopes=None, prefix=None):
        """The definition in float64, for the last queries of sequence i: [count, a d]."""
        q, keys, values = (x[i].cpu().double().transpose(0, 1) for x in (self.q, self.keys, self.values))
        repeat, places = len(q) // len(keys), torch.arange(keys.shape[1])
        keys, values = (x.repeat_interleave(repeat, 0) for x in (keys, values))
        scores = torch.einsum("aqd,akd->aqk", q, keys) / math.sqrt(q.shape[2])
        if slopes is not None:
            scores -= slopes.cpu().double()[:, None, None] * (places[:, None] - places).abs()
        mask = CAUSAL if prefix is None else AttentionMask(prefix=torch.tensor([prefix]))
        seen = mask.within(window, sparse).allowed(places, places)
        return torch.einsum("aqk,akd->qad", scores.masked_fill(~seen, -math.inf).softmax(-1), values).flatten(1)[-count:]
