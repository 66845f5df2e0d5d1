"""Two halves of a float32: exact, nearest, ties away from zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.kernels.split_float import join_float, round_to_bf16, split_float

BITS = st.integers(-(2**31), 2**31 - 1).filter(lambda bits: (bits & 0x7FFFFFFF) <= 0x7F800000)
"""Every float32 that is a number, infinities, denormals and both zeros included."""


def halves(x):
    high, low = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    split_float(high, low, x)
    return high, low


def floats(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@settings(deadline=None)
@given(st.lists(BITS, min_size=1, max_size=50))
def test_the_halves_make_the_number_again(bits):
    x = floats(bits)
    again = torch.empty_like(x)
    join_float(again, *halves(x))
    assert torch.equal(again.view(torch.int32), x.view(torch.int32))


@settings(deadline=None)
@given(st.lists(BITS, min_size=1, max_size=50))
def test_the_upper_half_is_the_nearest(bits):
    x = floats(bits).double()
    ours, even = halves(x.float())[0].double(), x.float().bfloat16().double()
    finite = ours.isfinite() & even.isfinite()
    x, ours, even = x[finite], ours[finite], even[finite]
    assert torch.equal((ours - x).abs(), (even - x).abs())
    differ = ours != even  # at ties alone, and there away from zero
    assert bool((ours[differ].abs() > even[differ].abs()).all())


@pytest.mark.parametrize(
    ("bits", "upper"),
    [
        (0x3F808000, 0x3F81),  # 1 + 2^-8, a tie: to even would give 0x3F80
        (0x3F818000, 0x3F82),
        (0x3F807FFF, 0x3F80),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity, and comes back
        (0x00008000, 0x0001),  # a denormal
        (0x7F800000, 0x7F80),
        (0x00000000, 0x0000),
    ],
)
@pytest.mark.parametrize("sign", [0, 1])
def test_known_halves(bits, upper, sign):
    x = floats([bits - (sign << 31)])
    out = torch.empty(1, dtype=torch.bfloat16)
    round_to_bf16(out, x)
    assert out.view(torch.int16).item() & 0xFFFF == upper | sign << 15
    again = torch.empty(1)
    join_float(again, *halves(x))
    assert torch.equal(again.view(torch.int32), x.view(torch.int32))
