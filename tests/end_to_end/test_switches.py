"""Every switch of the model trains to the same numbers under every kind of layout."""

from dataclasses import replace

import pytest

from megatrain.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from megatrain.testing.layouts import Layout
from megatrain.verify import Verifier

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
}
LAYOUTS = ["tp4-sp", "tp2-sp-pp2-zb_v-dp2-zero3", "pp2-interleaved-dp2-zero2"]


@pytest.fixture(scope="module", params=SWITCHES)
def verifier(request):
    config = Config(
        model=replace(BASE, **SWITCHES[request.param]),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=2, global_batch_size=8, micro_batch_size=2, precision="fp64"),
    )
    return Verifier(config, 2, "fp64")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_switch_agrees_under_every_layout(verifier, layout):
    assert max(verifier.check(Layout.parse(layout)).values()) < 1e-8
