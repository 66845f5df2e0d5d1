"""Blockwise attention agrees with softmax written out, in values and gradients, for any number of heads, groups and blocks."""

import pytest
import torch
from torch.nn import functional

from megatrain.kernels import attention as kernel
from megatrain.kernels.attention import PLAIN, Variant, attention
from megatrain.kernels.attention_mask import AttentionMask


def written_out(q, k, v):
    """[s, b, a, d], [n, b, g, d] -> [s, b, a d]."""
    s, n, repeat = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("sbad,nbad->basn", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(s, n, dtype=torch.bool).triu(n - s + 1)
    return torch.einsum("basn,nbad->sbad", torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), v).flatten(2)


def inputs(s, b, a, g, d, dtype=torch.float64, n=None):
    generator = torch.Generator().manual_seed(s + 10 * a + g)
    sizes = ((s, a), (n or s, g), (n or s, g))
    return [
        torch.randn(length, b, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for length, heads in sizes
    ]


@pytest.mark.parametrize("scratch", [1 << 21, 64])
@pytest.mark.parametrize("block", [128, 4])
@pytest.mark.parametrize(
    ("s", "b", "a", "g"), [(1, 1, 1, 1), (7, 2, 4, 4), (9, 3, 4, 2), (130, 1, 2, 1), (16, 2, 6, 3), (11, 3, 6, 1)]
)
def test_values_and_gradients(monkeypatch, s, b, a, g, block, scratch):
    monkeypatch.setitem(kernel.BLOCK, "cpu", block)
    monkeypatch.setitem(kernel.SCRATCH, "cpu", scratch)
    q, k, v = inputs(s, b, a, g, 8)
    ours, theirs = attention(q, k, v), written_out(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, reference in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


def test_strided_inputs():
    fused = torch.randn(10, 2, 3 * 4 * 8, dtype=torch.float64)
    q, k, v = (x.unflatten(-1, (4, 8)) for x in fused.split(32, dim=-1))
    torch.testing.assert_close(attention(q, k, v), written_out(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("s", "n"), [(1, 6), (3, 6), (6, 6)])
def test_queries_that_continue_a_cache(s, n, causal):
    q, k, v = inputs(s, 2, 4, 2, 8, n=n)
    reference = written_out(q, k, v)
    if not causal:
        widened = torch.cat([q.new_zeros(n - s, *q.shape[1:]), q]) if n > s else q
        k2, v2 = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = torch.einsum("sbad,nbad->basn", widened, k2) / 8**0.5
        reference = torch.einsum("basn,nbad->sbad", torch.softmax(scores, -1), v2).flatten(2)[n - s :]
    torch.testing.assert_close(attention(q, k, v, Variant(AttentionMask(causal=causal))), reference, rtol=1e-10, atol=1e-10)


def test_gradients_are_the_derivatives(monkeypatch):
    monkeypatch.setitem(kernel.BLOCK, "cpu", 2)
    monkeypatch.setitem(kernel.SCRATCH, "cpu", 12)
    assert torch.autograd.gradcheck(attention, inputs(5, 2, 4, 2, 3))


@pytest.mark.parametrize("pieces", [(7, 1, 1), (1, 4, 4), (3, 6), (9,)])
def test_pieces_of_a_prompt_are_the_prompt(pieces):
    q, k, v = (x.detach() for x in inputs(9, 2, 4, 2, 8))
    ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
    parts = [attention(q[end - n : end], k[:end], v[:end]) for n, end in zip(pieces, ends, strict=True)]
    torch.testing.assert_close(torch.cat(parts), attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_bfloat16_is_about_as_exact_as_torchs_own_kernel():
    q, k, v = inputs(200, 2, 4, 4, 16, torch.bfloat16)
    scale = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(3))
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]

    def fused(q, k, v):
        heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*heads_first, is_causal=True).permute(2, 0, 1, 3).flatten(2)

    def results(compute, given):
        y = compute(*given)
        return [y, *torch.autograd.grad((y * scale.to(y.dtype)).sum(), given)]

    exact = results(written_out, exact_inputs)
    ours = results(attention, (q, k, v))
    theirs = results(fused, (q, k, v))
    for name, mine, other, truth in zip(("y", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - truth).square().mean().sqrt() for x in (mine, other))
        assert error < 3 * allowed, name


@pytest.mark.parametrize("groups", [1, 4])
def test_never_the_whole_square(monkeypatch, groups):
    s, limit = 96, 4000
    monkeypatch.setitem(kernel.BLOCK, "cpu", 8)
    monkeypatch.setitem(kernel.SCRATCH, "cpu", limit)
    sizes, saved, bmm = [], [], torch.bmm

    def product(a, b, **more):
        y = bmm(a, b, **more)
        sizes.append(y.numel())
        return y

    monkeypatch.setattr(torch, "bmm", product)
    q, k, v = inputs(s, 2, 4, groups, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        y = attention(q, k, v)
    y.sum().backward()
    assert max(sizes) <= limit < s * s
    assert max(saved) == q.numel(), "the backward keeps inputs and output alone"


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_multiplied_in_16_bits_is_no_slice(monkeypatch, groups):
    """torch on a CPU copies any other operand, element by element where it is a transposed slice, at every product."""
    monkeypatch.setitem(kernel.BLOCK, "cpu", 8)
    seen, bmm, scaled = [], torch.bmm, kernel._scaled_product

    def product(a, b, **more):
        seen.extend((a, b))
        return bmm(a, b, **more)

    def scaled_product(scale, a, b, room=None):
        seen.extend((a, b))
        return scaled(scale, a, b, room)

    monkeypatch.setattr(torch, "bmm", product)
    monkeypatch.setattr(kernel, "_scaled_product", scaled_product)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in inputs(20, 2, 4, groups, 4))
    attention(q, k, v).sum().backward()
    assert len(seen) == 2 * 7 * 3, "two operands of seven products of three blocks"
    assert all(x.is_contiguous() or x.transpose(1, 2).is_contiguous() for x in seen)


def test_the_memory_of_scores_is_used_again():
    room = kernel._Room(torch.empty(0, dtype=torch.bfloat16))
    first = room.of(2, 3, 8)
    assert room.of(4, 2, 5).data_ptr() == first.data_ptr() and room.of(4, 2, 5).is_contiguous()
    assert room.of(4, 4, 5).shape == (4, 4, 5)
    assert room.triangle(2, torch.float32).tolist() == [[0, -torch.inf], [0, 0]]
    assert room.triangle(3, torch.bfloat16).shape == (3, 3)


def test_no_more_scores_at_a_time_than_the_limit(monkeypatch):
    monkeypatch.setitem(kernel.SCRATCH, "cpu", 40_000)
    x = torch.empty(12, 1, 300, 8)
    for block in kernel._blocks(x, x, 12, PLAIN):
        groups = block.part.stop - block.part.start
        assert groups * (block.end - block.start) * block.end <= 40_000 or groups == 1


def test_a_gpu_takes_few_and_large_blocks():
    """GPT-2 124M with 32 sequences of 1,024: what is bounded is memory, not a cache."""
    queries, keys = (torch.empty(32 * 12, 1, 1024, 64, device="meta") for _ in range(2))
    sizes = [
        (block.part.stop - block.part.start, block.end - block.start, block.end)
        for block in kernel._blocks(queries, keys, 12, PLAIN)
    ]
    assert sizes == [(384, 256, 256), (384, 256, 512), *[(192, 256, 768)] * 2, *[(192, 256, 1024)] * 2]
