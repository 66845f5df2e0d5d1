"""Each tensor-parallel layer agrees with plain torch: outputs, input gradients and the gradients of every rank's slices."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.param import Init, initialise
from megatrain.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    joined,
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
    vocab_parameter,
)
from megatrain.parallel.transport_wrappers import RecordedWorld, Recorder
from megatrain.testing import simulate

S, B, H, D = 8, 3, 12, 4
DTYPE = torch.float64
SHARED = {"dtype": DTYPE, "device": torch.device("cpu")}
LAYOUTS = [(1, False), (2, False), (4, False), (1, True), (2, True), (4, True)]


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def part(x, tp, sequence_parallel):
    """This rank's rows of a whole activation."""
    return x.chunk(tp.size)[tp.rank].clone() if sequence_parallel else x.clone()


def logical(parameter):
    """The whole tensor that a parameter is a slice of."""
    from megatrain.parallel.mesh import Axis
    from megatrain.parallel.param import Parameter, ParamSpec

    spec = parameter.spec
    whole = Parameter(torch.zeros(spec.shape, dtype=DTYPE), ParamSpec(spec.name, spec.shape, init=spec.init))
    initialise(whole, Axis("tp"), 3)
    return whole.detach().requires_grad_()


@dataclass
class Linear:
    sequence_parallel: bool
    accumulate: bool

    def column(self, ctx):
        """q with 4 heads, k with 2 groups: replicated under tp 4."""
        tp = ctx.tp
        layer = ColumnParallelLinear(
            [("q", 4 * D, 4), ("k", 2 * D, 2)],
            H,
            tp,
            bias=True,
            sequence_parallel=self.sequence_parallel,
            init=Init(),
            **SHARED,
        )
        x = numbers(0, S, B, H)
        whole, local = x.clone().requires_grad_(), part(x, tp, self.sequence_parallel).requires_grad_()
        self.prepare(layer, tp)
        outputs = layer(local)
        total, gradients = torch.zeros((), dtype=DTYPE), {}
        for output, weight, bias in zip(outputs, layer.weights, layer.biases, strict=True):
            w, b = logical(weight), logical(bias)
            reference = functional.linear(whole, w, b)
            columns = weight.spec.slices(tp.size, tp.rank)[0]
            torch.testing.assert_close(output, reference[..., columns], rtol=1e-12, atol=1e-12)
            scale = numbers(5, S, B, reference.shape[-1])
            share = weight.spec.copies(tp.size)  # a replicated output is used by each of its ranks: they share its gradient
            total = total + (output * scale[..., columns]).sum() / share
            gradients[weight], gradients[bias] = torch.autograd.grad((reference * scale).sum(), (w, b), retain_graph=True)
        total.backward()
        for parameter, gradient in gradients.items():
            mine = self.gradient(parameter) * parameter.spec.copies(tp.size)
            torch.testing.assert_close(mine, gradient[parameter.spec.slices(tp.size, tp.rank)], rtol=1e-11, atol=1e-11)
        return local.grad

    def row(self, ctx):
        tp = ctx.tp
        layer = RowParallelLinear(
            "o", 4 * D, H, 4, tp, bias=True, sequence_parallel=self.sequence_parallel, init=Init(), **SHARED
        )
        self.prepare(layer, tp)
        x = numbers(1, S, B, 4 * D)
        whole, local = x.clone().requires_grad_(), x.chunk(tp.size, -1)[tp.rank].clone().requires_grad_()
        w, b = logical(layer.weight), logical(layer.biases[0])
        reference, scale = functional.linear(whole, w, b), numbers(6, S, B, H)
        output = layer(local)
        torch.testing.assert_close(output, part(reference.detach(), tp, self.sequence_parallel), rtol=1e-12, atol=1e-12)
        (output * part(scale, tp, self.sequence_parallel)).sum().backward()
        dx, dw, db = torch.autograd.grad((reference * scale).sum(), (whole, w, b))
        torch.testing.assert_close(local.grad, dx.chunk(tp.size, -1)[tp.rank], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            self.gradient(layer.weight), dw[layer.weight.spec.slices(tp.size, tp.rank)], rtol=1e-11, atol=1e-11
        )
        bias = self.gradient(layer.biases[0]).clone()
        if self.sequence_parallel and tp.group is not None:
            assert layer.biases[0].spec.partial_over == "tp"
            tp.group.all_reduce(bias)
        torch.testing.assert_close(bias, db, rtol=1e-11, atol=1e-11)

    def prepare(self, layer, tp):
        for parameter in layer.parameters():
            initialise(parameter, tp, 3)
            if self.accumulate:
                parameter.main_grad = torch.zeros_like(parameter.data)

    def gradient(self, parameter):
        assert (parameter.grad is None) == self.accumulate
        return parameter.main_grad if self.accumulate else parameter.grad


@pytest.mark.parametrize("accumulate", [False, True], ids=["autograd", "main_grad"])
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_linear_layers(size, sequence_parallel, accumulate):
    layers = Linear(sequence_parallel, accumulate)
    simulate(MeshShape(tp=size), layers.row)
    grads = simulate(MeshShape(tp=size), layers.column)
    alone = simulate(MeshShape(), Linear(False, accumulate).column)[0]
    whole = torch.cat(grads) if sequence_parallel else grads[0]
    torch.testing.assert_close(whole, alone, rtol=1e-11, atol=1e-11)


def vocabulary(ctx, vocab, sequence_parallel, dtype):
    """Embedding, head and loss of a tied vocabulary; everything that a rank knows about them."""
    tp = ctx.tp
    embedding = VocabParallelEmbedding(
        "e",
        vocab,
        H,
        tp,
        sequence_parallel=sequence_parallel,
        init=Init("normal", 1.0),
        dtype=dtype,
        device=torch.device("cpu"),
    )
    initialise(embedding.weight, tp, 3)
    generator = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(vocab, (S, B), generator=generator) for _ in range(2))
    hidden = embedding(tokens)
    logits = vocab_parallel_logits(hidden, embedding.weight, tp, sequence_parallel)
    loss, correct = vocab_parallel_cross_entropy(logits, labels, embedding.weight, tp)
    loss.sum().backward()
    rows = embedding.weight.spec.slices(tp.size, tp.rank)[0]
    gradient = torch.zeros(vocab, H, dtype=dtype)
    gradient[rows] = embedding.weight.grad[: rows.stop - rows.start]
    assert (embedding.weight.grad[rows.stop - rows.start :] == 0).all(), "padding has no gradient"
    return loss.detach(), correct, gradient


@pytest.mark.parametrize("vocab", [3, 10, 101])
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_vocabulary(size, sequence_parallel, vocab):
    results = simulate(MeshShape(tp=size), vocabulary, vocab, sequence_parallel, DTYPE)
    weight = logical(vocab_parameter("e", vocab, H, _single_axis(), Init("normal", 1.0), DTYPE, torch.device("cpu")))
    generator = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(vocab, (S, B), generator=generator) for _ in range(2))
    logits = functional.embedding(tokens, weight) @ weight.t()
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    for loss, correct, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(correct, logits.argmax(-1) == labels)
    torch.testing.assert_close(sum(g for _, _, g in results), gradient, rtol=1e-11, atol=1e-11)


def _single_axis():
    from megatrain.parallel.mesh import Axis

    return Axis("tp")


def test_bfloat16_loss_is_summed_in_float32():
    loss, _, gradient = simulate(MeshShape(), vocabulary, 101, False, torch.bfloat16)[0]
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16


def test_the_logits_are_never_gathered():
    recorders = [Recorder() for _ in range(4)]
    vocab = 4096
    simulate(MeshShape(tp=4), vocabulary, vocab, True, DTYPE, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    moved = sum(total.bytes for total in recorders[0].totals().values())
    assert moved < S * B * vocab * 8 / 4


def test_joined_is_a_view_where_it_can_be():
    storage = torch.arange(24.0).view(6, 4)
    top, bottom = storage[:2], storage[2:]
    assert joined([top, bottom]).data_ptr() == storage.data_ptr()
    assert torch.equal(joined([top, bottom]), storage)
    assert torch.equal(joined([bottom, top]), torch.cat([bottom, top]))
