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
    "post-norm": {"norm_placement": "post", "dropout": 0.1},
    "sandwich": {"norm_placement": "sandwich", "norm": "rmsnorm", "dropout": 0.1},
    "a part of each head": {"position": "rope", "rope_fraction": 0.5},
    "neighbours": {"position": "rope", "rope_interleaved": True, "rope_fraction": 0.8},
    "longer, linear": {"position": "rope", "rope_scaling": "linear", "rope_factor": 4.0},
    "longer, llama3": {"position": "rope", "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 20},
    "longer, yarn": {
        "position": "rope",
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 64,
        "rope_theta": 100.0,
        "rope_beta_fast": 8.0,
    },
    "alibi": {"position": "alibi"},
    "alibi of three heads": {"position": "alibi", "num_attention_heads": 3, "head_dim": 8},
    "alibi of seven heads": {"position": "alibi", "num_attention_heads": 7, "head_dim": 4, "num_query_groups": 1},
    "window": {"window": 5, "position": "rope"},
    "windows in every second layer": {"window": 5, "window_pattern": ("local", "global"), "position": "rope"},
    "sparse": {"sparse_block": 3, "sparse_local_blocks": 2, "sparse_global_blocks": 1},
    "attention dropout": {"attention_dropout": 0.3, "num_query_groups": 2},
    "attention dropout in a window": {"attention_dropout": 0.3, "window": 4, "dropout": 0.1},
    "float32 residuals": {"residual_fp32": True, "norm_placement": "sandwich"},
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


OTHERS = {
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.05},
    "both": {"label_smoothing": 0.2, "z_loss": 0.01},
    "chunks": {"loss_chunk": 7},
    "chunks of both": {"loss_chunk": 5, "label_smoothing": 0.2, "z_loss": 0.01},
    "documents apart": {"isolate_documents": True},
}


@pytest.mark.parametrize("model", [{}, {"position": "rope", "tied_embeddings": False, "logit_softcap": 0.5}], ids=["", "rope"])
@pytest.mark.parametrize("others", OTHERS)
def test_what_the_loss_is_made_of(others, model):
    check(config_of(replace(BASE, **model), OPTIMIZERS[0], "fp64", **OTHERS[others]))


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.lr_schedule}-clip{o.clip_grad}")
def test_every_optimizer_and_schedule(optim):
    check(config_of(replace(BASE, dropout=0.1), optim, "fp64", micro_batch_size=1))
