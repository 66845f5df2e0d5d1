"""Every switch of the model trains to the same numbers under every kind of layout."""

from dataclasses import replace

import pytest
import torch

from megatrain.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.testing.layouts import Layout
from megatrain.verbs.verify import Verifier

BASE = ModelConfig(
    num_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=8,
    vocab_size=29,
    dropout=0.1,
    init_std=0.1,
)
SWITCHES = {
    "no positions": {"position": "none"},
    "wide heads": {"head_dim": 6, "position": "rope"},
    "biases of q, k, v alone": {"bias": False, "qkv_bias": True, "dropout": 0.0},
    "normalised queries and keys": {"qk_norm": True},
    "normalised queries and keys, rms": {"qk_norm": True, "norm": "rmsnorm", "position": "rope", "tied_embeddings": False},
    "multi-query, normalised": {"qk_norm": True, "num_query_groups": 1},
    "capped logits": {"logit_softcap": 0.5},
    "embedding norm": {"embedding_norm": True},
    "post-norm": {"norm_placement": "post"},
    "deepnorm": {"norm_placement": "deepnorm", "init": "xavier", "embedding_grad_scale": 0.1, "activation": "geglu"},
    "deepnorm, rms, given alpha": {
        "norm_placement": "deepnorm",
        "deepnorm_alpha": 1.5,
        "norm": "rmsnorm",
        "residual_fp32": True,
    },
    "sandwich": {"norm_placement": "sandwich", "norm": "rmsnorm", "tied_embeddings": False},
    "yarn on neighbours": {
        "position": "rope",
        "rope_interleaved": True,
        "rope_fraction": 0.5,
        "rope_scaling": "yarn",
        "rope_factor": 2.0,
    },
    "alibi": {"position": "alibi", "num_query_groups": 4},
    "window": {"window": 3, "position": "rope", "num_query_groups": 1},
    "two windows in three": {"window": 3, "window_pattern": ("local", "local", "global"), "position": "rope"},
    "sparse": {"sparse_block": 2, "sparse_local_blocks": 2, "position": "none"},
    "attention dropout": {"attention_dropout": 0.3, "dropout": 0.0},
    "initialisation": {"init": "fan_in", "embedding_init_std": 0.3, "scale_residual_init": False},
    "small initialisation": {"init": "small", "residual_fp32": True},
}
LOSSES = {
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "chunks": {"loss_chunk": 5},
    "smoothed in chunks": {"loss_chunk": 3, "label_smoothing": 0.1, "z_loss": 0.01},
    "recomputed": {"recompute": "full", "loss_chunk": 8},
}
LAYOUTS = ["tp4-sp", "tp2-sp-pp2-zb_v-dp2-zero3", "pp2-interleaved-dp2-zero2"]


def verifier_of(isolate_documents=False, train=None, **switches):
    config = Config(
        model=replace(BASE, **switches),
        data=DataConfig(isolate_documents=isolate_documents),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=2, global_batch_size=8, micro_batch_size=2, precision="fp64", **(train or {})),
    )
    return Verifier(config, 2, "fp64")


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_agrees_under_every_layout(switch):
    verifier = verifier_of(**SWITCHES[switch])
    for layout in LAYOUTS:
        assert max(verifier.check(Layout.parse(layout)).values()) < 1e-8


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents apart"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_agrees_under_every_layout(loss, documents):
    verifier = verifier_of(documents, LOSSES[loss], logit_softcap=1.0, tied_embeddings=documents)
    for layout in LAYOUTS:
        assert max(verifier.check(Layout.parse(layout)).values()) < 1e-8


def test_the_post_norm_block_is_torchs_encoder_layer():
    config = replace(BASE, norm_placement="post", activation="relu", num_query_groups=None, dropout=0.0, position="none")
    ctx = ParallelContext.single()
    chunk = build_gpt(Build(Rows(ctx.tp), torch.float64, ctx.device, config, 29, seed=1))[0]
    block = chunk.stack.blocks[0]
    layer = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="relu", norm_first=False, dtype=torch.float64)
    state = {p.spec.name.removeprefix("layers.0."): p.detach() for p in block.parameters()}
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([state[f"attention.{n}.weight"] for n in ("query", "key", "value")]),
            "self_attn.in_proj_bias": torch.cat([state[f"attention.{n}.bias"] for n in ("query", "key", "value")]),
            **{f"self_attn.out_proj.{n}": state[f"attention.output.{n}"] for n in ("weight", "bias")},
            **{f"linear1.{n}": state[f"mlp.up.{n}"] for n in ("weight", "bias")},
            **{f"linear2.{n}": state[f"mlp.down.{n}"] for n in ("weight", "bias")},
            **{f"norm1.{n}": state[f"attention_norm.{n}"] for n in ("weight", "bias")},
            **{f"norm2.{n}": state[f"mlp_norm.{n}"] for n in ("weight", "bias")},
        }
    )
    x = torch.randn(8, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = torch.zeros(8, 3, dtype=torch.int64)
    batch = MicroBatch(tokens, tokens, torch.ones(8, 3), torch.arange(8)[:, None].expand(8, 3), torch.arange(3))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(8, dtype=torch.float64)
    torch.testing.assert_close(block(x, batch), layer(x, src_mask=causal, is_causal=True), rtol=1e-12, atol=1e-12)


def test_isolated_documents_are_what_they_are_alone():
    """Logits of a document packed behind another one are those that it has alone."""
    for switches in ({"position": "learned"}, {"position": "alibi"}, {"position": "rope", "window": 3}):
        config = replace(BASE, dropout=0.0, **switches)
        ctx = ParallelContext.single()
        chunk = build_gpt(Build(Rows(ctx.tp), torch.float64, ctx.device, config, 29, seed=1))[0]
        tokens = torch.randint(29, (8, 1), generator=torch.Generator().manual_seed(3))

        def logits(first, last, documents=None, positions=None, chunk=chunk, tokens=tokens, config=config):
            part = tokens[first:last]
            places = torch.arange(last - first)[:, None] if positions is None else positions
            mask = AttentionMask(documents=documents)
            batch = MicroBatch(part, part, torch.ones(part.shape), places, torch.zeros(1, dtype=torch.int64), mask=mask)
            return chunk.head.logits(chunk(None, batch))

        documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])[:, None]
        packed = logits(0, 8, documents, torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])[:, None])
        torch.testing.assert_close(packed, torch.cat([logits(0, 3), logits(3, 8)]), rtol=1e-11, atol=1e-11)
