"""The single-process model agrees with an independent plain-PyTorch GPT, for every switch, optimizer and schedule."""

from dataclasses import replace

import pytest
from against_reference import BASE, OPTIMIZERS, check, config_of

SWITCHES = {
    "gpt2": {},
    "rmsnorm": {"norm": "rmsnorm"},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "swiglu": {"activation": "swiglu", "ffn_hidden_size": 48},
    "geglu": {"activation": "geglu"},
    "rope": {"position": "rope", "rope_theta": 500.0},
    "grouped": {"num_query_groups": 2},
    "multi_query": {"num_query_groups": 1, "position": "rope"},
    "no_bias": {"bias": False},
    "untied": {"tied_embeddings": False},
    "dropout": {"dropout": 0.1},
    "no positions": {"position": "none"},
    "wide heads": {"head_dim": 12, "num_query_groups": 2},
    "narrow heads": {"head_dim": 4, "position": "rope"},
    "three heads of ten": {"num_attention_heads": 3, "head_dim": 10},
    "biases of q, k, v alone": {"bias": False, "qkv_bias": True},
    "no biases of q, k, v": {"qkv_bias": False},
    "normalised queries and keys": {"qk_norm": True, "num_query_groups": 2},
    "normalised queries and keys, rms": {"qk_norm": True, "norm": "rmsnorm", "position": "rope", "head_dim": 12},
    "capped logits": {"logit_softcap": 0.5, "tied_embeddings": False},
    "embedding norm": {"embedding_norm": True, "dropout": 0.1},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "num_query_groups": 2,
        "bias": False,
        "tied_embeddings": False,
        "dropout": 0.2,
    },
}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_the_model(switch, precision):
    check(config_of(replace(BASE, **SWITCHES[switch]), OPTIMIZERS[0 if precision == "fp64" else 2], precision))


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.lr_schedule}-clip{o.clip_grad}")
def test_every_optimizer_and_schedule(optim):
    check(config_of(replace(BASE, dropout=0.1), optim, "fp64", micro_batch_size=1))
