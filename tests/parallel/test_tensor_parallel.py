"""Each tensor-parallel layer agrees with plain torch: outputs, input gradients and the gradients of every rank's slices."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from megatrain.config.schema import ModelConfig
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import gpt_block
from megatrain.models.layers import Build
from megatrain.parallel import param, tensor_parallel, vocabulary
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import Axis, MeshShape, ParallelContext, Rows
from megatrain.parallel.param import Parameter, ParamSpec, Place, Split, joined, make_parameters
from megatrain.parallel.tensor_parallel import Backward, ColumnParallelLinear, Matrix, RowParallelLinear, column_linear
from megatrain.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead, vocab_parameter
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import simulate
from megatrain.transport.group import Handle, World
from megatrain.transport.wrappers import RecordedWorld, Recorder, Wrapper

S, B, H, D = 8, 3, 12, 4
DTYPE = torch.float64
LAYOUTS = [(1, False), (2, False), (4, False), (1, True), (2, True), (4, True)]
START = 0.25
"""What a main_grad holds before: gradients are added to it."""


SINGLE = Axis("tp")


def place(tp=SINGLE, sequence_parallel=False):
    return Place(Rows(tp, sequence_parallel), DTYPE, torch.device("cpu"))


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def part(x, tp, sequence_parallel):
    """This rank's rows of a whole activation, as a leaf."""
    return (x.chunk(tp.size)[tp.rank] if sequence_parallel else x).clone().requires_grad_()


def whole_of(pieces, sequence_parallel):
    """The whole activation or gradient from what each rank has; without sequence parallelism all have the same."""
    if sequence_parallel:
        return torch.cat(pieces)
    for piece in pieces[1:]:
        near(piece, pieces[0])
    return pieces[0]


def logical(spec):
    """The whole tensor that a parameter is a slice of: random, biases too."""
    return numbers(sum(map(ord, spec.name)), *spec.shape).requires_grad_()


def prepare(parameters, tp, mode):
    """Fill with slices of the logical tensors; main_grads as `mode` says: none (autograd), in one buffer (joined), or apart."""
    buffer, end = torch.full((sum(p.numel() for p in parameters),), START, dtype=DTYPE), 0
    for parameter in parameters:
        here = parameter.spec.slices(tp.size, tp.rank)
        parameter.data[tuple(slice(0, s.stop - s.start) for s in here)] = logical(parameter.spec).detach()[here]
        if mode == "apart":
            parameter.main_grad = torch.full_like(parameter.data, START)
        elif mode == "joined":
            parameter.main_grad = buffer[end : end + parameter.numel()].view(parameter.shape)
        end += parameter.numel()


def gradients(parameters, mode):
    """Of each parameter by name: (spec, this rank's gradient)."""
    for parameter in parameters:
        assert (parameter.grad is None) == (mode != "autograd")
    return {p.spec.name: (p.spec, p.grad if mode == "autograd" else p.main_grad - START) for p in parameters}


def summed(per_rank, name):
    """The logical gradient from every rank's share: partial sums added up, copies compared."""
    spec = per_rank[0][name][0]
    size = len(per_rank)
    total = torch.zeros(spec.shape, dtype=DTYPE)
    for rank, shares in enumerate(per_rank):
        here = spec.slices(size, rank)
        local = shares[name][1]
        inside = tuple(slice(0, s.stop - s.start) for s in here)
        if spec.partial_over or rank % spec.copies(Axis("tp", size)) == 0:
            total[here] += local[inside]
        else:
            near(local[inside], total[here])
        local[inside] = 0
        assert (local == 0).all(), "padding has no gradient"
    return total


# --- linear layers ----------------------------------------------------------------------------------------------------

OUTPUTS = [Matrix("q", H, 4 * D, 4), Matrix("k", H, 2 * D, 2), Matrix("v", H, D, 1)]
"""Of 4, 2 and 1 heads: under tp 4 the last two are replicated."""


def column_layer(tp, sequence_parallel, bias=True):
    return ColumnParallelLinear(OUTPUTS, place(tp, sequence_parallel), bias=bias)


def column_on(ctx, sequence_parallel, mode, bias):
    layer = column_layer(ctx.tp, sequence_parallel, bias)
    parameters = [*layer.weights, *layer.biases]
    prepare(parameters, ctx.tp, mode)
    x = part(numbers(0, S, B, H), ctx.tp, sequence_parallel)
    outputs = layer(x)
    # Every rank does something else with its outputs, as its own query heads do with a replicated key.
    sum((y * numbers(10 * ctx.tp.rank + i, *y.shape)).sum() for i, y in enumerate(outputs)).backward()
    return [y.detach() for y in outputs], x.grad, gradients(parameters, mode)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mode", ["autograd", "joined", "apart"])
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_column_parallel_linear(size, sequence_parallel, mode, bias):
    results = simulate(MeshShape(tp=size), column_on, sequence_parallel, mode, bias)
    x, total, leaves = numbers(0, S, B, H).requires_grad_(), torch.zeros((), dtype=DTYPE), {}
    for i, (name, _, width, units, _) in enumerate(OUTPUTS):
        w = leaves[f"{name}.weight"] = logical(ParamSpec(f"{name}.weight", (width, H)))
        b = logical(ParamSpec(f"{name}.bias", (width,)))
        if bias:
            leaves[f"{name}.bias"] = b
        y = functional.linear(x, w, b if bias else None)
        for rank, (outputs, _, _) in enumerate(results):
            columns = y[..., slice(*Split(0, units).slice(width, size, rank))]
            near(outputs[i], columns.detach())
            total = total + (columns * numbers(10 * rank + i, *columns.shape)).sum()
    total.backward()
    near(whole_of([dx for _, dx, _ in results], sequence_parallel), x.grad)
    assert results[0][2].keys() == leaves.keys()
    for name, leaf in leaves.items():
        near(summed([g for _, _, g in results], name), leaf.grad)


def row_on(ctx, sequence_parallel, mode):
    layer = RowParallelLinear(Matrix("o", 4 * D, H, 4), place(ctx.tp, sequence_parallel), bias=True)
    parameters = [layer.weight, *layer.biases]
    prepare(parameters, ctx.tp, mode)
    x = numbers(1, S, B, 4 * D).chunk(ctx.tp.size, -1)[ctx.tp.rank].clone().requires_grad_()
    y = layer(x)
    (y * part(numbers(6, S, B, H), ctx.tp, sequence_parallel).detach()).sum().backward()
    return y.detach(), x.grad, gradients(parameters, mode)


@pytest.mark.parametrize("mode", ["autograd", "joined"])
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_row_parallel_linear(size, sequence_parallel, mode):
    results = simulate(MeshShape(tp=size), row_on, sequence_parallel, mode)
    x = numbers(1, S, B, 4 * D).requires_grad_()
    w, b = logical(ParamSpec("o.weight", (H, 4 * D))), logical(ParamSpec("o.bias", (H,)))
    y = functional.linear(x, w, b)
    (y * numbers(6, S, B, H)).sum().backward()
    near(whole_of([y for y, _, _ in results], sequence_parallel), y.detach())
    near(torch.cat([dx for _, dx, _ in results], -1), x.grad)
    near(summed([g for _, _, g in results], "o.weight"), w.grad)
    near(summed([g for _, _, g in results], "o.bias"), b.grad)


def test_frozen_parameters_get_no_gradient_and_the_others_theirs():
    specs = [ParamSpec(n, (4, H), trainable=n != "k") for n in "qk"]
    q, k = make_parameters(specs, place())
    FlatParameters([Unit((q, k))], ParallelContext.single())
    x = numbers(0, S, B, H).requires_grad_()
    y, z = column_linear(x, (q, k), (), Rows(Axis("tp")))
    (y.sum() + z.sum()).backward()
    near(q.main_grad, x.detach().sum((0, 1)).expand(4, H))
    assert q.grad is None and k.grad is None and k.main_grad is None and x.grad is not None

    for parameter in (frozen := column_layer(Axis("tp"), False)).parameters():
        parameter.requires_grad_(False)
    x.grad = None
    frozen(x)[0].sum().backward()
    assert all(p.grad is None for p in frozen.parameters()) and x.grad is not None


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_an_input_without_gradient_costs_no_reduction(sequence_parallel):
    recorders = [Recorder(), Recorder()]

    def run(ctx):
        layer = column_layer(ctx.tp, sequence_parallel)
        y = layer(part(numbers(0, S, B, H), ctx.tp, sequence_parallel).detach())[0]
        recorders[ctx.tp.rank].reset()
        y.sum().backward()

    simulate(MeshShape(tp=2), run, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    assert [operation for _, operation in recorders[0].totals()] == ["all_gather"] * sequence_parallel


def test_a_user_may_use_one_output_alone():
    layer = column_layer(Axis("tp"), False)
    prepare(list(layer.parameters()), Axis("tp"), "autograd")
    layer(numbers(0, S, B, H))[1].sum().backward()
    assert (layer.weights[0].grad == 0).all() and (layer.weights[1].grad != 0).any()


# --- vocabulary -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Embedding, head and loss over `size` ids."""

    size: int
    tied: bool
    sequence_parallel: bool
    mode: str

    def ids(self):
        generator = torch.Generator().manual_seed(2)
        return [torch.randint(self.size, (S, B), generator=generator) for _ in range(2)]

    def specs(self):
        return [ParamSpec(name, (self.size, H)) for name in (("e",) if self.tied else ("e", "head"))]

    def on(self, ctx):
        tp, sp = ctx.tp, self.sequence_parallel
        embedding = VocabParallelEmbedding(ParamSpec("e", (self.size, H)), place(tp, sp))
        head = embedding.weight if self.tied else vocab_parameter(ParamSpec("head", (self.size, H)), place(tp, sp))
        parameters = [embedding.weight] if self.tied else [embedding.weight, head]
        prepare(parameters, tp, self.mode)
        tokens, labels = self.ids()
        x = embedding(tokens)
        logits = VocabParallelHead(head, Rows(tp, sp)).logits(x)
        kept = logits.detach().clone()
        loss, correct = VocabParallelHead(head, Rows(tp, sp)).cross_entropy(logits, labels)
        (loss * numbers(4, S, B)).sum().backward()
        return x.detach(), kept, loss.detach(), correct, gradients(parameters, self.mode)


@pytest.mark.parametrize("mode", ["autograd", "apart"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("vocab", [3, 10, 101, 497])
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_vocabulary(size, sequence_parallel, vocab, tied, mode):
    vocabulary = Vocabulary(vocab, tied, sequence_parallel, mode)
    results = simulate(MeshShape(tp=size), vocabulary.on)
    weights = [logical(spec) for spec in vocabulary.specs()]
    tokens, labels = vocabulary.ids()
    x = functional.embedding(tokens, weights[0])
    logits = x @ weights[-1].t()
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (loss * numbers(4, S, B)).sum().backward()
    near(whole_of([r[0] for r in results], sequence_parallel), x.detach())
    near(torch.cat([r[1] for r in results], -1), logits.detach())
    for _, _, mine, correct, _ in results:
        near(mine, loss.detach())
        assert torch.equal(correct, logits.argmax(-1) == labels)
    for spec, weight in zip(vocabulary.specs(), weights, strict=True):
        near(summed([r[-1] for r in results], spec.name), weight.grad)


def loss_of(ctx, logits, labels, scale):
    """Cross-entropy of whole logits, each rank given its columns: loss, correct, gradient of those columns."""
    weight = vocab_parameter(ParamSpec("w", (logits.shape[-1], 1)), place(ctx.tp))
    local = logits[..., weight.spec.slices(ctx.tp.size, ctx.tp.rank)[0]].clone().requires_grad_()
    loss, correct = VocabParallelHead(weight, Rows(ctx.tp)).cross_entropy(local * 1, labels)
    return loss.detach(), correct, torch.autograd.grad(loss, local, scale.to(loss.dtype))[0]


@pytest.mark.parametrize("vocab", [3, 101])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bfloat16_logits(size, vocab):
    logits = (4 * numbers(0, S, B, vocab)).bfloat16()
    labels, scale = torch.arange(S * B).view(S, B) % vocab, numbers(1, S, B).abs()
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (gradient,) = torch.autograd.grad(expected, exact, scale)
    results = simulate(MeshShape(tp=size), loss_of, logits, labels, scale)
    for loss, _, _ in results:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    mine = torch.cat([d for _, _, d in results], -1)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), gradient, rtol=2**-6, atol=0)  # also of a label whose probability is nearly 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 4])
def test_loss_of_extreme_logits(size, dtype):
    logits = torch.zeros(4, 1, 10, dtype=dtype)
    logits[0], logits[1, 0, 7], logits[2, 0, 7] = 1e30, 1e4, -torch.inf
    labels = torch.tensor([[3], [2], [1], [9]])
    for loss, correct, gradient in simulate(MeshShape(tp=size), loss_of, logits, labels, torch.ones(4, 1)):
        expected = torch.tensor([10.0, torch.e, 9.0, 10.0]).log()
        expected[1] = logits[1, 0, 7].float()
        torch.testing.assert_close(loss.flatten(), expected)
        assert correct.flatten().tolist() == [True, False, True, True], "a tie is correct: nothing is larger"
        assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1, 4])
def test_labels_that_do_not_count_may_be_anything(size):
    labels, scale = torch.tensor([[1], [-100], [10**9]]), torch.tensor([[1.0], [0.0], [0.0]], dtype=DTYPE)
    for loss, _, gradient in simulate(MeshShape(tp=size), loss_of, numbers(0, 3, 1, 10), labels, scale):
        assert loss.isfinite().all() and (gradient[1:] == 0).all() and (gradient[0] != 0).all()


# --- what is moved, and when ------------------------------------------------------------------------------------------


def test_the_logits_are_never_gathered():
    recorders = [Recorder() for _ in range(4)]
    vocabulary = Vocabulary(4096, True, True, "autograd")
    simulate(MeshShape(tp=4), vocabulary.on, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    totals = {operation: total for (_, operation), total in recorders[0].totals().items()}
    assert (totals["all_reduce"].calls, totals["all_reduce"].bytes) == (2, 3 * S * B * 8), "the loss: 3 numbers a token"
    activations = totals["all_gather"].bytes + totals["reduce_scatter"].bytes
    assert activations == 5 * S * B * H * 8  # embedding: scatter, gather; head: gather, gather again, scatter


@pytest.mark.parametrize(("sequence_parallel", "units"), [(False, 8), (True, 10)])
def test_traffic_of_a_layer_is_what_the_docstring_says(sequence_parallel, units):
    recorders = [Recorder() for _ in range(4)]
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, seq_length=S)

    def run(ctx):
        block = gpt_block(0, Build(Rows(ctx.tp, sequence_parallel), DTYPE, ctx.device, config, 29, 0))
        x = part(numbers(0, S, B, 16), ctx.tp, sequence_parallel)
        block(x, micro_batch()).sum().backward()

    simulate(MeshShape(tp=4), run, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    twice = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    for recorder in recorders:
        moved = sum(twice[operation] * total.bytes for (_, operation), total in recorder.totals().items())
        assert moved == units * S * B * 16 * 8


def micro_batch():
    ids = torch.zeros(S, B, dtype=torch.int64)
    return MicroBatch(ids, ids, torch.ones(S, B), torch.arange(S)[:, None].expand(S, B), torch.arange(B))


class _Wait(Handle):
    def __init__(self, inner, note):
        self.inner, self.note = inner, note

    def wait(self):
        self.note()
        self.inner.wait()

    def done(self):
        return self.inner.done()


class _OrderedGroup(Wrapper):
    """Notes in `events` when a call starts and when it is waited for."""

    def __init__(self, inner, events):
        super().__init__(inner)
        self.events = events

    def barrier(self):
        self.inner.barrier()

    def _around(self, operation, larger, start, blocking):
        self.events.append(f"start {operation}")
        handle = _Wait(start(), lambda: self.events.append(f"wait {operation}"))
        if blocking:
            handle.wait()
        return handle


class _OrderedWorld(World):
    def __init__(self, inner, events):
        self.rank, self.size, self.inner, self.events = inner.rank, inner.size, inner, events

    def group(self, name, ranks):
        return _OrderedGroup(self.inner.group(name, ranks), self.events)


@pytest.fixture
def events(monkeypatch):
    """What rank 0 does, in order: collectives, and work by the functions of tensor_parallel.py and vocabulary.py."""
    noted = []

    def spy(module, name):
        function = getattr(module, name)

        def noting(*arguments):
            if threading.current_thread().name == "rank 0":
                noted.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, noting)

    for name in ("matmul", "add_bias_gradient"):
        spy(tensor_parallel, name)
    for name in ("matmul", "add_matmul"):
        spy(vocabulary, name)
    spy(param, "add_matmul")
    return noted


def layers_under_test(ctx, sequence_parallel):
    """Name -> (forward, its input); every parameter has a main_grad."""
    tp, here = ctx.tp, place(ctx.tp, sequence_parallel)
    column = ColumnParallelLinear([Matrix("u", H, 4 * D, 4)], here, bias=True)
    row = RowParallelLinear(Matrix("o", 4 * D, H, 4), here, bias=True)
    head = vocab_parameter(ParamSpec("e", (10, H)), here)
    for parameter in (*column.parameters(), *row.parameters(), head):
        parameter.main_grad = torch.zeros_like(parameter.data)
    x = part(numbers(0, S, B, H), tp, sequence_parallel)
    inner = numbers(1, S, B, 4 * D // tp.size).requires_grad_()
    return {
        "column": (lambda: column(x)[0], x),
        "row": (lambda: row(inner), inner),
        "head": (lambda: VocabParallelHead(head, here.rows).logits(x), x),
    }


OVERLAP = {
    ("column", False): "matmul, start all_reduce, add_matmul, add_bias_gradient, wait all_reduce",
    ("column", True): "start all_gather, matmul, start reduce_scatter, wait all_gather, add_matmul, add_bias_gradient, "
    "wait reduce_scatter",
    ("row", False): "add_bias_gradient, matmul, add_matmul",
    ("row", True): "start all_gather, add_bias_gradient, wait all_gather, matmul, add_matmul",
    ("head", False): "matmul, start all_reduce, add_matmul, wait all_reduce",
    ("head", True): "start all_gather, matmul, start reduce_scatter, wait all_gather, add_matmul, wait reduce_scatter",
}


@pytest.mark.parametrize(("name", "sequence_parallel"), OVERLAP)
def test_the_backward_computes_while_it_communicates(events, name, sequence_parallel):
    def run(ctx):
        forward, x = layers_under_test(ctx, sequence_parallel)[name]
        y = forward()
        if ctx.tp.rank == 0:
            events.clear()
        y.backward(torch.ones_like(y), inputs=[x, *_leaves(y, x)])

    simulate(MeshShape(tp=2), run, wrap=lambda world: _OrderedWorld(world, events) if world.rank == 0 else world)
    assert ", ".join(events) == OVERLAP[name, sequence_parallel]


def _leaves(y, x):
    """The parameters that `y` comes from."""
    return [f.variable for f, _ in y.grad_fn.next_functions if f is not None and getattr(f, "variable", x) is not x]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_joined_is_a_view_where_it_can_be():
    storage = torch.arange(24.0).view(6, 4)
    top, bottom = storage[:2], storage[2:]
    assert joined([top, bottom]).data_ptr() == storage.data_ptr()
    assert torch.equal(joined([top, bottom]), storage)
    assert torch.equal(joined([bottom, top]), torch.cat([bottom, top]))
    assert torch.equal(joined([top, bottom.clone()]), storage)
    assert torch.equal(joined([storage[:2, :2], storage[2:4, :2]]), storage[:4, :2])
    assert not joined([nn.Parameter(top), nn.Parameter(bottom.clone())]).requires_grad


def test_parameters_of_one_matrix_lie_behind_one_another():
    specs = [ParamSpec("q", (8, H), Split(0, 4)), ParamSpec("k", (2, H), Split(0, 1), "tp")]
    made = make_parameters(specs, place(Axis("tp", 4, 1, (0, 1, 2, 3))))
    assert [tuple(p.shape) for p in made] == [(2, H), (2, H)] and [p.follows for p in made] == [False, True]
    assert all(isinstance(p, Parameter) for p in made) and joined(made).data_ptr() == made[0].data_ptr()


# --- split backward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_postponed_weight_gradients_come_when_they_are_run_and_are_the_same(tp, sequence_parallel):
    def gradients(ctx, postpone):
        here = place(ctx.tp, sequence_parallel)
        column = ColumnParallelLinear([Matrix("u", H, 4 * D, 4), Matrix("w", H, 4 * D, 4)], here, bias=True)
        row = RowParallelLinear(Matrix("o", 4 * D, H, 4), here, bias=True)
        parameters = [*column.parameters(), *row.parameters()]
        for p in parameters:
            fill(p, ctx.tp)
            p.main_grad = torch.zeros_like(p.data)
        x, postponed = part(numbers(0, S, B, H), ctx.tp, sequence_parallel), [] if postpone else None
        a, b = column(x, Backward(postponed))
        y = row(a * b, Backward(postponed))
        y.backward(part(numbers(1, S, B, H), ctx.tp, sequence_parallel).detach())
        early = [p.main_grad.abs().sum().item() for p in (*column.weights, row.weight)]
        assert (early == [0.0] * 3) == postpone
        with torch.no_grad():
            for work in postponed or []:
                work()
        return [x.grad, *(p.main_grad for p in parameters)]

    for at_once, later in zip(*(simulate(MeshShape(tp=tp), gradients, postpone) for postpone in (False, True)), strict=True):
        assert all(map(torch.equal, at_once, later))


def fill(parameter, tp):
    spec = parameter.spec
    whole = numbers(sum(map(ord, spec.name)), *spec.shape)
    with torch.no_grad():
        parameter.copy_(whole[spec.slices(tp.size, tp.rank)])


def test_postponed_work_without_a_main_grad_is_an_error():
    postponed = []
    layer = RowParallelLinear(Matrix("o", 4, 3, 4), place(), bias=False)
    layer(numbers(0, S, B, 4), Backward(postponed)).sum().backward()
    with pytest.raises(ValueError, match=r"postponed weight gradient of shape \[3, 4\] needs a main_grad"):
        postponed[0]()
