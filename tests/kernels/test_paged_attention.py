"""Attention over a paged cache against its definition in float64, and that no query's result depends on what is computed beside it."""

import math

import pytest
import torch

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.kernels.paged_attention import Pages, paged_attention

BANDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative to the largest value: torch's float32, or one rounding to the dtype."""
LENGTHS = [1, 300, 64, 65, 127, 129, 2]
COUNTS = [1, 70, 64, 1, 2, 129, 2]
MASKS = {"causal": (None, None), "window": (40, None), "sparse": (None, (24, 2, 1)), "both": (150, (16, 3, 2))}


class Cases:
    """Sequences of these lengths with some queries, keys and values, which `paged` writes into blocks wherever it likes."""

    def __init__(self, lengths, groups, repeat, d, dtype):
        generator = torch.Generator().manual_seed(groups * repeat * d)

        def some(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.q = [some(n, groups * repeat, d) for n in lengths]
        self.keys, self.values = ([some(n, groups, d) for n in lengths] for _ in range(2))
        self.slopes = torch.arange(1, groups * repeat + 1) / 16

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
        first = None if prefix is None else torch.tensor(prefix)
        return q, keys, values, Pages(table, torch.tensor(lengths), block, counts and tuple(counts), first)

    def exact(self, i, count=1, window=None, sparse=None, slopes=None, prefix=None):
        """The definition in float64, for the last queries of sequence i: [count, a d]."""
        q, keys, values = (x[i].double().transpose(0, 1) for x in (self.q, self.keys, self.values))
        repeat, places = len(q) // len(keys), torch.arange(keys.shape[1])
        keys, values = (x.repeat_interleave(repeat, 0) for x in (keys, values))
        scores = torch.einsum("aqd,akd->aqk", q, keys) / math.sqrt(q.shape[2])
        if slopes is not None:
            scores -= slopes.double()[:, None, None] * (places[:, None] - places).abs()
        mask = CAUSAL if prefix is None else AttentionMask(prefix=torch.tensor([prefix]))
        seen = mask.within(window, sparse).allowed(places, places)
        return torch.einsum("aqk,akd->qad", scores.masked_fill(~seen, -math.inf).softmax(-1), values).flatten(1)[-count:]


def close(found, exact, dtype):
    assert found.dtype == dtype and found.shape == exact.shape
    assert float((found.double() - exact).abs().max()) <= BANDS[dtype] * float(exact.abs().max())


@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("groups", "repeat", "d"), [(2, 4, 16), (1, 3, 21), (4, 1, 64)])
def test_the_last_token_of_each(groups, repeat, d, mask, dtype):
    cases = Cases(LENGTHS, groups, repeat, d, dtype)
    for slopes in (None, cases.slopes):
        settings = dict(zip(("window", "sparse", "slopes"), (*MASKS[mask], slopes), strict=True))
        found = paged_attention(*cases.paged(range(len(LENGTHS))), **settings, kernels="reference")
        close(found, torch.cat([cases.exact(i, **settings) for i in range(len(LENGTHS))]), dtype)


@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("groups", "repeat", "d"), [(2, 2, 16), (1, 3, 21)])
def test_several_queries_of_each(groups, repeat, d, mask, dtype):
    cases, which = Cases(LENGTHS, groups, repeat, d, dtype), range(len(LENGTHS))
    prefixes = [0, 250, 30, 0, 127, 100, 1]
    for slopes, prefix in ((None, None), (cases.slopes, None), (None, prefixes), (cases.slopes, prefixes)):
        settings = dict(zip(("window", "sparse", "slopes"), (*MASKS[mask], slopes), strict=True))
        found = paged_attention(*cases.paged(which, COUNTS, prefix), **settings, kernels="reference")
        exact = [cases.exact(i, COUNTS[i], **settings, prefix=None if prefix is None else prefix[i]) for i in which]
        close(found, torch.cat(exact), dtype)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("groups", "repeat", "d", "threads"), [(2, 4, 64, 1), (1, 1, 21, 1), (2, 3, 128, 1), (1, 3, 21, 2)], indirect=["threads"]
)
def test_a_query_does_not_depend_on_what_is_beside_it(groups, repeat, d, dtype):
    cases = Cases(LENGTHS, groups, repeat, d, dtype)
    alone = [paged_attention(*cases.paged([i], block=32), kernels="reference")[0] for i in range(len(LENGTHS))]
    for seed, which in enumerate([[0, 1, 2, 3, 4, 5, 6], [1, 1, 5], [6, 5, 4], [2, 0, 0, 2, 6, 1, 3, 3, 4, 5, 1]]):
        for counts in (None, [COUNTS[i] for i in which], [min(seed + 2, COUNTS[i]) for i in which]):
            together = paged_attention(*cases.paged(which, counts, block=8 << seed % 3, seed=seed), kernels="reference")
            last = torch.tensor(counts or [1] * len(which)).cumsum(0) - 1
            assert [i for row, i in zip(together[last], which, strict=True) if not torch.equal(row, alone[i])] == []
