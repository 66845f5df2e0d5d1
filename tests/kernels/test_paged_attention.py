"""Attention over a paged cache against its definition in float64, and that no query's result depends on what is computed beside it."""

import pytest
import torch
from paged_cases import Cases

from megatrain.kernels.paged_attention import paged_attention

BANDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative to the largest value: torch's float32, or one rounding to the dtype."""
LENGTHS = [1, 300, 64, 65, 127, 129, 2]
COUNTS = [1, 70, 64, 1, 2, 129, 2]
MASKS = {"causal": (None, None), "window": (40, None), "sparse": (None, (24, 2, 1)), "both": (150, (16, 3, 2))}


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
