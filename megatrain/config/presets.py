"""Published shapes by name (`model.preset`), as data. Keys that a config gives win over its preset's."""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]
"""The keys of `model` that differ from their defaults, and those that are the model's size."""


def _gpt(layers: int, hidden: int, heads: int, seq_length: int = 1024) -> Shape:
    """GPT-2 (Radford et al. 2019) and GPT-3 (arXiv:2005.14165, table 2.1)."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": seq_length,
        "max_positions": seq_length,
        "vocab_size": 50257,
        "dropout": 0.1 if seq_length == 1024 else 0.0,
    }


def _llama(layers: int, hidden: int, heads: int, groups: int, ffn: int, seq_length: int, vocab: int, **others: Any) -> Shape:
    """LLaMA 2 (arXiv:2307.09288) and the families with the same block."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        "seq_length": seq_length,
        "vocab_size": vocab,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "bias": False,
        "tied_embeddings": False,
        **others,
    }


def _llama3(layers: int, hidden: int, heads: int, ffn: int, scaling: float | None = None, **others: Any) -> Shape:
    """Llama 3 (arXiv:2407.21783); 3.1 and 3.2 stretch its 8192 positions by `scaling`, to 131072."""
    long: Shape = {}
    if scaling is not None:
        long = {"rope_scaling": "llama3", "rope_factor": scaling, "rope_original_length": 8192}
    length = 8192 if scaling is None else 131072
    return _llama(layers, hidden, heads, 8, ffn, length, 128256, rope_theta=500000.0, **long, **others)


def _qwen2(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int = 152064, tied: bool = False) -> Shape:
    """Qwen2 (arXiv:2407.10671): LLaMA's block with biases of queries, keys and values."""
    others = {"qkv_bias": True, "tied_embeddings": tied, "rope_theta": 1e6, "norm_eps": 1e-6}
    return _llama(layers, hidden, heads, groups, ffn, 32768, vocab, **others)


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool = False) -> Shape:
    """Qwen3, dense (arXiv:2505.09388): normalised queries and keys, heads of 128."""
    others = {"qk_norm": True, "head_dim": 128, "tied_embeddings": tied, "rope_theta": 1e6, "norm_eps": 1e-6}
    return _llama(layers, hidden, heads, 8, ffn, 40960, 151936, **others)


def _bloom(layers: int, hidden: int, heads: int) -> Shape:
    """BLOOM (arXiv:2211.05100, table 3): ALiBi, and a norm after the embedding."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": 2048,
        "vocab_size": 250880,
        "position": "alibi",
        "embedding_norm": True,
    }


def _glm1(layers: int, hidden: int, heads: int, positions: int = 512, vocab: int = 30592) -> Shape:
    """GLM (arXiv:2103.10360): learned two-dimensional positions."""
    return {
        "family": "glm",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": positions,
        "max_positions": positions,
        "vocab_size": vocab,
        "position": "learned_2d",
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }


def _chatglm(layers: int, vocab: int, seq_length: int, **others: Any) -> Shape:
    """ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, as in THUDM's files: LLaMA's block; half of each head is rotated, in neighbouring pairs."""
    shape = {"family": "glm", "qkv_bias": True, "rope_fraction": 0.5, "rope_interleaved": True, "head_dim": 128}
    return _llama(layers, 4096, 32, 2, 13696, seq_length, vocab, **shape, **others)


_DEEPNORM: Shape = {"family": "glm", "norm_placement": "deepnorm", "init": "xavier", "embedding_grad_scale": 0.1}
"""Keys that ChatGLM-6B and GLM-130B share (arXiv:2210.02414, sections 2.1 and 3.3)."""

FAMILIES: dict[str, Shape] = {"gpt": {}, "glm": {"position": "learned_2d"}}
"""model.family -> its keys, for a config whose own keys and preset do not give them."""

PRESETS: dict[str, Shape] = {
    "gpt2_124m": _gpt(12, 768, 12),
    "gpt2_355m": _gpt(24, 1024, 16),
    "gpt2_774m": _gpt(36, 1280, 20),
    "gpt2_1.5b": _gpt(48, 1600, 25),
    "gpt3_175b": _gpt(96, 12288, 96, 2048),
    "llama2_7b": _llama(32, 4096, 32, 32, 11008, 4096, 32000),
    "llama2_13b": _llama(40, 5120, 40, 40, 13824, 4096, 32000),
    "llama2_70b": _llama(80, 8192, 64, 8, 28672, 4096, 32000),
    "llama3_8b": _llama3(32, 4096, 32, 14336),
    "llama3_70b": _llama3(80, 8192, 64, 28672),
    "llama3.1_8b": _llama3(32, 4096, 32, 14336, 8.0),
    "llama3.1_70b": _llama3(80, 8192, 64, 28672, 8.0),
    "llama3.1_405b": _llama3(126, 16384, 128, 53248, 8.0),
    "llama3.2_1b": _llama3(16, 2048, 32, 8192, 32.0, tied_embeddings=True),
    "llama3.2_3b": _llama3(28, 3072, 24, 8192, 32.0, tied_embeddings=True),
    "mistral_7b": _llama(32, 4096, 32, 8, 14336, 32768, 32000, window=4096),
    "qwen2_0.5b": _qwen2(24, 896, 14, 2, 4864, 151936, tied=True),
    "qwen2_1.5b": _qwen2(28, 1536, 12, 2, 8960, 151936, tied=True),
    "qwen2_7b": _qwen2(28, 3584, 28, 4, 18944),
    "qwen2_72b": _qwen2(80, 8192, 64, 8, 29568),
    "qwen3_0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3_1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3_4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3_8b": _qwen3(36, 4096, 32, 12288),
    "qwen3_14b": _qwen3(40, 5120, 40, 17408),
    "qwen3_32b": _qwen3(64, 5120, 64, 25600),
    "bloom_560m": _bloom(24, 1024, 16),
    "bloom_1b1": _bloom(24, 1536, 16),
    "bloom_1b7": _bloom(24, 2048, 16),
    "bloom_3b": _bloom(30, 2560, 32),
    "bloom_7b1": _bloom(30, 4096, 32),
    "bloom_176b": _bloom(70, 14336, 112),
    "glm_base": _glm1(12, 768, 12),
    "glm_large": _glm1(24, 1024, 16),
    "glm_410m": _glm1(30, 1024, 16),
    "glm_515m": _glm1(30, 1152, 18),
    "glm_2b": _glm1(36, 2048, 32, 1024, 50304),
    "glm_10b": _glm1(48, 4096, 64, 1024, 50304),
    "chatglm_6b": {
        **_DEEPNORM,
        "num_layers": 28,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "seq_length": 2048,
        "vocab_size": 130528,
        "position": "rope_2d",
    },
    "glm_130b": {
        **_DEEPNORM,
        "num_layers": 70,
        "hidden_size": 12288,
        "num_attention_heads": 96,
        "ffn_hidden_size": 32768,
        "seq_length": 2048,
        "vocab_size": 150528,
        "activation": "geglu",
        "position": "rope",
    },
    "chatglm2_6b": _chatglm(28, 65024, 32768),
    "chatglm3_6b": _chatglm(28, 65024, 8192),
    "glm4_9b": _chatglm(40, 151552, 131072, rope_theta=5e6, norm_eps=1.5625e-7),
}
"""`mistral_7b` is the first version (arXiv:2310.06825), which has a sliding window."""
