"""Triton's kernels against their references in float64: values, gradients, odd shapes, strided inputs; interpreted without a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from thinned import thinned

from megatrain.kernels import dispatch
from megatrain.kernels.beside import beside, together
from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.gated import GATES, PLAIN, activated, gated
from megatrain.kernels.norm import add_biased_norm, add_norm, norm, norm_beside
from megatrain.kernels.rotary import Turns, heads, rotary

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
BANDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative to the largest value: a few roundings of the dtype."""


def numbers(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.to(DEVICE, dtype).requires_grad_()


def exactly(*tensors):
    """The same numbers in float64."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def close(mine, exact, dtype):
    for ours, theirs in zip(mine, exact, strict=True):
        error = (ours.double() - theirs).abs().max()
        assert error <= BANDS[dtype] * theirs.abs().max().clamp_min(1e-3), float(error)


def compare(function, given, dtype):
    """Values and gradients of `function(*given, kernels=...)`, Triton against the reference in float64."""
    sides = []
    for tensors, kernels in ((given, "triton"), (exactly(*given), "reference")):
        results = function(*tensors, kernels=kernels)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        scales = [torch.randn(r.shape, generator=torch.Generator().manual_seed(7)).to(r) for r in results]
        total = sum((r * s).sum() for r, s in zip(results, scales, strict=True))
        grads = torch.autograd.grad(total, [t for t in tensors if t.requires_grad])
        sides.append((*results, *grads))
    close(*sides, dtype)


def after_a_bias(rms):
    """Zeros stand for the bias of the residual [n], last of the arguments: the reference adds them."""

    def function(x, residual, weight, *biases, kernels):
        *own, place = biases
        bias = own[0] if own else None
        if kernels == "triton":
            return add_biased_norm(x, residual, weight, bias, place, 1e-5, rms=rms, kernels="triton")
        return add_norm(x, residual + place, weight, bias, 1e-5, rms=rms, kernels=kernels)

    return function


def place(n):
    return torch.zeros(n, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize(
    ("rms", "shape", "dtype"),
    thinned([True, False], [(1, 1, 8), (3, 2, 33), (70, 1, 256), (5, 7, 1000), (3, 1, 9001)], BANDS),
    ids=str,
)
def test_norm(rms, shape, dtype):
    x, weight, bias = (
        numbers(*shape, dtype=dtype),
        numbers(shape[-1], seed=1, dtype=dtype),
        numbers(shape[-1], seed=2, dtype=dtype),
    )
    given = (x, weight) if rms else (x, weight, bias)

    def alone(x, weight, bias=None, kernels="auto"):
        return norm(x, weight, bias, 1e-5, rms=rms, kernels=kernels)

    compare(alone, given, dtype)
    residual = numbers(*shape, seed=3, dtype=dtype)

    def beside_itself(x, weight, bias=None, kernels="auto"):
        return norm_beside(x, weight, bias, 1e-5, rms=rms, kernels=kernels)

    if shape[-1] in (33, 9001):
        compare(beside_itself, given, dtype)

    def added(x, residual, weight, bias=None, kernels="auto"):
        return add_norm(x, residual, weight, bias, 1e-5, rms=rms, kernels=kernels)

    compare(added, (x, residual, *given[1:]), dtype)
    if shape[-1] in (33, 9001):
        compare(after_a_bias(rms), (x, residual, *given[1:], place(shape[-1])), dtype)


@pytest.mark.parametrize("n", [24, 4100])
def test_norm_where_a_program_takes_many_rows_and_the_last_one_few(monkeypatch, n):
    monkeypatch.setattr("megatrain.kernels.norm.multiprocessors", lambda _device: 2)  # 23 rows over 4 programs, 6 each
    x, weight, bias = numbers(23, 1, n), numbers(n, seed=1), numbers(n, seed=2)
    compare(lambda x, w, b, kernels: norm(x, w, b, 1e-5, rms=False, kernels=kernels), (x, weight, bias), torch.float32)
    compare(after_a_bias(rms=False), (x, numbers(23, 1, n, seed=3), weight, bias, place(n)), torch.float32)


def test_norm_without_a_bias_and_of_which_one_result_is_used():
    x, residual, weight = numbers(6, 2, 40), numbers(6, 2, 40, seed=1), numbers(40, seed=2)
    compare(lambda x, w, kernels: norm(x, w, None, 1e-5, rms=False, kernels=kernels), (x, weight), torch.float32)
    compare(
        lambda x, r, w, kernels: add_norm(x, r, w, None, 1e-5, rms=True, kernels=kernels)[0],
        (x, residual, weight),
        torch.float32,
    )
    compare(
        lambda *given, kernels: after_a_bias(rms=True)(*given, kernels=kernels)[0],
        (x, residual, weight, place(40)),
        torch.float32,
    )


def test_norm_of_strided_rows():
    wide = numbers(5, 3, 80)
    compare(
        lambda x, w, kernels: norm(x[..., :40], w, None, 1e-5, rms=True, kernels=kernels),
        (wide, numbers(40, seed=1)),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize(("heads", "d", "pairs"), [(1, 2, 1), (3, 10, 5), (4, 16, 3), (5, 24, 12)])
def test_rotary(heads, d, pairs, interleaved, dtype):
    angles = numbers(7, 2, pairs, seed=1).detach()
    tables = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(x, cos, sin, kernels):
        return rotary(x, cos, sin, interleaved=interleaved, kernels=kernels)

    compare(turned, (numbers(7, 2, heads, d, dtype=dtype), *tables), dtype)


def test_rotary_of_a_part_of_one_matmuls_output():
    fused = numbers(6, 2, 3 * 4 * 8)
    angles = numbers(6, 2, 4, seed=1).detach()

    def turned(fused, cos, sin, kernels):
        return rotary(fused.split(32, -1)[1].unflatten(-1, (4, 8)), cos, sin, interleaved=False, kernels=kernels)

    compare(turned, (fused, angles.cos(), angles.sin()), torch.float32)


def turned_heads(whole, d, groups, turns):
    """What `heads` shall be, by torch alone: q|k|v [s, b, n] -> [s, b, heads, d] each."""
    q, k, v = whole.unflatten(-1, (-1, d)).split([whole.shape[-1] // d - 2 * groups, groups, groups], 2)
    if turns is None:
        return q, k, v
    out = []
    for x in (q, k):
        halves = []
        for place, half in zip(turns.places, x.chunk(len(turns.places), -1), strict=True):
            cos, sin = (table[place].double().unsqueeze(2) for table in (turns.cos, turns.sin))
            r = 2 * turns.pairs
            x1, x2 = (half[..., 0:r:2], half[..., 1:r:2]) if turns.interleaved else (half[..., : r // 2], half[..., r // 2 : r])
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            y = torch.stack([y1, y2], -1).flatten(-2) if turns.interleaved else torch.cat([y1, y2], -1)
            halves.append(torch.cat([y, half[..., r:]], -1))
        out.append(torch.cat(halves, -1))
    return *out, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("d", "groups", "places", "pairs", "interleaved"),
    [
        (8, 2, 0, 0, False),
        (8, 1, 1, 4, False),
        (10, 2, 1, 3, False),
        (8, 1, 1, 4, True),
        (10, 2, 1, 3, True),
        (12, 1, 2, 2, False),
    ],
    ids=["plain", "halves", "some", "neighbours", "some neighbours", "2d"],
)
def test_heads(d, groups, places, pairs, interleaved, dtype, monkeypatch):
    monkeypatch.setattr("megatrain.kernels.rotary.multiprocessors", lambda _device: 1)  # a program takes several tiles
    monkeypatch.setattr("megatrain.kernels.rotary.TILE", 64)
    s, b, width = 9, 2, 5 * groups * d
    biased = places < 2
    turns = None
    if places:
        angles = numbers(50, pairs, seed=1).detach()
        where = tuple(torch.randint(50, (s, b), generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(places))
        turns = Turns(angles.cos().to(dtype), angles.sin().to(dtype), where, interleaved)
    given = numbers(s, b, width, dtype=dtype)
    bias = torch.zeros(width, device=DEVICE, requires_grad=True)
    exact = given.detach().double().requires_grad_()
    outputs = turned_heads(exact, d, groups, turns)
    # Gradients as the fused kernels of torch give them: some in other orders, some spaced.
    scales = [numbers(b, y.shape[2], s, d, seed=2).detach().permute(2, 0, 1, 3) for y in outputs]
    scales[1] = torch.stack([scales[1], scales[1]], -1)[..., 0]
    (dwhole,) = torch.autograd.grad(outputs, exact, [y.double() for y in scales])
    for kernels in ("triton", "reference"):
        storage = given.detach().clone().requires_grad_()
        parts = together(storage * 1).split([3 * groups * d, groups * d, groups * d], -1)
        mine = heads(*parts, d, turns, bias=bias if biased else None, kernels=kernels)
        assert mine[0].data_ptr() == parts[0].data_ptr() and mine[2].data_ptr() == parts[2].data_ptr(), "where they lay"
        grads = torch.autograd.grad(mine, [storage, *([bias] if biased else [])], [y.to(dtype) for y in scales])
        close((*mine, grads[0]), (*outputs, dwhole), dtype)
        if biased:
            assert grads[1].dtype == torch.float32
            close(grads[1:], (dwhole.sum((0, 1)),), dtype)


def test_heads_of_parts_that_lie_apart():
    parts = [numbers(5, 2, n, seed=n) for n in (16, 8, 8)]
    angles = numbers(5, 4, seed=1).detach()
    turns = Turns(angles.cos(), angles.sin(), (torch.arange(5, device=DEVICE)[:, None].expand(5, 2),), False)
    exact = turned_heads(torch.cat(parts, -1).double(), 8, 1, turns)
    for kernels in ("triton", "reference"):
        found = heads(*parts, 8, turns, kernels=kernels)
        close(found, exact, torch.float32)
        close(torch.autograd.grad(sum(x.square().sum() for x in found), parts), [2 * p.double() for p in parts], torch.float32)


@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
@pytest.mark.parametrize("width", [1, 33, 1500])
def test_gated(width, kind, dtype):
    both = numbers(4, 3, 2 * width, dtype=dtype)
    compare(lambda x, kernels: gated(*x.split(width, -1), kind, kernels=kernels), (both,), dtype)
    compare(lambda x, kernels: gated(*x.chunk(2, 0), kind, kernels=kernels), (both,), dtype)


@pytest.mark.parametrize(("width", "kind", "dtype"), thinned([1, 33, 1500], PLAIN, BANDS), ids=str)
def test_activated(width, kind, dtype):
    x = numbers(4, 3, 2 * width, dtype=dtype)
    compare(lambda x, kernels: activated(x[..., width:], kind, kernels=kernels), (x,), dtype)


@pytest.mark.parametrize("dtype", BANDS, ids=str)
@pytest.mark.parametrize("kind", [*PLAIN, *GATES])
@pytest.mark.parametrize("processors", [132, 1], ids=["a row each", "rows together"])
def test_gradient_of_the_bias_before_an_activation(processors, kind, dtype, monkeypatch):
    monkeypatch.setattr("megatrain.kernels.gated.multiprocessors", lambda _device: processors)  # of 1: 23 rows over 8 programs
    width = 40 if kind in PLAIN else 80
    x, bias = numbers(23, 1, width), torch.zeros(width, device=DEVICE).requires_grad_()
    scale = numbers(23, 1, 40, seed=1).detach()
    wide = (x.detach().to(dtype).double() + bias.double()).requires_grad_()  # what is summed by torch from the product on
    act = PLAIN[kind](wide) if kind in PLAIN else GATES[kind](wide[..., :40]) * wide[..., 40:]
    (exact,) = torch.autograd.grad((act * scale).sum(), wide)
    for kernels in ("triton", "reference"):
        given = x.detach().to(dtype).requires_grad_()
        settings = {"bias": bias, "kernels": kernels}
        y = activated(given, kind, **settings) if kind in PLAIN else gated(*given.split(40, -1), kind, **settings)
        grads = torch.autograd.grad((y * scale.to(dtype)).sum(), (given, bias))
        assert grads[1].dtype == torch.float32
        close(grads, (exact, exact.sum((0, 1))), dtype)


def test_gradients_of_gate_and_up_lie_beside_one_another():
    both = numbers(4, 3, 20)
    for kernels in ("triton", "reference"):
        gate, up = (x.detach().requires_grad_() for x in both.split(10, -1))
        parts = torch.autograd.grad(gated(gate, up, "swiglu", kernels=kernels).sum(), (gate, up))
        assert beside(parts).data_ptr() == parts[0].data_ptr() and beside(parts).shape == (4, 3, 20)


@pytest.mark.parametrize(
    ("sizes", "with_sum", "dtype"),
    thinned([(1, 0), (1, 1), (29, 0), (29, 3), (5000, 120), (4097, 4000)], [False, True], BANDS),
    ids=str,
)
def test_cross_entropy(sizes, with_sum, dtype):
    """What lies in the padding, which could be anything, is not read; its gradient is zero."""
    rows, (columns, padding) = 9, sizes
    logits = numbers(rows, columns + padding, dtype=dtype).detach() * 3
    logits[:, columns:] = torch.inf
    local = torch.arange(rows, device=DEVICE) % columns
    here = torch.arange(rows, device=DEVICE) % 3 > 0
    factor, spread, label = (numbers(rows, seed=s).detach() for s in (1, 2, 3))
    sides = []
    for x, kernels in ((logits.clone(), "triton"), (logits.double(), "reference")):
        statistics = statistics_of(x, local, here, ids=columns, with_sum=with_sum, kernels=kernels)
        found = [t for t in statistics if t is not None]
        gradient_of(
            x, found[0], factor.to(found[0].dtype), spread.to(found[0].dtype) if with_sum else None, local, here,
            label.to(found[0].dtype), ids=columns, kernels=kernels,
        )  # fmt: skip
        assert (x[:, columns:] == 0).all()
        sides.append((*found, x))
    close(*sides, dtype)


def test_a_pytorch_for_cpus_alone_does_without_triton():
    """Every rank would wait for its import."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = (
        "import sys, megatrain.kernels.dispatch as d; print('triton' in sys.modules, d.triton is None, repr(d.TRITON_LACKS))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    of_a_gpu = bool(torch.version.cuda or torch.version.hip)
    assert said.split() == [str(of_a_gpu), str(not of_a_gpu), "''"]


def test_asking_for_what_cannot_be(monkeypatch):
    cpu = torch.device("cpu")
    assert not dispatch.use_triton("auto", cpu) and not dispatch.use_triton("reference", DEVICE)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"train\.kernels=triton cannot be: Triton has no cpu\. Use train\.kernels=auto"):
        dispatch.use_triton("triton", cpu)
    monkeypatch.setattr(dispatch, "triton", None)
    monkeypatch.setattr(dispatch, "TRITON_LACKS", "Triton is not installed: pip install 'megatrain[gpu]'")
    with pytest.raises(ValueError, match=r"Triton is not installed: pip install 'megatrain\[gpu\]'"):
        dispatch.use_triton("triton", cpu)
    assert not dispatch.use_triton("auto", torch.device("cuda"))
