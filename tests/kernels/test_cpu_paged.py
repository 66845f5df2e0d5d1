"""Attention over pages by numba against its definition in float64, and that no query's result depends on what is computed beside it."""

import pytest
import torch
from paged_cases import Cases

from megatrain.kernels.paged_attention import paged_attention, served_by

BANDS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
"""Relative to the largest value."""
LENGTHS, COUNTS = [1, 300, 64, 65, 127, 129, 2], [1, 70, 64, 1, 2, 129, 2]
PREFIXES = [0, 250, 30, 0, 127, 100, 1]
MASKS = {"causal": (None, None), "window": (40, None), "sparse": (None, (24, 2, 1)), "both": (150, (16, 3, 2))}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("groups", "repeat", "d"), [(2, 4, 16), (1, 3, 21)])
def test_the_definition(groups, repeat, d, mask, dtype):
    cases, which = Cases(LENGTHS, groups, repeat, d, dtype), range(len(LENGTHS))
    for counts, prefixes in ((None, None), (COUNTS, None), (COUNTS, PREFIXES)):
        for slopes in (None, cases.slopes):
            settings = dict(zip(("window", "sparse", "slopes"), (*MASKS[mask], slopes), strict=True))
            found = paged_attention(*cases.paged(which, counts, prefixes), **settings, kernels="numba")
            given = [(1 if counts is None else counts[i], None if prefixes is None else prefixes[i]) for i in which]
            exact = torch.cat([cases.exact(i, count, **settings, prefix=first) for i, (count, first) in enumerate(given)])
            assert found.dtype == dtype
            assert float((found.double() - exact).abs().max()) <= BANDS[dtype] * float(exact.abs().max())


@pytest.mark.parametrize(("dtype", "threads"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)], ids=str)
def test_a_query_does_not_depend_on_what_is_beside_it(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cases = Cases(LENGTHS, 2, 3, 64, dtype)
    alone = [paged_attention(*cases.paged([i], block=32), kernels="numba")[0] for i in range(len(LENGTHS))]
    for seed, which in enumerate([[0, 1, 2, 3, 4, 5, 6], [1, 1, 5], [2, 0, 0, 2, 6, 1, 3, 3, 4, 5, 1]]):
        for counts in (None, [COUNTS[i] for i in which], [min(seed + 2, COUNTS[i]) for i in which]):
            together = paged_attention(*cases.paged(which, counts, block=8 << seed, seed=seed), kernels="numba")
            last = torch.tensor(counts or [1] * len(which)).cumsum(0) - 1
            assert [i for row, i in zip(together[last], which, strict=True) if not torch.equal(row, alone[i])] == []
    torch.set_num_threads(before)


def test_which_implementation_serves(monkeypatch):
    cpu = torch.device("cpu")
    assert served_by("auto", cpu, torch.float32, 64) == "numba" == served_by("numba", cpu, torch.bfloat16, 64)
    assert served_by("reference", cpu, torch.bfloat16, 64) == "torch" == served_by("auto", cpu, torch.float64, 64)
    monkeypatch.setattr("megatrain.kernels.paged_attention.numba_lacks", lambda: "it is not installed")
    assert served_by("auto", cpu, torch.float32, 64) == "torch"
