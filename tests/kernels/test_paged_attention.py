"""Attention over a paged cache against its definition in float64, and that no sequence's result depends on its neighbours."""

import math

import pytest
import torch

from megatrain.kernels.attention_mask import CAUSAL
from megatrain.kernels.paged_attention import Pages, paged_attention

BANDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative to the largest value: torch's float32, or one rounding to the dtype."""
LENGTHS = [1, 300, 64, 65, 127, 129, 2]
MASKS = {"causal": (None, None), "window": (40, None), "sparse": (None, (24, 2, 1)), "both": (150, (16, 3, 2))}


class Cases:
    """Sequences of these lengths with some queries, keys and values, which `paged` writes into blocks wherever it likes."""

    def __init__(self, lengths, groups, repeat, d, dtype):
        generator = torch.Generator().manual_seed(groups * repeat * d)

        def some(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.q = [some(groups * repeat, d) for _ in lengths]
        self.keys, self.values = ([some(n, groups, d) for n in lengths] for _ in range(2))
        self.slopes = torch.arange(1, groups * repeat + 1) / 16

    def paged(self, which, block=16, seed=0):
        """Queries, keys, values and pages of the sequences `which`; NaN lies in all other slots, nonsense behind a row's blocks."""
        counts = [-(-len(self.keys[i]) // block) for i in which]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).split([*counts, 3])
        keys, values = (self.keys[0].new_full((block * (sum(counts) + 3), *self.keys[0].shape[1:]), math.nan) for _ in range(2))
        table = torch.full((len(which), max(counts)), 1 << 20)
        for row, i in enumerate(which):
            table[row, : counts[row]] = order[row]
            slots = (order[row][:, None] * block + torch.arange(block)).flatten()[: len(self.keys[i])]
            keys[slots], values[slots] = self.keys[i], self.values[i]
        lengths = torch.tensor([len(self.keys[i]) for i in which])
        return torch.stack([self.q[i] for i in which]), keys, values, Pages(table, lengths, block)

    def exact(self, i, window=None, sparse=None, slopes=None):
        """The definition in float64, for sequence i: [a d]."""
        q, (keys, values) = self.q[i].double(), (x[i].double().transpose(0, 1) for x in (self.keys, self.values))
        repeat, places = len(q) // len(keys), torch.arange(keys.shape[1])
        keys, values = (x.repeat_interleave(repeat, 0) for x in (keys, values))
        scores = torch.einsum("ad,akd->ak", q, keys) / math.sqrt(q.shape[1])
        if slopes is not None:
            scores -= slopes.double()[:, None] * (places[-1] - places)
        seen = CAUSAL.within(window, sparse).allowed(places[-1:], places)
        return torch.einsum("ak,akd->ad", scores.masked_fill(~seen, -math.inf).softmax(-1), values).flatten()


@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("groups", "repeat", "d"), [(2, 4, 16), (1, 3, 21), (4, 1, 64)])
def test_the_definition(groups, repeat, d, mask, dtype):
    cases = Cases(LENGTHS, groups, repeat, d, dtype)
    window, sparse = MASKS[mask]
    for slopes in (None, cases.slopes):
        settings = {"window": window, "sparse": sparse, "slopes": slopes}
        found = paged_attention(*cases.paged(range(len(LENGTHS))), **settings, kernels="reference")
        exact = torch.stack([cases.exact(i, **settings) for i in range(len(LENGTHS))])
        assert found.dtype == dtype and found.shape == exact.shape
        assert float((found.double() - exact).abs().max()) <= BANDS[dtype] * float(exact.abs().max())


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("groups", "repeat", "d"), [(2, 4, 64), (1, 1, 21), (1, 3, 21), (3, 2, 128)])
def test_a_sequence_does_not_depend_on_those_beside_it(groups, repeat, d, dtype):
    cases = Cases(LENGTHS, groups, repeat, d, dtype)
    alone = [paged_attention(*cases.paged([i], block=32), kernels="reference")[0] for i in range(len(LENGTHS))]
    for seed, which in enumerate([[0, 1, 2, 3, 4, 5, 6], [1, 1, 5], [6, 5, 4], [0, 3], [2, 0, 0, 2, 6, 1, 3, 3, 4, 5, 1]]):
        together = paged_attention(*cases.paged(which, block=8 << seed % 3, seed=seed), kernels="reference")
        assert [i for row, i in zip(together, which, strict=True) if not torch.equal(row, alone[i])] == []
