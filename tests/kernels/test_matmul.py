"""Matrix products agree with float64 torch to the rounding of their dtype, whichever library serves."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.kernels import matmul as kernel
from megatrain.kernels.matmul import add_matmul, linear, matmul, steady_rows

SHAPES = [(1, 1, 1), (5, 7, 3), (1, 513, 2), (64, 33, 129), (0, 4, 3), (3, 0, 4), (4, 3, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
RULE = kernel._prefer_onednn.__wrapped__


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def onednn(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(kernel, "_prefer_onednn", lambda: request.param)
    return request.param


def tensors(m, k, n, dtype):
    generator = torch.Generator().manual_seed(m * 100 + k * 10 + n)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (k, n)))
    return a.to(dtype), b.to(dtype)


def near(got, want, a, b):
    """Within what rounding allows: each sum in at least float32, its result once to the dtype of `got`."""
    wide = torch.promote_types(a.dtype, torch.float32)
    sizes = a.double().abs() @ b.double().abs()
    results = torch.finfo(a.dtype).eps + torch.finfo(got.dtype).eps
    bound = torch.finfo(wide).eps * (a.shape[1] + 1) * sizes + results * want.abs()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= bound).all(), f"{((got.double() - want).abs() / bound).max()} times the bound"


LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns of a wider matrix": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
}


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_products(m, k, n, dtype, layout):
    a, b = tensors(m, k, n, dtype)
    want = a.double() @ b.double()
    strided = LAYOUTS[layout]
    near(matmul(strided(a), b), want, a, b)
    near(matmul(a, strided(b)), want, a, b)
    near(matmul(strided(a), strided(b)), want, a, b)
    near(linear(strided(a), strided(b.t().contiguous())), want, a, b)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (1, 2, 3)])
def test_linear_over_any_number_of_dims(leading, dtype):
    a, b = tensors(6, 7, 5, dtype)
    bias = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64).to(dtype)
    got = linear(a.view(*leading, 7), b.t().contiguous(), bias)
    assert got.shape == (*leading, 5) and got.dtype == dtype
    a_and_one, b_and_bias = torch.cat([a, a.new_ones(6, 1)], 1), torch.cat([b, bias[None]])  # the bias as one more product
    near(got.view(6, 5), a_and_one.double() @ b_and_bias.double(), a_and_one, b_and_bias)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("out", "dtype"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str
)
def test_sums_of_products_are_as_wide_as_their_output(out, dtype, layout):
    a, b = tensors(9, 6, 4, dtype)
    storage = torch.full((3, 9, 4), 0.5, dtype=out)
    total = storage[1]
    for _ in range(2):
        add_matmul(total, LAYOUTS[layout](a), LAYOUTS[layout](b))
    near(
        total,
        0.5 + 2 * (a.double() @ b.double()),
        torch.cat([a, a, a.new_full((9, 1), 0.5)], 1),
        torch.cat([b, b, b[:1] * 0 + 1]),
    )
    assert total.dtype == out and (storage[::2] == 0.5).all(), "only the output is written"


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_the_first_product_is_written_over_whatever_there_is(m, k, n, dtype):
    a, b = tensors(m, k, n, dtype)
    storage = torch.full((3, m, n), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    add_matmul(storage[1], a, b, first=True)
    near(storage[1], a.double() @ b.double(), a, b)
    assert storage[::2].isnan().all()


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "k", "n"), [(torch.float32, 64, 192), (torch.float32, 100, 21), (torch.float64, 64, 48)])
def test_a_row_has_the_same_bits_beside_any_number_of_rows(dtype, k, n, threads):
    row, weight = (x.to(dtype) for x in tensors(1, k, n, dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    counts = {steady_rows(count, row.device, dtype) for count in range(1, 300)}
    products = torch.cat([linear(row.expand(count, k).contiguous(), weight.t().contiguous()) for count in sorted(counts)])
    torch.set_num_threads(before)
    assert min(counts) == 4 and torch.equal(products, products[:1].expand_as(products))
    assert steady_rows(5, torch.device("cpu"), torch.bfloat16) == 5 == steady_rows(5, torch.device("cuda"), dtype)


def test_small_bfloat16_products_are_not_lost_in_a_float32_sum():
    total = torch.zeros(1, 1)
    for _ in range(1000):
        add_matmul(total, torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    assert total.item() == 1000  # bfloat16 would stop at 256


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "size", "served"), [(torch.float32, 4, True), (torch.float64, 4, False), (torch.float32, 0, False)], ids=str
)
def test_onednn_serves_float32_alone(onednn, dtype, size, served):
    x = torch.ones(size, 3, dtype=dtype)
    for call in (lambda: linear(x, x), lambda: matmul(x.t(), x), lambda: add_matmul(torch.zeros(3, 3, dtype=dtype), x.t(), x)):
        with Operators() as ran:
            call()
        assert ("mkldnn::_linear_pointwise" in ran.names) == (onednn and served)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    "pair", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_two_dtypes_are_refused_by_torch_whichever_library_serves(pair):
    a, b = (torch.ones(4, 4, dtype=dtype) for dtype in pair)
    for call in (lambda: linear(a, b), lambda: linear(a, b, b[0]), lambda: matmul(a, b)):
        with pytest.raises(RuntimeError, match="same dtype"):
            call()


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize(("rows", "biased"), [(4, True), (4, False), (0, True)])
def test_onednn_adds_the_bias_of_bf16(monkeypatch, has, rows, biased):
    monkeypatch.setattr(kernel, "_onednn_has_bf16", lambda: has)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((rows, 3, 8), (5, 8), (5,)))
    with Operators() as ran:
        y = linear(x, weight, bias if biased else None)
    assert ("mkldnn::_linear_pointwise" in ran.names) == (has and rows > 0 and biased)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)


def test_a_product_is_added_to_a_wider_tensor_in_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "WIDENED", 10)
    torch.manual_seed(0)
    a, b, out = torch.randn(7, 6).bfloat16(), torch.randn(6, 3).bfloat16(), torch.randn(7, 3)
    expected = out + (a @ b).float()
    add_matmul(out, a, b)
    assert torch.equal(out, expected)


class InsideTheMatmul(TorchDispatchMode):
    """What torch does on a GPU, on the CPU: `addmm` of 16-bit matrices into a float32 output, or refuses, or adds up in 16 bits."""

    def __init__(self, does="adds"):
        super().__init__()
        self.does, self.calls = does, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() != "aten::addmm.dtype_out":
            return function(*args, **(kwargs or {}))
        self.calls += 1
        if self.does == "refuses":
            raise RuntimeError("self and mat2 must have the same dtype")
        total, a, b, dtype = args
        out = kwargs["out"]
        assert dtype == out.dtype == total.dtype == torch.float32 and out.data_ptr() == total.data_ptr()
        found = a.float() @ b.float()
        if kwargs.get("beta", 1) == 1:
            found += total
        return out.copy_(found.bfloat16() if self.does == "rounds" else found)


TRIED = kernel.adds_inside.__wrapped__


@pytest.mark.parametrize(("does", "inside"), [("adds", True), ("refuses", False), ("rounds", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_gpu_can_is_tried_out(monkeypatch, dtype, does, inside):
    for name in ("ones", "full"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, make=make, device, **rest: make(*size, **rest))
    with InsideTheMatmul(does) as gpu:
        assert TRIED(torch.device("cuda"), dtype) is inside
    assert gpu.calls == 1


def test_nothing_is_tried_on_a_cpu_or_for_matrices_as_wide_as_their_sum():
    with InsideTheMatmul() as gpu:
        assert not TRIED(torch.device("cpu"), torch.bfloat16) and not TRIED(torch.device("cuda"), torch.float32)
    assert gpu.calls == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(9, 6, 4), (64, 33, 129), (4, 0, 3)])
def test_a_product_joins_its_float32_sum_inside_the_matmul(monkeypatch, m, k, n, dtype):
    """Unrounded, unlike the product that is written first; and an empty one is none."""
    monkeypatch.setattr(kernel, "adds_inside", lambda device, of: of == dtype)
    dy, x = tensors(k, m, 1, dtype)[0], tensors(k, n, 1, dtype)[0]
    storage = torch.full((3, m, n), 0.5)
    with InsideTheMatmul() as gpu:
        add_matmul(storage[1], dy.t(), x)
    assert gpu.calls == (k > 0) and (storage[::2] == 0.5).all()
    torch.testing.assert_close(storage[1].double(), 0.5 + dy.double().t() @ x.double(), rtol=1e-5, atol=1e-5)
    storage[1] = torch.nan
    with InsideTheMatmul() as gpu:
        add_matmul(storage[1], dy.t(), x, first=True)
    assert gpu.calls == (k > 0)
    torch.testing.assert_close(storage[1].double(), dy.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_gpu_adds_to_float32_sums_whichever_way_it_has(monkeypatch, m, k, n, dtype):
    dy, x = (t.cuda() for t in (tensors(k, m, 1, dtype)[0], tensors(k, n, 1, dtype)[0]))
    exact = 0.5 + dy.double().t() @ x.double()
    for inside in {kernel.adds_inside(dy.device, dtype), False}:
        monkeypatch.setattr(kernel, "adds_inside", lambda *_, inside=inside: inside)
        storage = torch.full((3, m, n), 0.5, device="cuda")
        add_matmul(storage[1], dy.t(), x)
        band = 1e-5 if inside else 1e-2
        torch.testing.assert_close(storage[1].double(), exact, rtol=band, atol=band)
        assert (storage[::2] == 0.5).all()


@pytest.mark.parametrize(
    ("available", "capability", "cpu", "prefer"),
    [
        (True, "AVX512", "vendor_id : AuthenticAMD", True),
        (True, "AVX512", "vendor_id : GenuineIntel", False),
        (True, "AVX2", "vendor_id : AuthenticAMD", False),
        (False, "AVX512", "vendor_id : AuthenticAMD", False),
        (True, "AVX512", None, False),
    ],
)
def test_the_choice_is_a_rule(monkeypatch, available, capability, cpu, prefer):
    def read(path):
        if cpu is None:
            raise FileNotFoundError(path)
        return cpu

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", read)
    assert RULE() is prefer
