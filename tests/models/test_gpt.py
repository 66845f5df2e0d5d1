"""What a GPT is made of under every switch, as a whole and in pieces; attention, positions and the objective on their own."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from megatrain.config.schema import ModelConfig
from megatrain.models.batch import MicroBatch, NextToken
from megatrain.models.gpt import GPT
from megatrain.models.layers import Attention, Build, LearnedPositions, Rotary
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.param import initialise
from megatrain.runtime.flops import parameter_count

S, B, H, V = 6, 3, 16, 29
CONFIG = ModelConfig(num_layers=3, hidden_size=H, num_attention_heads=4, seq_length=S, vocab_size=V, init_std=0.5)
SINGLE = ParallelContext.single()
SWITCHES = [
    {},
    {"tied_embeddings": False},
    {"position": "rope", "norm": "rmsnorm", "bias": False, "activation": "swiglu"},
    {"num_query_groups": 2, "activation": "geglu", "ffn_hidden_size": 40},
    {"num_query_groups": 1, "norm": "rmsnorm"},
    {"bias": False, "activation": "relu"},
]


SANDWICH = {
    "embedding": {"embedding.tokens", "embedding.positions", "embedding.block_positions"},
    "head": {"head.weight"},
    "attention": {f"layers.0.attention.{m}.{w}" for m in ("query", "key", "value", "output") for w in ("weight", "bias")},
    "mlp": {f"layers.0.mlp.{matrix}.{w}" for matrix in ("gate", "up", "down") for w in ("weight", "bias")},
    "norm": {
        f"{norm}.{w}"
        for w in ("weight", "bias")
        for norm in (
            "embedding.norm", "layers.0.attention_norm", "layers.0.attention.query_norm", "layers.0.attention.key_norm",
            "layers.0.attention_output_norm", "layers.0.mlp_norm", "layers.0.mlp_output_norm", "final_norm",
        )
    },
}  # fmt: skip
"""Part of a model, as reports tell them apart -> its parameters, of a layer with everything a layer can have."""


def build(**changes):
    return Build(Rows(SINGLE.tp), torch.float64, torch.device("cpu"), replace(CONFIG, **changes), V, 0)


def filled(module):
    for p in module.parameters():
        initialise(p, SINGLE.tp, 1)
    return module


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(rows=S, first=0):
    tokens = torch.arange(rows * B).view(rows, B) % V
    positions = torch.arange(first, first + rows)[:, None].expand(rows, B)
    return MicroBatch(tokens, tokens.roll(-1, 0), torch.ones(rows, B), positions, torch.arange(B))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_parameters_are_as_many_as_counted_with_names_of_their_own(switches):
    made = build(**switches)
    parameters = GPT(made, range(3)).logical_parameters()
    names = [p.spec.name for p in parameters]
    assert sum(p.spec.numel for p in parameters) == parameter_count(made.config, V)
    assert len(set(names)) == len(names)
    assert ("head.weight" in names) == (not made.config.tied_embeddings)
    assert ("embedding.positions" in names) == (made.config.position == "learned")
    assert ("layers.0.mlp.gate.weight" in names) == made.config.gated
    assert any(name.endswith("bias") for name in names) == made.config.bias
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    key = next(p for p in parameters if p.spec.name == "layers.1.attention.key.weight")
    assert key.spec.shape == (made.config.query_groups * 4, H)


def test_pieces_in_a_row_are_the_whole():
    whole = filled(GPT(build(tied_embeddings=False), range(3)))
    pieces = [
        filled(GPT(build(tied_embeddings=False), layers, first=layers[0] == 0, last=layers[-1] == 2))
        for layers in (range(1), range(1, 3))
    ]
    hidden = None
    for piece in pieces:
        hidden = piece(hidden, batch())
    assert torch.equal(hidden, whole(None, batch()))
    assert torch.equal(pieces[-1].head.logits(hidden), whole.head.logits(hidden))
    assert pieces[0].head is None and pieces[1].embedding is None
    names = [p.spec.name for piece in pieces for p in piece.logical_parameters()]
    assert names == [p.spec.name for p in whole.logical_parameters()]


def test_a_tied_head_is_the_embedding():
    model = GPT(build(), range(1))
    assert model.head.weight is model.embedding.tokens.weight


def test_no_token_sees_a_later_one():
    model = filled(GPT(build(position="rope"), range(3)))
    changed = batch()
    changed.tokens[4] = (changed.tokens[4] + 1) % V
    before, after = model(None, batch()), model(None, changed)
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_grouped_heads_are_full_heads_that_share_keys_and_values():
    grouped = filled(Attention("a", build(num_query_groups=2, bias=False)))
    full = filled(Attention("a", build(bias=False)))
    own = {p.spec.name: p for p in grouped.parameters()}
    with torch.no_grad():
        for p in full.parameters():
            source = own[p.spec.name]
            heads = source.view(2, 4, H).repeat_interleave(2, 0).reshape(H, H) if source.shape != p.shape else source
            p.copy_(heads)
    x = numbers(0, S, B, H)
    torch.testing.assert_close(grouped(x, batch()), full(x, batch()))


def test_layers_share_one_table_of_angles_as_long_as_the_positions():
    made = build(position="rope", max_positions=50)
    first, second = (Attention(name, made).rotary for name in "ab")
    assert first.cos.shape == (50, 2) and first.cos is second.cos and first.sin is second.sin


def test_rotary_turns_pairs_of_halves_by_their_position():
    rotary = Rotary(build(rope_theta=100.0))
    x = numbers(0, S, B, 4, 4)
    (y,) = rotary(batch(), x)
    assert torch.equal(y[0], x[0])
    angles = torch.arange(S, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    turned = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    torch.testing.assert_close(y, torch.cat([turned.real, turned.imag], -1))
    (later,) = rotary(batch(3, 3), x[:3])
    scores = lambda q, k: (q * k).sum(-1)  # noqa: E731
    (early,) = rotary(batch(3, 0), x[:3])
    torch.testing.assert_close(scores(later[0], later[2]), scores(early[0], early[2]), msg="only distances count")


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    rotary = Rotary(build())
    x = numbers(0, S, B, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(batch(), x)[0], (x,))


def test_learned_positions_are_looked_up_not_counted():
    layer = filled(LearnedPositions("p", build()))
    x = numbers(0, 2, B, H)
    torch.testing.assert_close(layer(x, batch(2, 3).positions), x + layer.weight[3:5, None])


def test_every_parameter_says_of_which_part_it_is():
    switches = {"norm_placement": "sandwich", "position": "learned_2d", "embedding_norm": True, "qk_norm": True}
    made = GPT(build(num_layers=1, tied_embeddings=False, activation="swiglu", **switches), [0])
    assert {p.spec.name: p.spec.part for p in made.logical_parameters()} == {
        n: part for part in SANDWICH for n in SANDWICH[part]
    }
    alone = GPT(build(), [2], first=False, last=True)  # the last stage's copy of a tied matrix
    assert {p.spec.part for p in alone.logical_parameters() if p.spec.name == "embedding.tokens"} == {"embedding"}


class Plain:
    """A head whose hidden states are logits already."""

    training = False

    def cross_entropy(self, x, labels):
        loss = functional.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return loss, x.argmax(-1) == labels


def test_the_objective_weighs_each_token_and_sums():
    logits, made = numbers(0, S, B, V), batch()
    weights = torch.tensor([0.0, 1.0, 0.5] * (S * B // 3)).view(S, B)
    made = replace(made, loss_weights=weights)
    loss = NextToken()(Plain(), logits, made)
    each, right = Plain().cross_entropy(logits, made.labels)
    assert loss.total.item() == pytest.approx((each * weights).sum().item())
    assert loss.statistics["correct"].item() == pytest.approx((right * weights).sum().item())
    assert NextToken().weight(made).item() == weights.sum().item()
