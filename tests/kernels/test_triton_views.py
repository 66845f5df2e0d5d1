"""Triton's kernels on tensors that lie oddly in memory: what is between their numbers is NaN, and would be seen in any result."""

import pytest
import torch

from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.gated import gated
from megatrain.kernels.matmul import add_matmul, linear, matmul
from megatrain.kernels.norm import add_norm, norm
from megatrain.kernels.rotary import rotary

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
ODD = 997
"""A stride that belongs to no tensor of these sizes; a dim of size 1 may have it, since nobody takes a step there."""


def dense(shape):
    """Strides of a contiguous tensor."""
    return list(torch.empty(shape, device="meta").stride())


def ones_odd(shape):
    return [ODD if size == 1 else stride for size, stride in zip(shape, dense(shape), strict=True)]


def parts(shape):
    """Rows of a matrix twice as wide, and dims of size 1 as they like."""
    wide = dense((*shape[:-1], 2 * shape[-1]))
    return [ODD if size == 1 else stride for size, stride in zip(shape, wide, strict=True)]


def transposed(shape):
    return dense(shape[::-1])[::-1]


def spaced(shape):
    return [3 * stride for stride in dense(shape)]


def repeated(shape):
    """Every row the first one."""
    return [0] * (len(shape) - 1) + [1]


def constant(shape):
    return [0] * len(shape)


LAYOUTS = [ones_odd, parts, transposed, spaced, repeated, constant]


def laid(layout, *shape, seed=0, dtype=torch.float32):
    """Random numbers, laid as `layout` says behind an offset, in a storage of NaN."""
    strides = layout(shape)
    storage = torch.full((ODD * 16,), torch.nan, dtype=dtype, device=DEVICE)
    view = storage.as_strided(shape, strides, 5)
    first = view[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]  # of what is repeated, one
    first.copy_(torch.randn(first.shape, generator=torch.Generator().manual_seed(seed)))
    return view.requires_grad_()


def require_same(function, given, layout):
    """Values and gradients of `function(*given, kernels=...)`: Triton as given, and the reference in float64."""
    sides = []
    for kernels, tensors in (
        ("triton", given),
        ("reference", [t.detach().double().contiguous().clone().requires_grad_() for t in given]),
    ):
        results = function(*tensors, kernels=kernels)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        incoming = [laid(layout, *r.shape, seed=n).detach().to(r.dtype) for n, r in enumerate(results)]
        grads = torch.autograd.grad(results, tensors, incoming)
        sides.append([*results, *grads])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=2e-5, atol=2e-5)


SHAPES = [(4, 1, 6), (1, 4, 6), (3, 2, 6), (0, 2, 6)]


@pytest.mark.parametrize("layout", [pytest.param(way, marks=ON_GPU) for way in LAYOUTS])
class TestViews:
    @pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 1)], ids=str)
    def test_gated(self, layout, shape):
        require_same(
            lambda g, u, kernels: gated(g, u, "swiglu", kernels=kernels), [laid(layout, *shape, seed=s) for s in (0, 1)], layout
        )

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_norm(self, layout, shape):
        x, residual = (laid(layout, *shape, seed=s) for s in (0, 1))
        weight, bias = (laid(layout, shape[-1], seed=s) for s in (2, 3))
        require_same(lambda x, w, b, kernels: norm(x, w, b, 1e-2, rms=False, kernels=kernels), [x, weight, bias], layout)
        require_same(
            lambda x, r, w, kernels: add_norm(x, r, w, None, 1e-2, rms=True, kernels=kernels), [x, residual, weight], layout
        )

    @pytest.mark.parametrize("shape", [(4, 1, 1, 6), (1, 4, 2, 6), (3, 2, 2, 6), (0, 2, 2, 6)], ids=str)
    def test_rotary(self, layout, shape):
        for rows in {shape[:2], (shape[0], 1)}:  # the tables may be those of all sequences
            cos, sin = (laid(layout, *rows, 2, seed=s).detach() for s in (1, 2))

            def turned(x, kernels, cos=cos, sin=sin):
                return rotary(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=True, kernels=kernels)

            require_same(turned, [laid(layout, *shape)], layout)

    @pytest.mark.parametrize("shape", [(4, 7), (1, 7), (4, 1)], ids=str)
    def test_cross_entropy(self, layout, shape):
        rows, columns = shape
        factor, spread, label = (laid(layout, rows, seed=s).detach() for s in (1, 2, 3))
        local, here = (
            (torch.arange(3 * rows, device=DEVICE) % columns)[::3],
            (torch.arange(3 * rows, device=DEVICE) % 2 > 0)[::3],
        )
        sides = []
        # Logits are written to, so that no two of them can be one.
        logits = laid(dense if layout in (repeated, constant) else layout, *shape).detach()
        for x, kernels in ((logits, "triton"), (logits.double().contiguous(), "reference")):
            given = [t.to(torch.promote_types(x.dtype, torch.float32)) for t in (factor, spread, label)]
            found = statistics_of(x, local, here, with_sum=True, kernels=kernels)
            gradient_of(x, found[0], given[0], given[1], local, here, given[2], kernels=kernels)
            sides.append((*found, x))
        for ours, theirs in zip(*sides, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (4, 1), (0, 6)], ids=str)
def test_products(layout, shape):
    """Torch's and oneDNN's matrix products."""
    a, b, weight, bias = (laid(layout, *of).detach().cpu() for of in (shape, (shape[1], 5), (5, shape[1]), (5,)))
    exact = [t.double().contiguous() for t in (a, b, weight, bias)]
    out = torch.ones(shape[0], 5)
    add_matmul(out, a, b)
    product = exact[0] @ exact[1]
    for ours, theirs in (
        (matmul(a, b), product),
        (out, product + 1),
        (linear(a, weight, bias), exact[0] @ exact[2].t() + exact[3]),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
