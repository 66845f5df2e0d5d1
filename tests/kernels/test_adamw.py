"""The fused update against the reference, to the bit: a hundred steps with clipping, decay, a skipped step and odd sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatrain.config.schema import OptimConfig
from megatrain.kernels import adamw
from megatrain.kernels.adamw import BLOCK, adam_reference, adam_triton
from megatrain.kernels.update import Update
from megatrain.optim.optimizer import Optimizer
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.parallel.zero import FlatParameters

interpreter = pytest.importorskip("triton.runtime.interpreter")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
SHAPES = {"matrix": (31, 67), "odd": (BLOCK + 1,), "bias": (7,)}


@pytest.fixture(autouse=True)
def one_rounding(monkeypatch):
    """A GPU rounds a product and the sum after it once; Triton's interpreter rounds twice, but in float64 the product is exact."""

    def fma(_self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(np.float32), x.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


def side(kernels, device, config, dtype):
    """(flat buffers, optimizer) of a matrix with weight decay and vectors without."""
    ctx = ParallelContext.single(str(device))
    made = [
        Parameter(
            torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(device, dtype),
            ParamSpec(name, shape, decay=len(shape) > 1),
        )
        for name, shape in SHAPES.items()
    ]
    flat = FlatParameters([Unit(tuple(made))], ctx)
    return flat, Optimizer(flat, config, kernels)


def bits(flat, optimizer):
    """Everything that an update writes, on the CPU, as integers."""
    kept = [
        flat.weights,
        *(m.read(slice(None)) for m in optimizer.masters),
        *(s for of in optimizer.states for s in of.values()),
    ]
    kept += [m.low for m in optimizer.masters if m.low is not None]
    return [t.detach().cpu().view(torch.int16) for t in kept]


IN_BF16 = [(torch.bfloat16, "fp32", "adamw"), (torch.bfloat16, "split", "adamw"), (torch.bfloat16, "split", "adam")]
OTHERS = [(torch.float16, "fp32", "adamw"), (torch.float32, "fp32", "adam"), (torch.float32, "fp32", "adamw")]


@pytest.mark.parametrize(("dtype", "master", "name"), [*IN_BF16, *OTHERS], ids=str)
def test_a_hundred_steps_give_the_bits_of_the_reference(dtype, master, name):
    config = OptimConfig(name=name, master=master, weight_decay=0.1, betas=(0.9, 0.95))
    take_a_hundred_steps(side("triton", DEVICE, config, dtype), side("reference", "cpu", config, dtype))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="where a GPU is, numba is not asked for")
@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize(("dtype", "master", "name"), IN_BF16, ids=str)
def test_a_hundred_steps_of_numba_give_the_bits_of_the_reference(dtype, master, name, beta1, monkeypatch):
    monkeypatch.setattr("megatrain.kernels.dispatch.LEAST", 0)
    config = OptimConfig(name=name, master=master, weight_decay=0.1, betas=(beta1, 0.95))
    take_a_hundred_steps(side("numba", "cpu", config, dtype), side("reference", "cpu", config, dtype))


def take_a_hundred_steps(ours, theirs):
    """Both sides, with clipping, decay and a skipped step; raise unless all bits are the same."""
    assert all(rule.fused for rule in ours[1].rules) and not any(rule.fused for rule in theirs[1].rules)
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        gradient = torch.randn(theirs[0].grads.shape, generator=generator) * 10.0 ** (step % 7 - 4)
        divisor = torch.tensor(1 + 0.37 * (step % 3), dtype=torch.float64)  # every third step is not clipped
        skip = torch.tensor(float(step == 41), dtype=torch.float64)
        if step == 41:
            gradient[::5] = torch.nan
        for flat, optimizer in (ours, theirs):
            flat.grads.copy_(gradient)
            decay = 0.0 if step % 10 == 3 else None
            optimizer.step(1e-3 * (1 + step % 4), divisor.to(flat.grads.device), skip.to(flat.grads.device), decay)
    assert ours[1].updates == theirs[1].updates == 99
    for mine, others in zip(bits(*ours), bits(*theirs), strict=True):
        assert torch.equal(mine, others)
    assert ours[0].weights.isfinite().all() and len(bits(*ours)) == (9 if ours[1].config.master == "split" else 7)


RATES = Update(1e-2, (0.9, 0.95), 1e-8, 0.0, torch.tensor(3.0), torch.tensor(1.7), torch.tensor(0.0))


def on(device, rates):
    return replace(rates, **{name: getattr(rates, name).to(device) for name in ("count", "grad_divisor", "skip")})


@pytest.mark.parametrize("n", [1, 63, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.3, 0.999)], ids=str)
def test_so_many_elements_and_no_others(n, betas):
    """A first moment that follows the gradient (b1 below a half) is summed from the other end."""
    size = 3 * BLOCK
    g, w, m, v = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 0.5 for seed in range(4))
    given = [w, g, m, v.square()]
    after = [t.clone() for t in given]
    rates = replace(RATES, betas=betas)
    adam_reference(rates, 0.1, *after)
    ours = [t.clone().to(DEVICE) for t in given]
    parameters, grads, exp_avg, exp_avg_sq = (t[:n] for t in ours)
    adam_triton(on(DEVICE, rates), 0.1, parameters, None, None, grads, exp_avg, exp_avg_sq)
    for index in (0, 2, 3):
        assert torch.equal(ours[index].cpu(), torch.cat([after[index][:n], given[index][n:]])), index


def test_an_update_by_hand():
    """b1 = 3/4, b2 = 3/4, the second update: m = 1/4, v = 1/4, so w = 1/2 - 1 (1/4 / (7/16)) / (1/2 / sqrt(7/16) + 1)."""
    ones, zeros = torch.full((64,), 2.0, device=DEVICE), [torch.zeros(64, device=DEVICE) for _ in range(2)]
    rates = Update(1.0, (0.75, 0.75), 1.0, 0.0, torch.tensor(2.0), torch.tensor(2.0), torch.tensor(0.0))
    w = torch.ones(64, device=DEVICE)
    adam_triton(on(DEVICE, rates), 0.5, w, None, None, ones, *zeros)
    assert [t.unique().item() for t in zeros] == [0.25, 0.25]
    assert w.unique().item() == pytest.approx(0.5 - (0.25 / 0.4375) / (0.5 / 0.4375**0.5 + 1), rel=1e-6)


def test_scalars_are_those_of_float64_and_nothing_is_read_by_the_host(monkeypatch):
    rates = replace(RATES, count=torch.tensor(1.0))
    assert rates.scalars.tolist() == pytest.approx([1.7, 0.0, -0.1, 0.05**0.5], rel=1e-7)
    meta = on("meta", RATES)  # whoever asks a tensor there for its value gets an error
    launched = []
    monkeypatch.setattr(
        adamw, "_adam_kernel", {(2,): lambda *args, **flags: launched.append((args[6].device.type, flags["APART"]))}
    )
    adam_triton(
        meta,
        0.1,
        *(torch.empty(BLOCK + 1, device="meta") for _ in range(2)),
        None,
        *(torch.empty(BLOCK + 1, device="meta"),) * 3,
    )
    assert launched == [("meta", True)]


def test_float64_and_sgd_are_the_references():
    for dtype, name in ((torch.float64, "adamw"), (torch.float32, "sgd")):
        optimizer = side("triton", DEVICE, OptimConfig(name=name), dtype)[1]
        assert not any(rule.fused for rule in optimizer.rules)
