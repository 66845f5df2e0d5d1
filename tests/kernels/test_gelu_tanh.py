"""GELU by tanh on a CPU: torch's numbers to a rounding, and its derivative."""

import pytest
import torch
from torch.nn import functional

from megatrain.kernels import gelu_tanh as kernel
from megatrain.kernels.gated import activated
from megatrain.kernels.gelu_tanh import gelu_tanh


@pytest.mark.parametrize("block", [7, 64, 1 << 19])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 3e-7), (torch.float64, 4e-15)]
)
def test_values_to_a_rounding(monkeypatch, block, dtype, bound):
    """Half a unit in the last place where it is rounded from float32; of a number above 1/8 (of smaller ones the sigmoid's error)."""
    monkeypatch.setattr(kernel, "BLOCK", block)
    x = torch.linspace(-9, 9, 10 * 15, dtype=torch.float64).to(dtype).view(10, 15).t()
    y, exact = gelu_tanh(x), functional.gelu(x.double(), approximate="tanh")
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    assert ((y.double() - exact).abs() / exact.abs().clamp_min(0.125)).max() <= 1.01 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_or_large_is_as_in_torch(dtype):
    x = torch.tensor([torch.inf, torch.nan, 0.0, -0.0, 1e30, -1e30, -3e38, 40.0, -40.0, 1e-30], dtype=dtype)
    torch.testing.assert_close(gelu_tanh(x), functional.gelu(x, approximate="tanh"), equal_nan=True)
    assert gelu_tanh(x[:0]).shape == (0,)


def test_a_known_value():
    assert gelu_tanh(torch.tensor([1.0, -2.0])).tolist() == pytest.approx([0.841192, -0.045402], abs=1e-6)


def test_the_derivative():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activated(x, "gelu_tanh"), x)
    assert torch.equal(activated(x, "gelu_tanh"), gelu_tanh(x.detach())), "on a CPU it serves"
