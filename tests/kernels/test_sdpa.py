"""Of torch's fused kernels the fastest serves that takes the shape and errs not; what it is given are views."""

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.kernels import sdpa
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.sdpa import Case, Choice, Shape, choose, choose_by, fused, tried

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(s=1024, b=4, heads=12, groups=12, d=64)
SMALL = Shape(s=150, b=2, heads=4, groups=2, d=16)


def chosen(times, deterministic=False, asked=None):
    """The choice where kernels take so long, or refuse with a reason."""

    def trial(name, case, timed):
        if asked is not None:
            asked.append((name, timed))
        if isinstance(times[name], str):
            raise RuntimeError(times[name])
        return times[name]

    return choose_by(trial, Shape(s=8, b=4, heads=12, groups=12, d=64), torch.bfloat16, CPU, deterministic)


@pytest.mark.parametrize(
    ("times", "order", "note"),
    [
        (
            {"cudnn": 2.0, "flash": 2.6, "efficient": 4.2},
            ("cudnn", "flash", "efficient"),
            "attention: cudnn (flash 1.3x as long, efficient 2.1x as long) at [4, 12, 8, 64]",
        ),
        (
            {"cudnn": 9.0, "flash": 2.0, "efficient": 3.0},
            ("flash", "efficient", "cudnn"),
            "attention: flash (efficient 1.5x as long, cudnn 4.5x as long) at [4, 12, 8, 64]",
        ),
        (  # equals keep torch's order, so that the next start chooses the same
            {"cudnn": 2.08, "flash": 2.0, "efficient": 2.9},
            ("cudnn", "flash", "efficient"),
            "attention: cudnn (flash 1.0x as long, efficient 1.4x as long) at [4, 12, 8, 64]",
        ),
        (
            {"cudnn": "No execution plans\nsupport the graph.", "flash": "heads of 320", "efficient": 1.0},
            ("efficient",),
            "attention: efficient at [4, 12, 8, 64] | left out: cudnn: No execution plans; flash: heads of 320",
        ),
        (
            {"cudnn": "a", "flash": "b", "efficient": "c"},
            (),
            "attention: in blocks of queries at [4, 12, 8, 64], as no fused kernel serves (cudnn: a; flash: b; efficient: c)",
        ),
    ],
)
def test_the_fastest_leads(times, order, note):
    assert chosen(times) == Choice(order, note)


def test_a_deterministic_run_takes_the_first_that_serves_whatever_the_clock_says():
    asked = []
    choice = chosen({"cudnn": 1.0, "flash": 3.0, "efficient": 1.0}, deterministic=True, asked=asked)
    assert choice == Choice(
        ("flash", "efficient"), "attention: flash, the first that serves in the order of a deterministic run at [4, 12, 8, 64]"
    )
    assert asked == [("flash", False), ("efficient", False)]
    assert chosen({"flash": "no", "efficient": 1.0}, deterministic=True).order == ("efficient",)


def test_without_room_for_a_trial_the_usual_order_serves(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Case, "of", full)
    assert chosen({}) == Choice(
        ("flash", "efficient"),
        "attention: flash or efficient, untried, since the device has no room for q, k and v at [4, 12, 8, 64]",
    )


def test_off_gpus_nothing_is_tried():
    assert choose(SHAPE, torch.bfloat16, CPU, False) == Choice(("flash", "efficient"), "")
    assert choose(SHAPE, torch.bfloat16, torch.device("meta"), True).note == ""


@pytest.mark.parametrize("shape", [SMALL, Shape(s=5, b=1, heads=3, groups=3, d=8)], ids=["grouped", "short"])
def test_a_kernel_that_errs_in_any_of_its_results_is_seen(shape):
    case = Case.of(shape, torch.float32, CPU)
    right = case.results()
    assert case.deviation(right) < 1e-5
    for number in range(4):
        wrong = [x.clone() for x in right]
        wrong[number][-1, -1, -1] += 1
        assert case.deviation(wrong) > sdpa.WRONG
    assert case.deviation([x.bfloat16() for x in right]) < sdpa.WRONG / 5, "rounding is no error"
    for number in range(4):
        broken = [x.clone() for x in right]
        broken[number][-1, -1] = float("nan")
        assert not case.deviation(broken) <= sdpa.WRONG


def test_a_trial_tells_why_a_kernel_does_not_serve(monkeypatch):
    case = Case.of(SMALL, torch.float32, CPU)
    with pytest.raises(RuntimeError, match=r"refuses the shape|cuda"):
        tried("flash", case, False)
    monkeypatch.setitem(sdpa.BACKENDS, "flash", (SDPBackend.MATH, lambda params, debug: params.is_causal and params.enable_gqa))
    assert tried("flash", case, False) == 0.0
    kernel = sdpa.scaled_dot_product_attention
    for factor, said in ((1.1, "wrong by 0.1 "), (float("nan"), "wrong by nan")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=said):
            patch.setattr(sdpa, "scaled_dot_product_attention", lambda *x, f=factor, **y: f * kernel(*x, **y))
            tried("flash", case, False)


class Calls(TorchDispatchMode):
    """The names of operators, and the strides of what attention is given."""

    def __init__(self):
        super().__init__()
        self.names, self.strides = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.names.append(name)
        if "attention" in name and not self.strides:
            self.strides = [x.stride() for x in args[:3]]
        return function(*args, **(kwargs or {}))


def test_attention_takes_the_parts_of_a_product_and_its_gradient_as_they_lie():
    s, b, a, d = 12, 3, 4, 8
    product = torch.randn(s, b, 3 * a * d)
    q, k, v = (x.unflatten(-1, (a, d)).requires_grad_() for x in product.split(a * d, -1))
    dy = torch.randn(s, b, a * d)
    with Calls() as calls:
        y = fused(q, k, v)
        torch.autograd.grad(y, (q, k, v), dy)
    assert calls.strides == [(3 * a * d, d, b * 3 * a * d, 1)] * 3, "[b, a, s, d] of one product"
    assert y.is_contiguous(), "the next product takes it as it is"
    views = {"permute", "view", "detach", "transpose", "_unsafe_view", "expand", "alias"}
    made = [name for name in calls.names if name not in views]
    assert len(made) == 2 and all("attention" in name for name in made), made


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("heads", "groups", "d"), [(12, 12, 64), (8, 2, 128), (4, 4, 80), (3, 3, 20), (2, 1, 256)])
def test_every_kernel_that_was_chosen_has_the_results_of_the_blocks(heads, groups, d, dtype):
    shape = Shape(s=384, b=2, heads=heads, groups=groups, d=d)
    state = torch.cuda.get_rng_state()
    choice = choose(shape, dtype, CUDA, False)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated(), "no record of a trial is left"
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert choice.note.startswith(f"attention: {choice.order[0]}") and "wrong by" not in choice.note, choice.note
    case = Case.of(shape, dtype, CUDA)
    exact = [x.detach().double().cpu().requires_grad_() for x in (case.q, case.k, case.v)]
    wanted = attention(*exact)
    grads = torch.autograd.grad(wanted, exact, case.dy.double().cpu())
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
    for name in choice.order:
        y = attention(case.q, case.k, case.v, Variant(order=(name,)))
        for mine, other in zip((y, *torch.autograd.grad(y, (case.q, case.k, case.v), case.dy)), (wanted, *grads), strict=True):
            torch.testing.assert_close(mine.double().cpu(), other, rtol=tolerance, atol=tolerance * float(other.std()))


@pytest.mark.gpu
def test_float64_takes_the_blocks_on_a_gpu():
    choice = choose(SMALL, torch.float64, CUDA, False)
    assert choice.order == () and choice.note.startswith("attention: in blocks of queries at [2, 4, 150, 16]"), choice.note
    case = Case.of(SMALL, torch.float64, CUDA)
    y = attention(case.q, case.k, case.v, Variant(order=()))
    torch.testing.assert_close(y.cpu(), attention(case.q.cpu(), case.k.cpu(), case.v.cpu()), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_a_deterministic_run_makes_the_same_choice_every_time():
    assert {choose_by(tried, SMALL, torch.bfloat16, CUDA, True).order for _ in range(3)} == {("flash", "efficient")}
