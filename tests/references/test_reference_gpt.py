"""The reference against torch's own transformer and against arithmetic by hand."""

import itertools
import math

import pytest
import torch
from reference_gpt import ReferenceBatch, ReferenceGPT, make_rope, reference_train
from reference_schedules import reference_rates
from torch import nn

SHAPE = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "seq_length": 10,
    "vocab_size": 17,
}


def build(seed: int = 0, **switches) -> ReferenceGPT:
    """A model in float64 whose every weight, norms and biases too, is random."""
    model = ReferenceGPT(**{**SHAPE, **switches}).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(b: int = 3, s: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(17, (b, s), generator=torch.Generator().manual_seed(seed))


def batch(seed: int, b: int = 3) -> ReferenceBatch:
    weights = torch.rand(b, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ReferenceBatch(tokens(b, seed=seed), tokens(b, seed=seed + 100), weights)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_are_those_of_torchs_encoder(activation, bias):
    model = build(activation=activation, bias=bias)
    x = torch.randn(3, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for block in model.layers:
        theirs = nn.TransformerEncoderLayer(
            24, 4, 40, 0.0, activation, batch_first=True, norm_first=True, bias=bias, dtype=torch.float64
        )
        mine = dict(block.named_parameters())
        parts = ["weight", "bias"] if bias else ["weight"]
        qkv = [block.attention.query, block.attention.key, block.attention.value]
        state = {f"self_attn.in_proj_{part}": torch.cat([getattr(layer, part) for layer in qkv]) for part in parts}
        for name, other in (
            ("attention.output", "self_attn.out_proj"),
            ("mlp.up", "linear1"),
            ("mlp.down", "linear2"),
            ("attention_norm", "norm1"),
            ("mlp_norm", "norm2"),
        ):
            state.update({f"{other}.{part}": mine[f"{name}.{part}"] for part in parts})
        theirs.load_state_dict(state)
        causal = nn.Transformer.generate_square_subsequent_mask(10, dtype=torch.float64)
        one = torch.ones((), dtype=torch.float64)
        places, documents = torch.arange(10).expand(3, 10), torch.zeros(3, 10, dtype=torch.int64)
        torch.testing.assert_close(
            block(x, one, one, places, documents, one), theirs(x, src_mask=causal, is_causal=True), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("position", "groups"), list(itertools.product(["learned", "rope"], [4, 2, 1])))
def test_explicit_and_fused_attention_agree(position, groups):
    switches = {"position": position, "num_query_groups": groups}
    logits = [build(explicit_softmax=explicit, **switches)(tokens()) for explicit in (True, False)]
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


def test_grouped_attention_is_full_attention_with_repeated_heads():
    grouped, full = build(num_query_groups=2), build()
    state = grouped.logical_weights()
    for name in list(state):
        if ".key." in name or ".value." in name:
            state[name] = state[name].unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_logical(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_future_is_not_seen(position):
    model, first = build(position=position), tokens()
    other = first.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 17
    assert torch.equal(model(first)[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(first)[:, 6:], model(other)[:, 6:])


def test_rope_is_relative_and_rotates_halves():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, dtype=torch.float64, generator=generator).expand(1, 1, 12, 8) for _ in range(2))
    rope, places = make_rope(8, 100.0), torch.arange(12)[None]
    scores = (rope(q, places) @ rope(k, places).transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(scores[0, 0], scores[1, 0])
    angle = 3 * 100.0 ** (-2 / 8)
    x1, x2 = q[0, 0, 0, 1], q[0, 0, 0, 5]
    assert rope(q, places)[0, 0, 3, 1].item() == pytest.approx((x1 * math.cos(angle) - x2 * math.sin(angle)).item(), rel=1e-12)
    assert rope(q, places)[0, 0, 3, 5].item() == pytest.approx((x2 * math.cos(angle) + x1 * math.sin(angle)).item(), rel=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_gated_mlp_by_hand(activation):
    mlp = build(activation=activation, bias=True).layers[0].mlp
    x = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g, u = mlp.gate.weight @ x + mlp.gate.bias, mlp.up.weight @ x + mlp.up.bias
    bent = g / (1 + torch.exp(-g)) if activation == "swiglu" else g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), mlp.down.weight @ (bent * u) + mlp.down.bias, rtol=1e-12, atol=1e-12)


def test_gelu_tanh_and_rmsnorm_by_hand():
    model = build(norm="rmsnorm", norm_eps=0.1)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    normed = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * model.final_norm.weight
    torch.testing.assert_close(model.final_norm(x), normed, rtol=1e-12, atol=1e-12)
    mlp = model.layers[0].mlp
    up = mlp.up(x)
    bent = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    torch.testing.assert_close(mlp(x), mlp.down(bent), rtol=1e-12, atol=1e-12)


def test_logical_names():
    names = dict(
        build(bias=False, tied_embeddings=False, activation="swiglu", position="rope", norm="rmsnorm", num_layers=1).logical()
    )
    assert {name: list(p.shape) for name, p in names.items()} == {
        "embedding.tokens": [17, 24],
        "layers.0.attention_norm.weight": [24],
        "layers.0.attention.query.weight": [24, 24],
        "layers.0.attention.key.weight": [24, 24],
        "layers.0.attention.value.weight": [24, 24],
        "layers.0.attention.output.weight": [24, 24],
        "layers.0.mlp_norm.weight": [24],
        "layers.0.mlp.gate.weight": [40, 24],
        "layers.0.mlp.up.weight": [40, 24],
        "layers.0.mlp.down.weight": [24, 40],
        "final_norm.weight": [24],
        "head.weight": [17, 24],
    }
    full = dict(build().logical())
    assert (
        "embedding.positions" in full
        and "layers.1.mlp.up.bias" in full
        and "final_norm.bias" in full
        and "head.weight" not in full
    )
    with pytest.raises(KeyError, match=r"missing .*final_norm.bias"):
        build().load_logical(build(norm="rmsnorm").logical_weights())


def test_masks_multiply_their_site():
    model, seen = build(), []

    def masks(site: str) -> torch.Tensor:
        if site.endswith(".weights"):
            return torch.ones(())
        seen.append(site)
        return torch.zeros(3, 10, 24)

    logits = model(tokens(), masks)
    assert seen == ["embedding", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
    torch.testing.assert_close(logits, (model.tokens.weight @ model.final_norm.bias).expand_as(logits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_micro_batches_make_one_step(optimizer):
    whole = batch(1, 4)
    halves = [ReferenceBatch(*(t[i : i + 2] for t in (whole.tokens, whole.labels, whole.weights))) for i in (0, 2)]
    runs = [reference_train(build(), [group, group], rates=[1e-3, 5e-4], optimizer=optimizer) for group in ([whole], halves)]
    for name in ("losses", "grad_norms", "first_gradients", "moments"):
        torch.testing.assert_close(getattr(runs[0], name), getattr(runs[1], name), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(runs[0].weights, runs[1].weights, rtol=1e-8, atol=1e-11)


def test_sgd_step_by_hand():
    model, data = build(), batch(1)
    before = model.logical_weights()
    run = reference_train(model, [[data]], rates=[0.5], optimizer="sgd", weight_decay=0.1, clip_grad=0.01)
    norm = math.sqrt(sum(g.square().sum().item() for g in run.first_gradients.values()))
    assert run.grad_norms == [pytest.approx(norm, rel=1e-12)]
    for name, start in before.items():
        decay = 0.1 * start if start.dim() == 2 else 0.0
        wanted = start - 0.5 * (run.first_gradients[name] * 0.01 / (norm + 1e-6) + decay)
        torch.testing.assert_close(run.weights[name], wanted, rtol=1e-12, atol=1e-12)
    log_p = build()(data.tokens).log_softmax(-1).gather(-1, data.labels[..., None])[..., 0]
    assert run.losses == [pytest.approx((-(log_p * data.weights).sum() / data.weights.sum()).item(), rel=1e-12)]


def test_schedules_by_hand():
    assert reference_rates("constant", 4, 1.0, 0.0, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert reference_rates("linear", 6, 1.0, 0.2, warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])
    assert reference_rates("cosine", 4, 1.0, 0.0) == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert reference_rates("wsd", 10, 1.0, 0.1, warmup_steps=1, decay_fraction=0.3) == pytest.approx([1.0] * 8 + [0.7, 0.4])
