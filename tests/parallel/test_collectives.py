"""Each collective is what its name says, and its backward is the derivative of what all ranks compute together."""

import pytest
import torch

from megatrain.parallel import collectives
from megatrain.parallel.collectives import copy_to, gather_rows, reduce_from, scatter_sum
from megatrain.parallel.mesh import Axis, MeshShape
from megatrain.testing import simulate
from megatrain.transport.wrappers import RecordedWorld, Recorder

N, M = 8, 3
SIZES = [1, 2, 4]


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(name, size):
    """What each rank puts in: whole and the same, whole and partial, or its own rows."""
    if name == "copy_to":
        return [values(0, N, M)] * size
    return [values(rank, N // size if name == "gather_rows" else N, M) for rank in range(size)]


def outputs(name, xs):
    """What each rank gets out, by definition."""
    size = len(xs)
    if name == "copy_to":
        return [x + 0 for x in xs]
    if name == "reduce_from":
        return [sum(xs)] * size
    if name == "gather_rows":
        return [torch.cat(xs)] * size
    return list(sum(xs).chunk(size))


def through(ctx, name, xs, scales, transposed):
    """The function of one rank and its gradient; of strided tensors if `transposed`."""
    x, scale = xs[ctx.tp.rank], scales[ctx.tp.rank]
    if transposed:
        x, scale = x.t().contiguous().t(), scale.t().contiguous().t()
    x = x.clone().requires_grad_()
    before = x.detach().clone(), scale.clone()
    y = getattr(collectives, name)(x, ctx.tp)
    (gradient,) = torch.autograd.grad(y, x, scale)
    assert torch.equal(x.detach(), before[0]) and torch.equal(scale, before[1]), "neither input is overwritten"
    return y.detach(), gradient


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["copy_to", "reduce_from", "gather_rows", "scatter_sum"])
def test_definition_and_conjugate(name, size, transposed):
    xs = inputs(name, size)
    defined = outputs(name, xs)
    # Whatever is whole on all ranks afterwards has the same gradient on all; copies and gathered rows are used by each rank
    # for its own part.
    own = name in ("copy_to", "gather_rows")
    scales = [values(50 + rank * own, *y.shape) for rank, y in enumerate(defined)]
    if name == "scatter_sum":
        scales = list(values(50, N, M).chunk(size))
    results = simulate(MeshShape(tp=size), through, name, xs, scales, transposed)
    for (y, _), expected in zip(results, defined, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)

    leaves = [x.clone().requires_grad_() for x in xs]
    if name == "copy_to":  # one logical tensor, used on every rank
        leaves = [leaves[0]] * size
    together = outputs(name, leaves)
    counted = together[:1] if name == "reduce_from" else together  # one logical result
    total = sum((y * scale).sum() for y, scale in zip(counted, scales, strict=False))
    for (_, gradient), expected in zip(results, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)


CONJUGATES = [
    ("copy_to", {}, {"all_reduce": 1}),
    ("reduce_from", {"all_reduce": 1}, {}),
    ("gather_rows", {"all_gather": 1}, {"reduce_scatter": 1}),
    ("scatter_sum", {"reduce_scatter": 1}, {"all_gather": 1}),
]


@pytest.mark.parametrize(("name", "forward", "backward"), CONJUGATES)
def test_what_is_moved(name, forward, backward):
    recorders = [Recorder() for _ in range(2)]
    counts = [[], []]

    def run(ctx):
        recorder = recorders[ctx.tp.rank]
        x = values(0, N, M).requires_grad_()
        y = getattr(collectives, name)(x, ctx.tp)
        for differentiate in (False, True):
            if differentiate:
                torch.autograd.grad(y, x, torch.ones_like(y))
            counts[ctx.tp.rank].append({operation: t.calls for (_, operation), t in recorder.totals().items()})
            recorder.reset()

    simulate(MeshShape(tp=2), run, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    assert counts == [[forward, backward]] * 2


@pytest.mark.parametrize("function", [copy_to, reduce_from, gather_rows, scatter_sum])
def test_an_axis_of_size_one_returns_its_input(function):
    x = values(0, 5, M).t()
    assert function(x, Axis("tp")) is x


@pytest.mark.parametrize("name", ["all_reduce", "gathered", "scatter_summed"])
def test_a_collective_of_an_axis_of_size_one_returns_its_input(name):
    x = values(0, 5, M).t()
    assert getattr(Axis("tp"), name)(x) is x


STARTS = ["start_all_reduce", "start_gather", "start_scatter_sum"]


@pytest.mark.parametrize("start", STARTS)
def test_nothing_to_wait_for_on_an_axis_of_size_one(start):
    x = values(0, 5, M)
    output, handle = getattr(Axis("tp"), start)(x)
    handle.wait()
    assert output is x


def started(ctx):
    """Every collective that is started and waited for, on float32, bfloat16 and integers."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = (torch.arange(N * M).view(N, M) + ctx.tp.rank).to(dtype)
        for start in STARTS:
            given = x.clone()
            output, handle = getattr(ctx.tp, start)(given)
            handle.wait()
            assert output.dtype == dtype and (start == "start_all_reduce") == (output is given)
            results[start, dtype] = output.double()
    results["max"] = ctx.tp.all_reduce(torch.tensor([1.0 + ctx.tp.rank, -ctx.tp.rank]), "max")
    return results


def test_started_collectives():
    base = torch.arange(N * M, dtype=torch.float64).view(N, M)
    for rank, results in enumerate(simulate(MeshShape(tp=2), started)):
        assert results.pop("max").tolist() == [2.0, 0.0]
        for (name, _), output in results.items():
            total = 2 * base + 1
            rows = total[rank * N // 2 : (rank + 1) * N // 2]
            expected = {"start_all_reduce": total, "start_gather": torch.cat([base, base + 1]), "start_scatter_sum": rows}
            assert torch.equal(output, expected[name])


def test_rows_that_cannot_be_split_are_refused():
    def run(ctx):
        with pytest.raises(ValueError, match=r"dim 0 of \(7, 3\) cannot be split over the 2 ranks of axis tp"):
            ctx.tp.start_scatter_sum(torch.zeros(7, 3))

    simulate(MeshShape(tp=2), run)
