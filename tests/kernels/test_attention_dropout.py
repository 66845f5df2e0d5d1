"""Attention's weights are dropped by the same bits in registers, in memory and by the reference."""

import pytest
import torch
from counted_step import Counted

from megatrain.config.schema import ModelConfig
from megatrain.kernels import attention as kernel
from megatrain.kernels import dispatch
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.attention_dropout import drop_weights, tiled
from megatrain.kernels.attention_mask import AttentionMask, BlockSparse
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import Attention, Build
from megatrain.parallel import rng
from megatrain.parallel.mesh import Axis, Rows

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
KEY = rng.key(7, "attention dropout", 3, "layers.0.attention")


DOCUMENTS = torch.tensor([[0] * 64 + [1] * 70 + [5] * 16, [0] * 150], device=DEVICE).t()
OWN_PREFIX = torch.tensor([[40] * 64 + [64] * 70 + [145] * 16, [100] * 150], device=DEVICE).t()
"""Of the query's own document: some, none, most."""
SPARSE = AttentionMask(sparse=BlockSparse(64, 15, 1))
MASKS = {
    "window of one": AttentionMask(window=1),
    "window without end": AttentionMask(window=2**31 - 1),
    "documents and window": AttentionMask(documents=DOCUMENTS, window=30),
    "prefix": AttentionMask(prefix=torch.tensor([0, 140], device=DEVICE)),
    "prefix in documents": AttentionMask(documents=DOCUMENTS, prefix=OWN_PREFIX),
    "prefix and window": AttentionMask(window=33, prefix=torch.tensor([90, 5], device=DEVICE)),
}


def dropout(p, samples, first_head=0, triton=True):
    return rng.weight_dropout(p, KEY, torch.tensor(samples, device=DEVICE), first_head, triton)


def inputs(s, b, a, g, d, dtype=torch.float32):
    """q, k and v as parts of one product, and a gradient."""
    numbers = torch.Generator().manual_seed(s + a)
    product = torch.randn(s, b, (a + 2 * g) * d, generator=numbers).to(DEVICE, dtype)
    q, k, v = (x.unflatten(-1, (-1, d)).requires_grad_() for x in product.split((a * d, g * d, g * d), -1))
    return (q, k, v), torch.randn(s, b, a * d, generator=numbers).to(DEVICE, dtype)


def results(attend, given, dy):
    y = attend(*given)
    return [y.detach(), *torch.autograd.grad(y, given, dy)]


@pytest.mark.parametrize(
    ("n", "first_group", "groups", "heads", "queries", "first_query", "spans"),
    [
        (2, 3, 2, 1, 3, 0, [slice(0, 5)]),
        (3, 0, 1, 2, 2, 2**31 - 2, [slice(0, 1100)]),
        (1, 5, 3, 3, 2, 40, [slice(0, 8), slice(24, 42)]),
        (2, 1, 2, 1, 2, 7, [slice(3, 9)]),
        (0, 0, 1, 1, 1, 0, [slice(0, 4)]),
    ],
)
@pytest.mark.parametrize("p", [0.25, 1 - 2.0**-33])
def test_weights_in_memory(n, first_group, groups, heads, queries, first_query, spans, p):
    """Of any groups of any sequences, with keys in one stretch or two: the factors of the reference, to the bit."""
    of = dropout(p, [11, 2**32 - 1, 5, 0], first_head=6)
    keys = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(DEVICE)
    x = torch.randn(n, heads * queries, len(keys), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    numbers = torch.arange(first_group, first_group + n, device=DEVICE)
    each = (numbers % groups)[:, None] * heads + torch.arange(heads, device=DEVICE)
    places = torch.arange(first_query, first_query + queries, device=DEVICE)
    factors = of.factors(numbers // groups, each, places, keys).flatten(1, 2)
    ours = drop_weights(x, of.words, first_group, groups, heads, first_query, spans)
    assert torch.equal(ours.view(torch.int32), (x * factors).view(torch.int32))
    if p == 0.25 and n:
        assert 0.05 < float((ours == 0).double().mean()) < 0.5


def test_blocks_have_the_bits_of_the_reference(monkeypatch):
    mask = AttentionMask(sparse=BlockSparse(2, 1, 1))
    monkeypatch.setitem(kernel.BLOCK, DEVICE.type, 4)
    monkeypatch.setitem(kernel.SCRATCH, DEVICE.type, 40)
    given, dy = inputs(6, 1, 2, 1, 4)
    sides = [
        results(lambda *x, t=triton: attention(*x, Variant(mask, dropout=dropout(0.3, [9], 2, t))), given, dy)
        for triton in (True, False)
    ]
    for ours, theirs in zip(*sides, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("s", "b", "a", "g", "d"), [(70, 2, 2, 1, 8), (129, 1, 2, 2, 20), (1, 1, 1, 1, 3)])
def test_tiles_agree_with_blocks(s, b, a, g, d):
    given, dy = inputs(s, b, a, g, d)
    samples = [2**31 + 5, 3][:b]
    ours = results(lambda *x: tiled(*x, dropout(0.3, samples, 5).words), given, dy)
    theirs = results(lambda *x: attention(*x, Variant(dropout=dropout(0.3, samples, 5, triton=False))), given, dy)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_tiles_see_what_the_mask_allows(mask):
    """Over several tiles: documents and prefixes begin and end within them and at their borders."""
    mask = MASKS[mask]
    given, dy = inputs(150, 2, 1, 1, 8)
    ours = results(lambda *x: tiled(*x, dropout(0.3, [1, 4]).words, mask), given, dy)
    theirs = results(lambda *x: attention(*x, Variant(mask, dropout=dropout(0.3, [1, 4], triton=False))), given, dy)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


def test_tiles_keep_no_square():
    given, _ = inputs(70, 1, 1, 1, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        tiled(*given, dropout(0.3, [1]).words)
    assert sorted(saved) == [70, 560, 560, 560, 560]


@pytest.mark.parametrize(
    ("dtype", "d", "mask", "taken"),
    [
        (torch.bfloat16, 64, AttentionMask(), True),
        (torch.float16, 128, AttentionMask(), True),
        (torch.float32, 64, AttentionMask(), False),
        (torch.bfloat16, 136, AttentionMask(), False),
        (torch.bfloat16, 64, AttentionMask(window=2, prefix=torch.tensor([1])), True),
        (torch.bfloat16, 64, AttentionMask(sparse=BlockSparse(2, 1, 1)), False),
        (torch.bfloat16, 64, AttentionMask(causal=False), False),
    ],
    ids=str,
)
def test_tiles_serve_16_bits_with_heads_of_up_to_128(monkeypatch, dtype, d, mask, taken):
    monkeypatch.setattr(kernel, "tiled", lambda q, *_: "tiles")
    (q, k, v), _ = inputs(2, 1, 1, 1, d, dtype)
    found = attention(q, k, v, Variant(mask, dropout=dropout(0.5, [1])))
    assert (found == "tiles") if taken else (found.shape == (2, 1, d))


@pytest.mark.parametrize(
    ("mask", "launches", "megabytes"),
    [(AttentionMask(), 3, 814), (AttentionMask(window=900), 242, 17959)],
    ids=["causal", "window"],
)
def test_what_gpt2_launches_and_moves_on_a_gpu(monkeypatch, mask, launches, megabytes):
    """Of a layer of 124M and a micro-batch of 32 sequences of 1,024, forward and backward: a budget."""
    counted = Counted()
    monkeypatch.setattr(type(dispatch.jit(megabytes_of)), "__getitem__", lambda self, _grid: counted.launched(self))
    product = torch.empty(1024, 32, 3 * 768, dtype=torch.bfloat16, device="meta")
    given = [x.unflatten(-1, (12, 64)).requires_grad_() for x in product.split(768, -1)]
    words = rng.weight_dropout(0.1, KEY, torch.zeros(32, dtype=torch.int64, device="meta"), 0, triton=True)
    with counted:
        results(lambda *x: attention(*x, Variant(mask, dropout=words)), given, torch.empty_like(product[..., :768]))
    assert sum(counted.launches.values()) <= launches, counted.launches
    assert megabytes_of(counted) <= megabytes, counted.moved


def megabytes_of(counted):
    return -(-sum(counted.moved.values()) // 10**6)


@pytest.mark.parametrize(("kernels", "calls"), [("triton", [(2, 1)]), ("reference", [])])
def test_a_layer_takes_the_kernels_of_its_run(monkeypatch, kernels, calls):
    called = []
    monkeypatch.setattr(
        kernel, "tiled", lambda q, k, v, words, _mask: called.append(tuple(words.samples.tolist())) or q.flatten(2)
    )
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=4, vocab_size=9, attention_dropout=0.5)
    build = Build(Rows(Axis("tp")), torch.bfloat16, DEVICE, config, 9, 0, kernels=kernels)
    layer = Attention("layers.0.attention", build)
    for weight in layer.parameters():
        torch.nn.init.zeros_(weight)
    tokens = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    batch = MicroBatch(tokens, tokens, tokens.float(), tokens, torch.tensor([2, 1], device=DEVICE), 0)
    x = torch.zeros(4, 2, 16, dtype=torch.bfloat16, device=DEVICE)
    layer(x, batch)
    layer.eval()(x, batch)
    assert called == calls


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("s", "b", "a", "g", "d", "mask"),
    [
        *((300, 2, 4, 4, 64, None), (513, 1, 8, 2, 128, None), (128, 2, 2, 1, 80, None), (65, 1, 3, 3, 21, None)),
        *((150, 2, 4, 2, 64, mask) for mask in MASKS if mask != "window of one"),  # whose queries have no gradient
    ],
)
def test_compiled_tiles_drop_what_the_cpu_drops(s, b, a, g, d, mask):
    given, dy = inputs(s, b, a, g, d, torch.bfloat16)
    samples, seen = [8, 2**32 - 2], MASKS.get(mask, AttentionMask())
    ours = results(lambda *x: attention(*x, Variant(seen, dropout=dropout(0.3, samples, 5))), given, dy)
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    theirs = results(
        lambda *x: attention(*x, Variant(seen, dropout=dropout(0.3, samples, 5, triton=False))), exact, dy.double()
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).square().mean() / other.square().mean()) < 0.02**2


@pytest.mark.gpu
def test_the_words_of_a_gpu_are_those_of_a_cpu():
    places = torch.arange(300)
    made = [
        rng.weight_dropout(0.3, KEY, torch.tensor([8, 2**32 - 2], device=device), 5, triton=False).factors(
            torch.arange(2, device=device),
            torch.zeros(2, 1, dtype=torch.int64, device=device),
            places.to(device),
            places.to(device),
        )
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(made[0], made[1].cpu())
