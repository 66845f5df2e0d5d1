"""numba's kernels for BF16 on a CPU against the reference in float32 of the same numbers, rounded once."""

import builtins
import importlib.util
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatrain.kernels import dispatch
from megatrain.kernels.adamw import Update
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.gated import GATES, PLAIN, activated, gated
from megatrain.kernels.norm import add_biased_norm, add_norm, norm, norm_beside
from megatrain.kernels.rotary import heads

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDED = 2.0**-8
"""Half of the distance of two BF16 numbers, of the smaller one: what rounding may add."""


@pytest.fixture(autouse=True)
def for_all_sizes(monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST", 0)
    monkeypatch.setattr("megatrain.kernels.norm.NARROWEST", 1)


def numbers(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16().requires_grad_()


def once_rounded(mine, exact, absolute=1e-6):
    """mine: BF16; exact: float32."""
    assert mine.dtype == torch.bfloat16 and mine.shape == exact.shape
    error = (mine.float() - exact).abs() - (1 + 2.0**-6) * ROUNDED * exact.abs()
    assert float(error.detach().max()) <= absolute


def compare(function, *given, sums=()):
    """Values and gradients of function(*given, kernels), numba's against the reference in float32; `sums` have a gradient in float32."""
    wide = [None if x is None else x.detach().float().requires_grad_() for x in given]
    with torch.no_grad():
        scales = [
            torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16() for y in function(*wide, "reference")
        ]
    gradients = []
    for tensors, kernels in ((given, "numba"), (wide, "reference")):
        ys = function(*tensors, kernels)
        torch.autograd.backward(ys, [scale.to(y.dtype) for y, scale in zip(ys, scales, strict=True)])
        gradients.append((ys, [None if x is None else x.grad for x in tensors]))
    (mine, dmine), (exact, dexact) = gradients
    for a, b in zip(mine, exact, strict=True):
        once_rounded(a, b)
    for i, (a, b) in enumerate(zip(dmine, dexact, strict=True)):
        if a is not None:
            rows = math.prod(given[0].shape[:-1])
            once_rounded(a.bfloat16(), b, 2e-6 * rows if i in sums else 4e-6)  # torch's tanh is no better


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 37), (2, 7, 64), (40, 100)], ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_activations(kind, shape):
    compare(lambda x, kernels: [activated(x, kind, kernels=kernels)], numbers(*shape, scale=3))


@pytest.mark.parametrize("shape", [(5, 1), (3, 37), (40, 100)], ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind, shape):
    both = numbers(*shape[:-1], 2 * shape[-1], scale=3)
    compare(lambda x, kernels: [gated(*x.chunk(2, -1), kind, kernels=kernels)], both)


def test_a_bias_before_an_activation_has_its_gradient():
    x, place = numbers(70, 33), torch.zeros(33, requires_grad=True)
    activated(x, "gelu_tanh", bias=place, kernels="numba").backward(torch.ones(70, 33).bfloat16())
    wide = x.detach().float().requires_grad_()
    functional.gelu(wide, approximate="tanh").sum().backward()
    assert float((place.grad - wide.grad.sum(0)).abs().max()) < 2e-5
    both, place = numbers(70, 66), torch.zeros(66, requires_grad=True)
    gated(*both.chunk(2, -1), "swiglu", bias=place, kernels="numba").backward(torch.ones(70, 33).bfloat16())
    wide = both.detach().float().requires_grad_()
    (functional.silu(wide[:, :33]) * wide[:, 33:]).sum().backward()
    assert float((place.grad - wide.grad.sum(0)).abs().max()) < 2e-5


@pytest.mark.parametrize("kind", PLAIN)
def test_activations_of_numbers_at_the_edge(kind):
    edge = torch.tensor([math.nan, 1e30, -1e30, 0.0, -20.0, -90.0, 1e-40, math.inf]).bfloat16()
    mine, theirs = (activated(edge, kind, kernels=kernels).float() for kernels in ("numba", "reference"))
    assert mine.isnan().tolist() == [True] + 7 * [False] and mine[7] == math.inf  # of which torch's gelu makes NaN
    assert torch.allclose(mine[1:7], theirs[1:7], rtol=2 * ROUNDED, atol=1e-30)
    slopes = []
    for kernels in ("numba", "reference"):
        x = edge.clone().requires_grad_()
        activated(x, kind, kernels=kernels).backward(torch.tensor([1.0] * 4 + [1.0, 1.0, math.nan, 1.0]).bfloat16())
        slopes.append(x.grad.float())
    assert bool(slopes[0][6].isnan()) and (kind == "relu" or bool(slopes[0][0].isnan()))
    assert torch.allclose(slopes[0][3:6], slopes[1][3:6], rtol=2 * ROUNDED, atol=1e-30)


MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(window=40),
    "documents": AttentionMask(documents=torch.arange(300).div(70, rounding_mode="floor")[:, None].expand(300, 2)),
}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention(mask, heads):
    """300 tokens: blocks of 128, 128 and 44. Scores and weights are rounded to BF16 on the way, by the reference too."""
    shapes = [(300, 2, heads[0], 16), (300, 2, heads[1], 16), (300, 2, heads[1], 16)]
    found = {}
    for kernels in ("numba", "reference"):
        given = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
        y = attention(*given, Variant(mask, kernels=kernels))
        y.backward(numbers(*y.shape, seed=5).detach())
        found[kernels] = [y.detach().float(), *(x.grad.float() for x in given)]
    for mine, theirs in zip(found["numba"], found["reference"], strict=True):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < 2 * ROUNDED
        assert float((mine - theirs).abs().mean() / theirs.abs().mean()) < ROUNDED / 8


def test_softmax_of_rows():
    from megatrain.kernels.cpu_softmax import softmax

    x = numbers(2, 3 * 5, 9, scale=4).detach()
    exact = x.float()
    for row in range(15):
        exact[:, row, 9 - 5 + 1 + row % 5 :] = -math.inf
    once_rounded(softmax(x, 5), exact.softmax(-1))
    one = numbers(7, 1).detach()
    assert softmax(one, 1).tolist() == [[1.0]] * 7
    rows = torch.tensor(
        [
            [-math.inf, 0.0, -math.inf, 0.0],
            [-math.inf] * 4,
            [math.nan, 0.0, 1.0, 2.0],
            [-math.nan, 0.0, 1.0, 2.0],
            [math.inf, 0.0, 1.0, 2.0],
            [-3e38, -3e38, -3e38, -3e38],
            [-300.0, 0.0, -89.0, 0.0],
        ]
    ).bfloat16()
    rows.view(torch.int16)[3, 0] = -1  # NaN with a sign
    found = softmax(rows, 1)
    assert found[0].tolist() == [0.0, 0.5, 0.0, 0.5] == found[6].tolist()
    assert bool(found[1:5].isnan().all())
    assert found[5].tolist() == [0.25] * 4


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("spread", [False, True])
def test_cross_entropy(padding, spread):
    logits = numbers(40, 2, 37 + padding, scale=3).detach()[:, 1]  # rows that are not side by side
    local, here = torch.arange(40) % 37, torch.arange(40) % 3 > 0
    factor, label = numbers(40, seed=1).detach().float(), torch.arange(40) / 7
    each = numbers(40, seed=2).detach().float() if spread else None
    exact = logits[:, :37].float()
    top, total, found, _ = statistics_of(logits, local, here, ids=37, kernels="numba")
    assert torch.equal(top, exact.amax(1))
    assert torch.allclose(total, (exact - top[:, None]).exp().sum(1), rtol=2e-6)
    assert torch.equal(found, exact.gather(1, local[:, None])[:, 0] * here)
    gradient_of(logits, top, factor, each, local, here, label, ids=37, kernels="numba")
    expected = factor[:, None] * (exact - top[:, None]).exp() - (0 if each is None else each[:, None])
    expected[here, local[here]] = label[here]
    assert float((logits[:, :37].float() - expected).abs().max()) < 2 * ROUNDED * 4  # of exponentials and of the product
    assert logits[:, 37:].tolist() == [[0.0] * padding] * 40


def test_a_row_of_logits_with_nan_has_nan_and_no_other():
    logits = numbers(3, 20).detach()
    logits[1, 4] = math.nan
    _, total, _, _ = statistics_of(logits, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), kernels="numba")
    assert total.isnan().tolist() == [False, True, False]


def test_gradients_of_heads_lie_beside_one_another():
    found = []
    for kernels in ("numba", "reference"):
        whole, place = numbers(5, 3, 40), torch.zeros(40, requires_grad=True)
        q, k, v = heads(*whole.clone().split([24, 8, 8], -1), 8, bias=place, kernels=kernels)
        dys = [numbers(3, x.shape[2], 5, 8, seed=i).detach().permute(2, 0, 1, 3) for i, x in enumerate((q, k, v))]
        torch.autograd.backward([q, k, v], dys)
        assert torch.equal(whole.grad, torch.cat([dy.flatten(2) for dy in dys], -1))
        found.append(place.grad)
    plain = numbers(5, 3, 40)
    y = torch.cat(heads(*plain.clone().split([24, 8, 8], -1), 8, kernels="numba"), 2)
    y.backward(numbers(*y.shape, seed=4).detach())
    assert torch.equal(plain.grad, numbers(*y.shape, seed=4).detach().flatten(2)), "without a bias"
    exact = whole.grad.float().sum((0, 1))
    assert float((found[0] - exact).abs().max()) < 1e-5 < float((found[1] - exact).abs().max())


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 2, 33), (70, 1, 256), (5, 7, 1000)], ids=str)
@pytest.mark.parametrize("rms", [True, False], ids=["rmsnorm", "layernorm"])
def test_norm(rms, shape):
    n = shape[-1]
    x = numbers(*shape, scale=2)
    weight, bias = numbers(n, seed=1), None if rms else numbers(n, seed=2)
    compare(lambda *given: [norm(*given[:3], 1e-5, rms=rms, kernels=given[-1])], x, weight, bias, sums=(1, 2))
    fresh = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    compare(lambda *given: norm_beside(*given[:3], 1e-5, rms=rms, kernels=given[-1]), *fresh, sums=(1, 2))


@pytest.mark.parametrize("rms", [True, False], ids=["rmsnorm", "layernorm"])
def test_norm_after_an_addition(rms):
    n = 96
    x, residual = numbers(9, 2, n), numbers(9, 2, n, seed=3)
    weight, bias = numbers(n, seed=1), None if rms else numbers(n, seed=2)
    place = torch.zeros(n, requires_grad=True)
    scales = numbers(9, 2, n, seed=4).detach(), numbers(9, 2, n, seed=5).detach()
    ys = add_biased_norm(x, residual, weight, bias, place, 1e-5, rms=rms, kernels="numba")
    torch.autograd.backward(ys, scales)
    added = (x + residual).detach()
    assert torch.equal(ys[1], added)
    wide = added.float().requires_grad_()
    w, b = weight.detach().float().requires_grad_(), None if bias is None else bias.detach().float().requires_grad_()
    exact = norm(wide, w, b, 1e-5, rms=rms, kernels="reference")
    once_rounded(ys[0], exact)
    torch.autograd.backward([exact, wide], [scale.float() for scale in scales])
    once_rounded(x.grad, wide.grad, 2e-6)
    assert torch.equal(x.grad, residual.grad)
    once_rounded(weight.grad, w.grad, 1e-5)
    sums = wide.grad.flatten(0, 1).sum(0)
    assert float((place.grad - sums).abs().max()) < 18 * ROUNDED  # of what was rounded
    y, total = add_norm(x.detach(), residual.detach(), weight, bias, 1e-5, rms=rms, kernels="numba")
    assert torch.equal(y, ys[0]) and torch.equal(total, ys[1])


def test_of_a_norm_whose_result_alone_is_used_and_of_views():
    wide = numbers(6, 4, 200).detach()
    x = wide[:, 1:3, 40:104].requires_grad_()
    weight = numbers(64, seed=1)
    y, _ = norm_beside(x, weight, None, 1e-5, rms=True, kernels="numba")
    y.backward(torch.ones_like(y))
    again = x.detach().contiguous().requires_grad_()
    norm(again, weight, None, 1e-5, rms=True, kernels="numba").backward(torch.ones_like(y))
    assert torch.equal(x.grad, again.grad)
    row = numbers(3, 64).detach()
    row[1, 5] = math.nan
    assert norm(row, weight, None, 1e-5, rms=True, kernels="numba").isnan().any(-1).tolist() == [False, True, False]


def everything():
    """Results of every kernel."""
    from megatrain.kernels.cpu_adamw import adam
    from megatrain.kernels.cpu_heads import add
    from megatrain.kernels.cpu_softmax import softmax

    x, place = numbers(30, 64), torch.zeros(64, requires_grad=True)
    gate, up, residual, weight, bias = (numbers(*shape, seed=3) for shape in ((30, 64),) * 3 + ((64,),) * 2)
    before, whole, beside = torch.zeros(64, requires_grad=True), numbers(5, 3, 40, seed=6), torch.zeros(40, requires_grad=True)
    outputs = [
        activated(x, "gelu_tanh", bias=place, kernels="numba"),
        gated(gate, up, "swiglu", kernels="numba"),
        *add_biased_norm(x, residual, weight, bias, before, 1e-5, rms=False, kernels="numba"),
        *heads(*whole.clone().split([24, 8, 8], -1), 8, bias=beside, kernels="numba"),
    ]
    torch.autograd.backward(outputs, [numbers(*y.shape, seed=7).detach() for y in outputs])
    logits, local, here = numbers(30, 41, seed=8).detach(), torch.arange(30) % 37, torch.arange(30) % 3 > 0
    top, total, _, _ = statistics_of(logits, local, here, ids=37, kernels="numba")
    gradient_of(logits, top, total, None, local, here, total, ids=37, kernels="numba")
    weights, low, moments = numbers(3000, seed=9).detach(), torch.zeros(3000, dtype=torch.int16), torch.zeros(2, 3000)
    update = Update(0.1, (0.9, 0.95), 1e-8, 0.0, torch.ones(()), torch.ones(()), torch.zeros(()))
    adam(update, 0.1, weights, None, low, numbers(3000, seed=10).detach().float(), *moments, decoupled=True)
    of_keys = torch.zeros(5, 9, 8)
    add(of_keys[:, 2:6], numbers(5, 4, 8).detach())
    leaves = [leaf.grad for leaf in (x, place, gate, up, residual, weight, bias, before, whole, beside)]
    rows = [softmax(numbers(4, block * 3, 40, scale=3).detach(), block) for block in (1, 5, 16)]
    return [*outputs, *leaves, top, total, logits, weights, low, moments, of_keys, *rows]


def of_a_norm():
    """What a norm computes: rows, and sums over them."""
    x, weight = numbers(30, 64), numbers(64, seed=3)
    y = norm(x, weight, None, 1e-5, rms=True, kernels="numba")
    y.backward(numbers(30, 64, seed=7).detach())
    return [y, x.grad, weight.grad]


def same_on_two_threads(monkeypatch, compute):
    from megatrain.kernels import cpu

    alone = compute()
    monkeypatch.setattr(cpu, "SPLIT", 1)
    torch.set_num_threads(2)
    try:
        together = compute()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert [torch.equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(alone)


def test_the_bits_are_the_same_on_more_threads(monkeypatch):
    same_on_two_threads(monkeypatch, of_a_norm)


@pytest.mark.slow  # numba compiles each kernel again for threads: 15 seconds of a core
def test_the_bits_of_every_kernel_are_the_same_on_more_threads(monkeypatch):
    from megatrain.kernels import cpu, cpu_adamw, cpu_gated, cpu_heads, cpu_norm, cpu_softmax

    same_on_two_threads(monkeypatch, everything)
    modules = (cpu_adamw, cpu_gated, cpu_heads, cpu_norm, cpu_softmax)
    kernels = {name: made for module in modules for name, made in vars(module).items() if isinstance(made, cpu.Kernel)}
    assert len(kernels) > 9 and [name for name, made in kernels.items() if not made.split.signatures] == []


def test_who_serves(monkeypatch):
    monkeypatch.undo()
    cpu, big = torch.device("cpu"), torch.empty(1 << 14, dtype=torch.bfloat16)
    assert [dispatch.use_numba(kernels, big) for kernels in ("auto", "numba", "triton", "reference")] == [
        True,
        True,
        False,
        False,
    ]
    assert not dispatch.use_numba("auto", big[1:]) and not dispatch.use_numba("auto", big.float())
    assert not dispatch.use_numba("auto", big.to("meta"))
    assert dispatch.require("auto", cpu, torch.bfloat16) == dispatch.require("numba", cpu, torch.bfloat16) == "numba"
    assert dispatch.require("auto", cpu, torch.float32) == dispatch.require("reference", cpu, torch.bfloat16) == "plain PyTorch"
    with pytest.raises(
        ValueError, match=r"numba cannot be: its kernels are for bfloat16, and this is torch.float32\. Use train.k"
    ):
        dispatch.require("numba", cpu, torch.float32)
    with pytest.raises(
        ValueError, match=r"numba cannot be: its kernels are for a CPU, and this is cuda\. Use train.kernels=auto"
    ):
        dispatch.require("numba", torch.device("cuda"), torch.bfloat16)


def test_without_numba_or_its_threads(monkeypatch):
    monkeypatch.setattr(dispatch, "_numba_splits", lambda: False)
    assert dispatch.numba_lacks() is None  # one thread
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x = torch.empty(1 << 14, dtype=torch.bfloat16)
    assert not dispatch.use_numba("auto", x)
    with pytest.raises(
        ValueError, match=r"no OpenMP here, and so no use for 4 threads: set OMP_NUM_THREADS=1, or install libgomp"
    ):
        dispatch.require("numba", x.device, x.dtype)
    monkeypatch.setattr(dispatch, "_numba_itself_lacks", lambda: "numba is not installed: pip install 'megatrain[cpu]'")
    said = "plain PyTorch (numba is not installed: pip install 'megatrain[cpu]')"
    assert dispatch.require("auto", x.device, x.dtype) == said
    with pytest.raises(
        ValueError, match=r"numba is not installed: pip install 'megatrain\[cpu\]'\. Use train.kernels=auto, or"
    ):
        dispatch.require("numba", x.device, x.dtype)


IMPORTS = [
    (ModuleNotFoundError("No module named 'LIB'", name="LIB"), "is not installed: INSTALL"),
    (ModuleNotFoundError("No module named 'other'", name="other"), "(ModuleNotFoundError: No module named 'other'): AGAIN"),
    (ImportError("needs NumPy 2.4 or less."), "(ImportError: needs NumPy 2.4 or less): AGAIN"),
    (OSError("Could not find/load\n  shared object file"), "(OSError: Could not find/load shared object file): AGAIN"),
    (SystemError("initialization failed"), "(SystemError: initialization failed): AGAIN"),
    (AttributeError("no attribute 'ir'"), "(AttributeError: no attribute 'ir'): AGAIN"),
    (RuntimeError(), "(RuntimeError): AGAIN"),
]


@pytest.mark.parametrize(("error", "told"), IMPORTS)
def test_a_library_that_does_not_import_is_done_without_and_told_of(error, told, monkeypatch):
    """numba when it is first asked for, Triton when the module is imported, here under a name of its own."""

    def said(library, packages, extra):
        why = told.replace("LIB", library.lower()).replace("INSTALL", f"pip install 'megatrain[{extra}]'")
        why = why.replace("AGAIN", f"pip uninstall -y {packages} && pip install 'megatrain[{extra}]'")
        return f"{library} {'' if why.startswith('is') else 'cannot be imported '}{why}"

    def raised(library, *_):
        if library not in ("numba", "triton"):
            return importing(library, *_)
        raise (
            ModuleNotFoundError(str(error), name=error.name.replace("LIB", library))
            if isinstance(error, ModuleNotFoundError)
            else error
        )

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", raised)
    fresh = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("fresh", dispatch.__file__))
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(fresh, "import_module", raised)
    cpu, gpu, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    for kernels, device, why in (
        ("numba", cpu, said("numba", "numba llvmlite", "cpu")),
        ("triton", gpu, said("Triton", "triton", "gpu")),
    ):
        assert fresh.require("auto", device, bf16) == f"plain PyTorch ({why})"
        with pytest.raises(
            ValueError, match=re.escape(f"train.kernels={kernels} cannot be: {why}. Use train.kernels=auto, or")
        ):
            fresh.require(kernels, device, bf16)
    assert fresh.require("auto", cpu, torch.float32) == "plain PyTorch" and not fresh.use_numba(
        "auto", torch.ones(1 << 14).bfloat16()
    )


def test_kernels_are_kept_where_a_user_may_write_and_nowhere_else(tmp_path, monkeypatch):
    from megatrain.kernels.cpu import cache_folder

    given = cache_folder.__wrapped__
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert given().parent == tmp_path / "mine" and given().is_dir()
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert given().parent == tmp_path / "cache/megatrain"
    folder = given()
    assert folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o720, 0o702):  # others could leave code there
        folder.chmod(mode)
        assert given() is None
    folder.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1)
    assert given() is None
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert given() is None


def test_a_full_disk_and_a_broken_file_stop_no_kernel(tmp_path, monkeypatch):
    from numba.core.caching import IndexDataCacheFile

    from megatrain.kernels import cpu

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    setting = cpu.numba.config.CACHE_DIR
    kernel = cpu.Kernel(fill)
    assert setting == cpu.numba.config.CACHE_DIR  # other code compiled in this process keeps its own cache
    x = np.zeros(3, np.float32)
    kernel(3, x, 2.0)
    assert x.tolist() == [2.0, 2.0, 2.0]
    (index,) = tmp_path.glob("*/*.nbi")
    index.write_bytes(index.read_bytes()[:40])
    cpu.Kernel(fill)(3, x, 4.0)
    assert x.tolist() == [4.0, 4.0, 4.0]


def fill(x, value):
    for i in range(len(x)):
        x[i] = value
