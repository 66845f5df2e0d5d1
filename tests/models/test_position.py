"""Frequencies of rotary positions are those of transformers, to its rounding."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatrain.config.schema import ModelConfig
from megatrain.models.position import frequencies

# original length, turns of fast and slow pairs, theta
RAMPS = {
    "within the pairs": (32, 4.0, 1.0, 10000),
    "from the first pair on": (8, 32.0, 1.0, 5000),
    "ends before it begins": (8, 32.0, 2.0, 5000),
    "ends where it begins": (8, 32.0, 1.27, 5000),
    "behind the last pair": (4096, 32.0, 1.0, 10),
}


@pytest.mark.parametrize("case", RAMPS)
def test_yarn(case):
    original, fast, slow, theta = RAMPS[case]
    model = ModelConfig(
        num_layers=1, hidden_size=40, num_attention_heads=1, seq_length=64, vocab_size=48, position="rope", rope_theta=theta,
        rope_scaling="yarn", rope_factor=2.0, rope_original_length=original, rope_beta_fast=fast, rope_beta_slow=slow,
    )  # fmt: skip
    rope = {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow,
        "rope_theta": theta,
    }  # fmt: skip
    theirs = LlamaConfig(hidden_size=40, num_attention_heads=1, max_position_embeddings=64, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    torch.testing.assert_close(frequencies(model), wanted.double(), rtol=1e-6, atol=0)
