"""Updates against torch.optim, skipped steps, masters wider than parameters, schedules and clipping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_schedules import reference_rates

from megatrain.config.budget import Position, learning_rate, weight_decay
from megatrain.config.schema import OptimConfig
from megatrain.optim.optimizer import BLOCK, ROW, Optimizer, clip_divisor, local_squared_norm, squares
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec, Split
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import simulate
from megatrain.watch import part_norms

SINGLE = ParallelContext.single()


def flat_of(parameters, ctx=SINGLE, **options):
    return FlatParameters([Unit(tuple(parameters))], ctx, **options)


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(5, 3, generator=generator).to(dtype), ParamSpec("matrix", (5, 3))),
        Parameter(torch.randn(7, generator=generator).to(dtype), ParamSpec("bias", (7,), decay=False)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_like_torch(name, dtype):
    ours, theirs = parameters(dtype), [torch.nn.Parameter(p.detach().clone()) for p in parameters(dtype)]
    config = OptimConfig(name=name, weight_decay=0.1, betas=(0.8, 0.9), momentum=0.7)
    flat = flat_of(ours)
    optimizer = Optimizer(flat, config)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9)),
        "adam": lambda: torch.optim.Adam(groups, lr=1e-2, betas=(0.8, 0.9)),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.7),
    }[name]()
    for step in range(6):
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            mine.accumulated.copy_(other.grad * 3)
        optimizer.step(1e-2, torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.0))
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_skipped_step_changes_no_bit(name, dtype):
    flat = flat_of(parameters(dtype))
    optimizer = Optimizer(flat, OptimConfig(name=name))
    one, go, skip = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)
    flat.grads.normal_(generator=torch.Generator().manual_seed(1))
    optimizer.step(1e-2, one, go)
    kept = [flat.weights, optimizer.updates, *(state for of in optimizer.states for state in of.values())]
    kept += [m.masters for m in optimizer.masters if m.masters is not None]
    before = [b.clone() for b in kept]
    flat.grads.fill_(torch.nan)
    optimizer.step(1e-2, torch.tensor(torch.nan), skip)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert optimizer.updates == 1


def test_masters_keep_what_bfloat16_would_lose():
    parameter = Parameter(torch.ones(64, dtype=torch.bfloat16), ParamSpec("p", (64,), decay=False))
    flat = flat_of([parameter])
    optimizer = Optimizer(flat, OptimConfig(name="sgd", momentum=0.0))
    for _ in range(100):
        flat.grads.fill_(1.0)
        optimizer.step(1e-4, torch.tensor(1.0), torch.tensor(0.0))
    assert flat.grads.dtype == torch.float32
    torch.testing.assert_close(optimizer.masters[0].masters, torch.full((64,), 0.99), rtol=1e-5, atol=0)
    assert parameter[0].item() == torch.tensor(0.99).bfloat16().item() != 1.0


@settings(deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    steps=st.integers(2, 50),
    warmup=st.integers(0, 10),
    fraction=st.floats(0.05, 1.0),
    batch=st.integers(1, 64),
)
def test_learning_rates(name, steps, warmup, fraction, batch):
    warmup = min(warmup, steps - 1)
    config = OptimConfig(lr=1e-2, min_lr=1e-3, lr_schedule=name, warmup_steps=warmup, decay_fraction=fraction)
    right = pytest.approx(reference_rates(name, steps, 1e-2, 1e-3, warmup, fraction), rel=1e-9)
    assert [learning_rate(config, Position(step, steps, warmup)) for step in range(steps)] == right
    tokens = [Position(step * batch, steps * batch, warmup * batch, batch, batch) for step in range(steps)]
    assert [learning_rate(config, at) for at in tokens] == right


def norm_on(ctx, stage):
    """Squared norm of three kinds of parameters whose logical gradients are all ones."""
    tp = ctx.tp.size
    specs = [
        ParamSpec("split", (8, 3), Split(0, 8)),
        ParamSpec("groups", (4, 3), Split(0, 2)),
        ParamSpec("vocab", (5, 3), Split(0, 5, pad=True)),
        ParamSpec("whole", (7,)),
    ]
    made = [Parameter(torch.zeros(spec.local_shape(tp)), spec) for spec in specs]
    flat = flat_of(made, ctx, stage=stage)
    for parameter in made:
        here = parameter.spec.slices(tp, ctx.tp.rank)
        parameter.main_grad[tuple(slice(0, s.stop - s.start) for s in here)] = 1 / ctx.dp.size
    flat.reduce()
    return ctx.world.all_reduce(local_squared_norm(flat, ctx)).item()


@pytest.mark.parametrize(
    "shape", [MeshShape(), MeshShape(tp=2), MeshShape(tp=4), MeshShape(dp=2), MeshShape(tp=4, dp=2)], ids=str
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_logical_element_is_counted_once(shape, stage):
    norms = simulate(shape, norm_on, stage)
    assert norms == [norms[0]] * shape.world  # to the bit
    assert norms[0] == pytest.approx(8 * 3 + 4 * 3 + 5 * 3 + 7, rel=1e-6)


@pytest.mark.parametrize("value", [1e20, 1e-25], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_norms_are_summed_in_float64(dtype, value):
    """The square of neither is a float32, and of both 3 blocks of the first tensor's gradient are."""
    specs = [ParamSpec("long", (2 * BLOCK + 36,), part="mlp"), ParamSpec("short", (64,), part="norm")]
    made = [Parameter(torch.full(spec.shape, 0.5, dtype=dtype), spec) for spec in specs]
    flat = flat_of(made)
    for parameter in made:
        parameter.accumulated.fill_(value)
    elements = 2 * BLOCK + 100
    assert local_squared_norm(flat, SINGLE).sqrt().item() == pytest.approx(value * elements**0.5, rel=1e-7)
    norms = part_norms(flat, SINGLE, torch.tensor(2.0))
    assert norms["mlp"] == pytest.approx((value / 2 * (elements - 64) ** 0.5, 0.5 * (elements - 64) ** 0.5), rel=1e-7)
    assert norms["norm"] == pytest.approx((value / 2 * 8, 0.5 * 8), rel=1e-7) and set(norms) == {"mlp", "norm"}


def test_rows_are_summed_in_float32_where_their_squares_are_some():
    """Whole rows, a rest, a row of zeros, one too large, one too small; and one number that is not finite."""
    x = torch.randn(4 * ROW + 10, generator=torch.Generator().manual_seed(0))
    x[:ROW], x[ROW : 2 * ROW], x[2 * ROW : 3 * ROW] = 0, 3e20, 2e-30
    found, owners = squares([x, torch.ones(3), x[3 * ROW :]])
    assert found.dtype == torch.float64 and owners.tolist() == [0, 1, 2, 0, 0, 0, 0, 2]
    assert found[3:6].tolist() == pytest.approx([0, ROW * 9e40, ROW * 4e-60], rel=1e-6)
    of_last = x[3 * ROW :].double().square().sum().item()
    assert found[owners == 2].sum().item() == pytest.approx(of_last, rel=5e-7)
    x[3 * ROW] = torch.nan
    assert squares([x])[0].isnan().tolist() == [False, False, False, False, True]


def test_rows_of_zeros_need_no_float64(monkeypatch):
    """Those of an embedding whose tokens did not come; a row of small numbers does."""
    wide, plain = [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, **of: ("dtype" in of and wide.append(len(x)), plain(x, **of))[1])
    x = torch.zeros(5, ROW)
    x[3] = 1e-30
    assert squares([x.flatten()])[0][1:].tolist() == pytest.approx([0, 0, 0, ROW * 1e-60, 0], rel=1e-6, abs=0)
    assert wide == [1]


def test_a_part_that_is_not_finite_leaves_the_others_their_norms():
    made = [Parameter(torch.ones(4), ParamSpec(part, (4,), part=part)) for part in ("mlp", "norm")]
    flat = flat_of(made)
    made[0].accumulated.fill_(torch.inf)
    made[1].accumulated.fill_(3.0)
    assert part_norms(flat, SINGLE, torch.tensor(1.0)) == {"mlp": (torch.inf, 2.0), "norm": (6.0, 2.0)}
    assert not local_squared_norm(flat, SINGLE).isfinite()


def test_clipping_divides_by_at_least_one():
    norms = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert clip_divisor(norms, 1.0).tolist() == [1.0, pytest.approx(2.000001, abs=1e-12)]
    assert clip_divisor(norms, 0.0).tolist() == [1.0, 1.0]


def test_weight_decay_reaches_its_end_at_the_last_update():
    config = OptimConfig(weight_decay=0.1, weight_decay_end=0.5)
    right = pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert [weight_decay(config, Position(step, 5, 0)) for step in range(6)] == right
    assert [weight_decay(config, Position(step * 8, 40, 0, 8, 8)) for step in range(6)] == right
    assert weight_decay(OptimConfig(weight_decay=0.1), Position(10, 5, 0)) == 0.1


def test_a_decay_of_its_own_for_a_step():
    weights = []
    for decay in (None, 0.5):
        (parameter,) = parameters(torch.float64)[:1]
        flat = flat_of([parameter])
        optimizer = Optimizer(flat, OptimConfig(name="adamw", weight_decay=0.1))
        before = parameter.detach().clone()
        optimizer.step(1.0, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0), decay)
        weights.append((parameter.detach() / before).mean().item())
    assert weights == pytest.approx([0.9, 0.5])
