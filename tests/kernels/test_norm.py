"""RMSNorm against torch's: values, gradients, and what is kept."""

import pytest
import torch
from torch.nn import functional

from megatrain.kernels.norm import norm


def rms_norm(x, weight, eps):
    return norm(x, weight, None, eps, rms=True)


def numbers(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 7), (2, 2, 2, 1)])
def test_values_and_gradients_are_torchs(shape):
    x, w, dy = numbers(0, *shape), 1 + numbers(1, shape[-1]), numbers(2, *shape)
    results = []
    for function in (rms_norm, lambda x, w, eps: functional.rms_norm(x, w.shape, w, eps)):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(*leaves, 1e-3)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_function():
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, 1e-2), (numbers(0, 3, 4).requires_grad_(), numbers(1, 4).requires_grad_())
    )


def test_bfloat16_is_rounded_once():
    x, w = numbers(0, 16, 64, dtype=torch.bfloat16), numbers(1, 64, dtype=torch.bfloat16)
    exact = functional.rms_norm(x.double(), (64,), w.double(), 1e-5)
    y = rms_norm(x, w, 1e-5)
    assert y.dtype == torch.bfloat16 and (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_a_frozen_weight_has_no_gradient_and_large_inputs_no_overflow():
    x = (1e18 * numbers(0, 2, 8, dtype=torch.float32)).requires_grad_()
    y = rms_norm(x, torch.ones(8), 1e-5)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_input_and_one_number_a_row_are_kept():
    kept = []
    x, w = numbers(0, 6, 8, dtype=torch.bfloat16).requires_grad_(), torch.ones(8, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((tuple(t.shape), t.dtype)) or t, lambda t: t):
        rms_norm(x, w, 1e-5)
    assert set(kept) == {((6, 8), torch.bfloat16), ((8,), torch.bfloat16), ((6, 1), torch.float32)}
