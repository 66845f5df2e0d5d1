"""Attention over pages by Triton against its definition in float64; interpreted without a GPU, where it knows no products in bfloat16."""

import numpy as np
import pytest
import torch
from paged_cases import Cases

from megatrain.kernels.paged_attention import paged_attention

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
BANDS = {torch.float32: 2e-6, torch.float16: 2e-3} | ({torch.bfloat16: 1e-2} if DEVICE.type == "cuda" else {})
LENGTHS, COUNTS, PREFIXES = [1, 290, 64, 65], [1, 70, 64, 1], [0, 250, 30, 0]
"""More than a split of keys, and more than a tile of queries."""
SETTINGS = {
    "causal": {},
    "window": {"window": 40},
    "sparse": {"sparse": (24, 2, 1)},
    "slopes": {"slopes": True},
    "all": {"window": 150, "sparse": (16, 3, 2), "slopes": True},
}


def settings_of(name, cases):
    return {key: cases.slopes if key == "slopes" else value for key, value in SETTINGS[name].items()}


@pytest.mark.parametrize(
    ("groups", "repeat", "d", "dtype", "settings"),
    [
        (2, 2, 16, torch.float32, "causal"),
        (1, 3, 21, torch.float32, "all"),
        (2, 1, 24, torch.float32, "window"),
        (1, 20, 16, torch.float16, "slopes"),
        (2, 2, 16, torch.float16, "sparse"),
        *([(8, 2, 128, torch.bfloat16, name) for name in SETTINGS] if DEVICE.type == "cuda" else []),
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", ["one", "several", "prefix"])
def test_the_definition(groups, repeat, d, dtype, settings, queries):
    cases, which = Cases(LENGTHS, groups, repeat, d, dtype, DEVICE), range(len(LENGTHS))
    chosen = settings_of(settings, cases)
    counts, prefixes = None if queries == "one" else COUNTS, PREFIXES if queries == "prefix" else None
    found = paged_attention(*cases.paged(which, counts, prefixes), **chosen, kernels="triton").cpu()
    exact = [
        cases.exact(i, 1 if counts is None else counts[i], **chosen, prefix=None if prefixes is None else prefixes[i])
        for i in which
    ]
    assert found.dtype == dtype
    error = float((found.double() - torch.cat(exact)).abs().max())
    assert error <= BANDS[dtype] * float(torch.cat(exact).abs().max())


def test_a_sequence_does_not_depend_on_those_beside_it():
    cases = Cases(LENGTHS, 2, 2, 16, torch.float32, DEVICE)
    together = paged_attention(*cases.paged([0, 1, 2, 3]), kernels="triton")
    for i in (1, 2):
        alone = paged_attention(*cases.paged([i], block=8, seed=1), kernels="triton")
        assert np.array_equal(alone[0].cpu().numpy(), together[i].cpu().numpy())


def test_what_the_kernels_do_not_take_is_done_by_torch():
    for dtype, d in ((torch.float64, 16), (torch.float32, 136)):
        cases = Cases([5, 3], 1, 2, d, dtype, DEVICE)
        found, exact = paged_attention(*cases.paged([0, 1]), kernels="triton"), torch.cat([cases.exact(i) for i in (0, 1)])
        assert float((found.cpu() - exact).abs().max()) < 1e-5
