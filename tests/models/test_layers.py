"""Norms, dropout and the MLP against what torch and the formulas say."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from megatrain.config.schema import ModelConfig
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import MLP, Attention, Build, Dropout, Norm, scaled_gradient
from megatrain.parallel.mesh import MeshShape, ParallelContext, Rows
from megatrain.parallel.param import initialise
from megatrain.testing import simulate

S, B, H = 6, 3, 16
CONFIG = ModelConfig(num_layers=2, hidden_size=H, num_attention_heads=4, seq_length=S, vocab_size=29, init_std=0.5)


def build(ctx=None, sequence_parallel=False, seed=0, **changes):
    ctx = ctx or ParallelContext.single()
    return Build(Rows(ctx.tp, sequence_parallel), torch.float64, torch.device("cpu"), replace(CONFIG, **changes), 29, seed)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(step=0, samples=None, batch_size=B):
    tokens = torch.zeros(S, batch_size, dtype=torch.int64)
    positions = torch.arange(S)[:, None].expand(S, batch_size)
    samples = torch.arange(batch_size) if samples is None else torch.tensor(samples)
    return MicroBatch(tokens, tokens, torch.ones(S, batch_size), positions, samples, step)


@pytest.mark.parametrize(("norm", "bias"), [("layernorm", True), ("layernorm", False), ("rmsnorm", True)])
def test_a_norm_is_torchs_and_has_a_bias_where_the_config_says_so(norm, bias):
    made = build(norm=norm, bias=bias, norm_eps=1e-3)
    layer = Norm("n", made)
    for p in layer.parameters():
        initialise(p, made.tp, 1)
    x = 2 + numbers(0, S, B, H)
    plain = functional.rms_norm(x, (H,), eps=1e-3) if norm == "rmsnorm" else functional.layer_norm(x, (H,), eps=1e-3)
    torch.testing.assert_close(layer(x), plain)
    assert (layer.bias is not None) == (norm == "layernorm" and bias)
    names = [p.spec.name for p in layer.parameters()]
    assert names == ["n.weight"] + ["n.bias"] * (layer.bias is not None) and not any(p.spec.decay for p in layer.parameters())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_gradients_are_partial_sums_under_sequence_parallelism_alone(sequence_parallel):
    (weight, *_) = Norm("n", build(sequence_parallel=sequence_parallel)).parameters()
    assert weight.spec.partial_over == ("tp" if sequence_parallel else None)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    layer = Dropout(build(dropout=0.25), 0, "mlp")
    x = torch.ones(S, B, 4096, dtype=torch.float64)
    y = layer(x, batch())
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert layer.eval()(x, batch()) is x and Dropout(build(dropout=0.0), 0)(x, batch()) is x


def test_a_mask_belongs_to_sample_and_position_and_changes_with_step_layer_site_and_seed():
    x = torch.ones(S, B, H, dtype=torch.float64)
    mask = Dropout(build(dropout=0.5), 0, "mlp")(x, batch())
    assert torch.equal(mask, Dropout(build(dropout=0.5), 0, "mlp")(x, batch()))
    reordered = Dropout(build(dropout=0.5), 0, "mlp")(x, batch(samples=[2, 0, 1]))
    assert torch.equal(reordered, mask[:, [2, 0, 1]]), "whatever micro-batch the sample is in"
    others = [
        Dropout(build(dropout=0.5), 0, "mlp")(x, batch(step=1)),
        Dropout(build(dropout=0.5), 1, "mlp")(x, batch()),
        Dropout(build(dropout=0.5), 0, "attention")(x, batch()),
        Dropout(build(dropout=0.5, seed=1), 0, "mlp")(x, batch()),
    ]
    assert not any(torch.equal(mask, other) for other in others)


def test_sequence_parallel_ranks_draw_their_rows_of_the_same_mask():
    x = torch.ones(S, B, H, dtype=torch.float64)
    whole = Dropout(build(dropout=0.5), 0, "mlp")(x, batch())

    def rows(ctx):
        layer = Dropout(build(ctx, sequence_parallel=True, dropout=0.5), 0, "mlp")
        return layer(x.chunk(2)[ctx.tp.rank].contiguous(), batch())

    assert torch.equal(torch.cat(simulate(MeshShape(tp=2), rows)), whole)


ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "swiglu": functional.silu,
    "geglu": functional.gelu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_is_its_formula(activation):
    made = build(activation=activation, ffn_hidden_size=24)
    layer = MLP("m", made)
    for p in layer.parameters():
        initialise(p, made.tp, 1)
    weights = {p.spec.name: p.detach() for p in layer.parameters()}
    x = numbers(2, S, B, H)
    up = x @ weights["m.up.weight"].T + weights["m.up.bias"]
    act = ACTIVATIONS[activation]
    gated = activation in ("swiglu", "geglu")
    inner = act(x @ weights["m.gate.weight"].T + weights["m.gate.bias"]) * up if gated else act(up)
    torch.testing.assert_close(layer(x, batch()), inner @ weights["m.down.weight"].T + weights["m.down.bias"])
    assert ("m.gate.weight" in weights) == gated


def test_what_writes_into_the_residual_stream_starts_smaller():
    assert build().init(3, 5).value == 0.5 and build().residual_init(3, 5).value == 0.5 / 2
    assert build(scale_residual_init=False).residual_init(3, 5).value == 0.5


def test_deepnorm_starts_as_glm_130b():
    """Xavier, and values, outputs and both matrices of the MLP divided by sqrt(2 N)."""
    made = build(norm_placement="deepnorm", init="xavier")
    plain, smaller = (2 / (3 + 5)) ** 0.5, (2 / (3 + 5)) ** 0.5 / (2 * made.config.num_layers) ** 0.5
    assert made.init(3, 5).value == pytest.approx(plain)
    assert made.branch_init(3, 5).value == made.residual_init(3, 5).value == pytest.approx(smaller)
    assert made.embedding_init.value == made.config.init_std
    inits = {p.spec.name: p.spec.init.value for p in Attention("a", made).parameters() if p.dim() == 2}
    assert inits["a.value.weight"] < inits["a.key.weight"] and inits["a.query.weight"] > inits["a.output.weight"]
    inner = {p.spec.name: p.spec.init.value for p in MLP("m", made).parameters() if p.dim() == 2}
    assert inner["m.up.weight"] == inner["m.down.weight"] == made.residual_init(H, 4 * H).value


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (9, 0.1), (10, 0.1), (15, 0.55), (20, 1.0), (500, 1.0)])
def test_the_embedding_gradient_is_shrunk_by_a_schedule(step, factor):
    config = build(embedding_grad_scale=0.1, embedding_grad_steps=(10, 10)).config
    assert config.embedding_grad(step) == pytest.approx(factor)
    assert build(embedding_grad_scale=0.1).config.embedding_grad(step) == 0.1
    x = numbers(0, 4, H).requires_grad_()
    y = scaled_gradient(x, factor)
    (factor * x + (1 - factor) * x.detach()).pow(2).sum().backward()
    wanted, x.grad = x.grad, None
    y.pow(2).sum().backward()
    assert torch.equal(y, x)
    torch.testing.assert_close(x.grad, wanted)
