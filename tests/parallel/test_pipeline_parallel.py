"""The executor: what any schedule computes is one big batch on one device; what it keeps is what the simulator says."""

import gc
import time
import weakref

import pytest
import torch

from megatrain.parallel.mesh import Link, MeshShape, ParallelContext
from megatrain.parallel.pipeline_parallel import Stage, run_schedule
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.simulator import simulate as on_paper
from megatrain.testing import simulate, spawn
from megatrain.transport.group import Handle

WIDTH, ROWS, SCALE = 4, 3, 0.25
SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb_h1", 1), ("zb_v", 2)]


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer:
    """hidden -> tanh(hidden W), its weight gradient put off where it may be; the first makes its input from the micro-batch."""

    def __init__(self, virtual):
        self.weight = numbers(virtual, WIDTH, WIDTH).requires_grad_()
        self.weight.main_grad = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)

    def __call__(self, hidden, micro_batch, sums, postponed):
        return Product.apply(micro_batch if hidden is None else hidden, self.weight, postponed).tanh()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, postponed):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.postponed = weight, postponed
        return x @ weight

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors

        def work():
            ctx.weight.main_grad += x.t() @ dy

        work() if ctx.postponed is None else ctx.postponed.append(work)
        return dy @ weight.t(), None, None


def square_loss(hidden, micro_batch):
    return hidden.square().sum(), {"rows": torch.tensor(len(micro_batch))}, hidden.detach().sum(1)


def stage_of(ctx, schedule, loss=square_loss, layers=None):
    layers = layers or [Layer(schedule.virtual(ctx.pp.rank, chunk)) for chunk in range(schedule.chunks)]
    room = lambda micro_batch: torch.empty(len(micro_batch), WIDTH, dtype=torch.float64)  # noqa: E731
    return Stage(ctx, layers, loss, room, statistics=("absent", "rows"))


def batches_of(count):
    return [numbers(100 + m, ROWS, WIDTH) for m in range(count)]


def run(ctx, schedule):
    stage = stage_of(ctx, schedule)
    executed = run_schedule(stage, schedule, batches_of(schedule.micro_batches), SCALE)
    gradients = {schedule.virtual(ctx.pp.rank, c): layer.weight.main_grad for c, layer in enumerate(stage.chunks)}
    statistics = {name: sum.item() for name, sum in executed.by_name.items()}
    return statistics.pop("loss"), (statistics, executed.outputs), gradients, executed.peak_saved


def expected(schedule):
    """(loss, gradients, outputs) of all layers on one device, in one batch."""
    weights = [Layer(v).weight for v in range(schedule.virtual_stages)]
    hidden = torch.cat(batches_of(schedule.micro_batches))
    for weight in weights:
        hidden = (hidden @ weight).tanh()
    total = hidden.square().sum()
    return total.item(), torch.autograd.grad(total * SCALE, weights), hidden.detach().sum(1).split(ROWS)


def check(schedule, results):
    loss, gradients, hidden = expected(schedule)
    last = schedule.home(schedule.virtual_stages - 1)[0]
    for stage, (got, (statistics, outputs), own, peak) in enumerate(results):
        assert got == pytest.approx(loss if stage == last else 0.0, rel=1e-13)
        assert statistics == {"absent": 0.0, "rows": float(ROWS * schedule.micro_batches) if stage == last else 0.0}
        if stage == last:
            torch.testing.assert_close(outputs, list(hidden), rtol=1e-12, atol=1e-12)
        else:
            assert outputs == [None] * schedule.micro_batches
        for virtual, gradient in own.items():
            torch.testing.assert_close(gradient, gradients[virtual], rtol=1e-12, atol=1e-12)
        assert peak == on_paper(schedule).peak(stage), "as the simulator counts"


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 8])
def test_any_schedule_is_one_big_batch(name, chunks, stages, micro_batches):
    schedule = Schedule(name, stages, chunks, micro_batches)
    check(schedule, simulate(MeshShape(pp=stages), run, schedule))


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
def test_over_gloo(name, chunks):
    schedule = Schedule(name, 4, chunks, 6)
    check(schedule, spawn(MeshShape(pp=4), run, schedule))


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
def test_forward_only_gives_the_loss_and_keeps_nothing(name, chunks):
    schedule = Schedule(name, 2, chunks, 3, backward=False)
    results = simulate(MeshShape(pp=2), run, schedule)
    losses = [loss for loss, *_ in results]
    assert sum(losses) == pytest.approx(expected(schedule)[0])
    assert all(peak == 0 and not any(g.any() for g in own.values()) for _, _, own, peak in results)


class Slow(Handle):
    """A send that takes until it is asked for the third time."""

    def __init__(self, inner):
        self.inner, self.asked = inner, 0

    def wait(self):
        self.inner.wait()

    def done(self):
        self.asked += 1
        return self.asked > 2 and self.inner.done()


def kept_outputs(ctx, schedule):
    """Outputs of stage 0 that are still in memory after each of its instructions."""
    outputs, alive = [], []

    def layer(hidden, micro_batch, sums, postponed):
        time.sleep(0.05)  # stage 1 has nothing else to do than to receive
        gc.collect()
        alive.append(sum(reference() is not None for reference in outputs))
        output = Layer(0)(hidden, micro_batch, sums, postponed) * 1.0
        outputs.append(weakref.ref(output.untyped_storage()))
        return output

    stage = stage_of(ctx, schedule, layers=[layer])
    run_schedule(stage, schedule, batches_of(schedule.micro_batches), SCALE)
    return alive


@pytest.fixture
def little_garbage():
    """What other tests have left is not looked through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_an_output_is_let_go_once_it_is_sent(little_garbage):
    """GPipe keeps all micro-batches, but not their outputs: stage 0 has at most the one that is being sent."""
    alive = simulate(MeshShape(pp=2), kept_outputs, Schedule("gpipe", 2, 1, 8), in_turns=False)[0]
    assert len(alive) == 8 and max(alive) <= 3 and alive[-1] < 7


def test_a_layer_that_fails_ends_every_stage_with_its_own_error():
    def fail(ctx):
        schedule = Schedule("1f1b", 3, 1, 4)

        def broken(hidden, micro_batch, sums, postponed):
            raise ZeroDivisionError("in layer 7")

        return run_schedule(
            stage_of(ctx, schedule, layers=[broken] if ctx.pp.rank == 1 else None), schedule, batches_of(4), 1.0
        )

    with pytest.raises(ZeroDivisionError, match="in layer 7"):
        simulate(MeshShape(pp=3), fail)


def test_postponed_work_is_done_in_its_turn_and_not_before():
    order = []

    class Told(Layer):
        def __call__(self, hidden, micro_batch, sums, postponed):
            output = super().__call__(hidden, micro_batch, sums, postponed)
            m = next(i for i, b in enumerate(BATCHES) if b is micro_batch)
            postponed.append(lambda: order.append(m))
            return output

    BATCHES = batches_of(4)

    def go(ctx):
        schedule = Schedule("zb_h1", 2, 1, 4)
        layers = [Told(ctx.pp.rank)] if ctx.pp.rank == 1 else None
        run_schedule(stage_of(ctx, schedule, layers=layers), schedule, BATCHES, 1.0)

    simulate(MeshShape(pp=2), go)
    assert order == [0, 1, 2, 3]


def test_a_link_is_one_way():
    def links(ctx):
        return (
            sorted(ctx.sends),
            sorted(ctx.receives),
            {id(link.group) for link in (*ctx.sends.values(), *ctx.receives.values())},
        )

    for stages, neighbours in ((1, [set()]), (2, [{1}, {0}]), (4, [{1, 3}, {0, 2}, {1, 3}, {0, 2}])):
        for (sends, receives, groups), wanted in zip(simulate(MeshShape(pp=stages), links), neighbours, strict=True):
            assert set(sends) == set(receives) == wanted
            assert len(groups) == 2 * len(wanted), "a group for each direction"
    assert Link.__dataclass_fields__.keys() == {"group", "other"}


ONE, PAIR = torch.tensor(1.0), torch.tensor([1.0, 2.0])


def sums(names, given):
    """Sums of two micro-batches, by name."""
    chunk = lambda *_: torch.zeros(1)  # noqa: E731
    stage = Stage(ParallelContext.single(), [chunk], lambda *_: (ONE, given, None), torch.empty, names, objective="Mine")
    executed = run_schedule(stage, Schedule("1f1b", 1, 1, 2), [0, 1], 1.0)
    return {name: x.item() for name, x in executed.by_name.items()}


def test_statistics_are_summed_in_any_order_and_zero_where_they_are_left_out():
    given = {"b": torch.tensor(3), "a": torch.tensor(2.0, dtype=torch.float64)}
    assert sums(("a", "left out", "b"), given) == {"loss": 2.0, "a": 4.0, "left out": 0.0, "b": 6.0}
    assert sums((), {}) == {"loss": 2.0}


@pytest.mark.parametrize(
    ("names", "given", "told"),
    [
        (("a",), {"a": ONE, "b": ONE}, "Mine.statistics is ('a',), and 'b' of shape []"),
        ((), {"b": PAIR}, "Mine.statistics is (), and 'b' of shape [2]"),
        (("a",), {"loss": ONE}, "Mine.statistics is ('a',), and 'loss' of shape []"),
        (("a", "loss"), {}, "Mine.statistics is ('a', 'loss'), and 'loss' of shape []"),
        (("b", "a", "a"), {"c": ONE}, "Mine.statistics is ('b', 'a', 'a'), and 'a' of shape []"),
        (("a", "b"), {"b": PAIR}, "Mine.statistics is ('a', 'b'), and 'b' of shape [2]"),
    ],
)
def test_a_statistic_that_is_not_declared_or_twice_or_no_scalar_is_told(names, given, told):
    advice = " cannot be summed: declare every name that is returned, once, none called loss, and return scalars (.sum())"
    with pytest.raises(ValueError, match="cannot be summed") as error:
        sums(names, given)
    assert str(error.value) == told + advice
