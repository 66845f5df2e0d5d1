"""Matrix products agree with float64 torch whichever library serves."""

import pytest
import torch

from megatrain.kernels import matmul as kernel
from megatrain.kernels.matmul import add_matmul, linear, matmul

SHAPES = [(1, 1, 1), (5, 7, 3), (64, 33, 129), (0, 4, 3), (3, 0, 4), (4, 3, 0)]


@pytest.fixture(params=[False, True], ids=["torch", "onednn"], autouse=True)
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(kernel, "_prefer_onednn", lambda: request.param)


def tensors(m, k, n, dtype):
    generator = torch.Generator().manual_seed(m * 100 + k * 10 + n)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (k, n)))
    return a.to(dtype), b.to(dtype)


def near(got, want, dtype):
    torch.testing.assert_close(
        got.double(), want, rtol={torch.bfloat16: 2e-2}.get(dtype, 1e-5), atol=1e-4 if dtype != torch.bfloat16 else 0.1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_products(m, k, n, dtype):
    a, b = tensors(m, k, n, dtype)
    want = a.double() @ b.double()
    near(matmul(a, b), want, dtype)
    near(matmul(a.t().contiguous().t(), b.t().contiguous().t()), want, dtype)  # other strides
    near(linear(a, b.t().contiguous()), want, dtype)
    bias = torch.arange(n, dtype=dtype)
    near(linear(a.view(1, m, k), b.t().contiguous(), bias)[0], want + bias.double(), dtype)


@pytest.mark.parametrize(
    ("out", "dtype"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_sums_of_products_are_as_wide_as_their_output(out, dtype):
    a, b = tensors(9, 6, 4, dtype)
    total = torch.ones(9, 4, dtype=out)
    add_matmul(total, a, b)
    add_matmul(total, a, b)
    near(total, 1 + 2 * (a.double() @ b.double()), dtype)
    assert total.dtype == out
