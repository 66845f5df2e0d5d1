"""Every variant of attention (masks, ALiBi, dropout, softmax) agrees with softmax over a dense mask, in values and gradients."""

import pytest
import torch
from pretended_gpu import PretendedGpu

from megatrain.kernels import attention as kernel
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.attention_dropout import WeightDropout
from megatrain.kernels.attention_mask import AttentionMask, BlockSparse, keys_seen
from megatrain.kernels.flex_attention import flex

S, B, A, G, D = 37, 3, 4, 2, 8
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 20 + [2] * 12, [0] * 37, [0] + [3] * 30 + [4] * 6]).t()
OWN_PREFIX = torch.tensor([[3] * 5 + [11] * 20 + [25] * 12, [30] * 37, [0] + [31] * 30 + [37] * 6]).t()
"""Of the query's own document: none of it, some, all."""
MASKS = {
    "causal": AttentionMask(),
    "all": AttentionMask(causal=False),
    "window": AttentionMask(window=6),
    "window of one": AttentionMask(window=1),
    "window both ways": AttentionMask(causal=False, window=6),
    "wide window": AttentionMask(window=100),
    "sparse": AttentionMask(sparse=BlockSparse(4, 2, 1)),
    "sparse, own block alone": AttentionMask(sparse=BlockSparse(5, 1, 0)),
    "sparse within a window": AttentionMask(window=11, sparse=BlockSparse(4, 2, 2)),
    "documents": AttentionMask(documents=DOCUMENTS),
    "documents and window": AttentionMask(window=9, documents=DOCUMENTS),
    "documents and sparse": AttentionMask(sparse=BlockSparse(4, 2, 1), documents=DOCUMENTS),
    "prefix": AttentionMask(prefix=torch.tensor([0, 14, 37])),
    "prefix of nothing": AttentionMask(prefix=torch.zeros(3, dtype=torch.int64)),
    "prefix in documents": AttentionMask(documents=DOCUMENTS, prefix=OWN_PREFIX),
    "prefix and window": AttentionMask(window=9, prefix=torch.tensor([20, 5, 30])),
}
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.01], dtype=torch.float64)


def seen(mask, q, k, b):
    """Whether query q of sequence b may see key k, from the definitions."""
    prefix = -1 if mask.prefix is None else mask.prefix[b] if mask.prefix.dim() == 1 else mask.prefix[q, b]
    return all(
        [
            not mask.causal or k <= q or bool(k < prefix),
            mask.window is None or abs(q - k) < mask.window,
            mask.sparse is None
            or k // mask.sparse.block < mask.sparse.global_blocks
            or q // mask.sparse.block - k // mask.sparse.block < mask.sparse.local_blocks,
            mask.documents is None or bool(mask.documents[q, b] == mask.documents[k, b]),
        ]
    )


def written_out(q, k, v, variant, factors=None):
    """[s, b, a, d], [s, b, g, d] -> [s, b, a d]."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbad,nbad->basn", q, k) / q.shape[-1] ** 0.5
    if variant.slopes is not None:
        places = torch.arange(S, dtype=torch.float64)
        scores = scores - variant.slopes[:, None, None] * (places[None, :] - places[:, None]).abs()
    allowed = torch.tensor([[[seen(variant.mask, i, j, b) for j in range(S)] for i in range(S)] for b in range(B)])
    p = torch.softmax(scores.masked_fill(~allowed[:, None], -torch.inf), -1)
    return torch.einsum("basn,nbad->sbad", p if factors is None else p * factors, v).flatten(2)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(S, B, n, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (A, G, G)]


def same(ours, theirs, given, tolerance=1e-11):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    scale = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = [torch.autograd.grad((y * scale).sum(), given) for y in (ours, theirs)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("block", "scratch"), [(128, 1 << 21), (5, 64), (8, 1000)])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["", "alibi"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_biases(monkeypatch, mask, slopes, block, scratch):
    monkeypatch.setitem(kernel.BLOCK, "cpu", block)
    monkeypatch.setitem(kernel.SCRATCH, "cpu", scratch)
    given, variant = inputs(), Variant(MASKS[mask], slopes)
    same(attention(*given, variant), written_out(*given, variant), given)


@pytest.mark.parametrize(
    ("d", "dtype", "taken"), [(16, torch.bfloat16, True), (8, torch.bfloat16, False), (32, torch.float64, False)], ids=str
)
def test_flex_attention_is_given_what_it_takes_on_a_gpu(monkeypatch, d, dtype, taken):
    monkeypatch.setattr(kernel, "flex", lambda q, *_: "flex")
    with PretendedGpu().here():
        q = torch.empty(4, 1, 2, d, dtype=dtype, device="cuda")
        found = attention(q, q, q, Variant(AttentionMask(window=2)))
        assert (found == "flex") if taken else (found.shape == (4, 1, 2 * d))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["", "alibi"])
@pytest.mark.parametrize("mask", MASKS)
def test_flex_attention_sees_the_same(mask, slopes):
    given = [x.detach() for x in inputs()]
    variant = Variant(MASKS[mask], slopes)
    torch.testing.assert_close(flex(*given, variant.mask, slopes), attention(*given, variant), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [128, 5])
@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
def test_dropout_multiplies_probabilities(monkeypatch, mask, block):
    monkeypatch.setitem(kernel.BLOCK, "cpu", block)
    monkeypatch.setitem(kernel.SCRATCH, "cpu", 200)
    whole = (torch.rand(B, A, S, S, generator=torch.Generator().manual_seed(3)) < 0.7).double() / 0.7

    def factors(sequences, heads, queries, keys):
        return whole[sequences[:, None, None, None], heads[:, :, None, None], queries[:, None], keys]

    given, variant = inputs(), Variant(MASKS[mask], dropout=WeightDropout(factors))
    same(attention(*given, variant), written_out(*given, variant, whole), given)


@pytest.mark.parametrize("pieces", [(30, 7), (36, 1), (1,) * 37])
@pytest.mark.parametrize("mask", ["window", "sparse", "sparse within a window"])
def test_pieces_of_a_prompt_are_the_prompt(mask, pieces):
    q, k, v = (x.detach() for x in inputs())
    variant = Variant(MASKS[mask], SLOPES)
    ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
    parts = [attention(q[end - n : end], k[:end], v[:end], variant) for n, end in zip(pieces, ends, strict=True)]
    torch.testing.assert_close(torch.cat(parts), attention(q, k, v, variant), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [(30, 7), (20, 10, 1, 1, 5)])
def test_what_follows_a_prefix_comes_in_pieces(pieces):
    q, k, v = (x.detach() for x in inputs())
    variant = Variant(AttentionMask(prefix=torch.tensor([20, 3, 11])))
    ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
    parts = [attention(q[end - n : end], k[:end], v[:end], variant) for n, end in zip(pieces, ends, strict=True)]
    torch.testing.assert_close(torch.cat(parts), attention(q, k, v, variant), rtol=1e-12, atol=1e-12)


def test_a_long_prefix_makes_no_square_of_scores(monkeypatch):
    sizes, scaled = [], kernel._scaled_product

    def product(scale, a, b, *room):
        sizes.append(a.shape[0] * a.shape[1] * b.shape[2])
        return scaled(scale, a, b, *room)

    monkeypatch.setattr(kernel, "_scaled_product", product)
    q = torch.randn(5000, 2, 1, 4)
    attention(q, q, q, Variant(AttentionMask(prefix=torch.tensor([4000, 300]))))
    assert max(sizes) <= kernel.SCRATCH["cpu"]


def test_a_narrow_softmax_is_nearly_the_wide_one():
    q, k, v = (x.detach().bfloat16() for x in inputs())
    wide, narrow = (attention(q, k, v, Variant(slopes=SLOPES, wide_softmax=wide)) for wide in (True, False))
    assert not torch.equal(wide, narrow)
    torch.testing.assert_close(wide, narrow, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mask", MASKS)
def test_spans_cover_what_is_seen_and_little_more(mask):
    mask = MASKS[mask]
    for start, end in [(0, 5), (5, 10), (17, 30), (36, 37)]:
        spans = mask.spans(start, end, S)
        inside = {k for span in spans for k in range(span.start, span.stop)}
        wanted = {k for q in range(start, end) for k in range(S) for b in range(B) if seen(mask, q, k, b)}
        assert wanted <= inside
        assert sum(span.stop - span.start for span in spans) == len(inside), "spans overlap"


def test_a_window_of_a_long_text_makes_no_large_products(monkeypatch):
    sizes, scaled = [], kernel._scaled_product

    def product(scale, a, b, *room):
        sizes.append((*a.shape[:2], b.shape[2]))
        return scaled(scale, a, b, *room)

    monkeypatch.setattr(kernel, "_scaled_product", product)
    q = torch.randn(6000, 1, 1, 4)
    attention(q, q, q, Variant(AttentionMask(window=64)))
    assert max(shape[-1] for shape in sizes if shape[-1] != 4) <= 128 + 64


@pytest.mark.parametrize("mask", ["causal", "window", "sparse", "all"])
def test_average_number_of_keys(mask):
    counted = sum(seen(MASKS[mask], q, k, 0) for q in range(S) for k in range(S)) / S
    assert keys_seen(MASKS[mask], S) == pytest.approx(counted - 0.5)
    assert keys_seen(AttentionMask(window=1000), 20_000) == pytest.approx(1000 - 1000**2 / 40_000, rel=0.01)
