"""The model of the grids of the central theorem: GPT-2's kind with tied embeddings, LLaMA's kind with untied ones."""

from __future__ import annotations

from megatrain.config.schema import ModelConfig


def grid_model(layers: int, tied: bool, dropout: bool) -> ModelConfig:
    """So small that hundreds of layouts run in minutes; an odd vocabulary. dropout: its counters take more time than the model."""
    modern = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "ffn_hidden_size": 24}
    return ModelConfig(
        num_layers=layers,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=8,
        vocab_size=29,
        tied_embeddings=tied,
        dropout=0.1 if dropout else 0.0,
        init_std=0.1,
        **({} if tied else modern),
    )
