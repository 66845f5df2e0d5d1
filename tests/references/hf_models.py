"""Tiny models of transformers, one and more of each family, with weights of a large spread, so that a wrong convention shows."""

import copy
import functools
import json
import warnings

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

V = 101
COMMON = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "vocab_size": V,
    "pad_token_id": None,  # else transformers gives its embedding no gradient
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 6, "n_positions": 64, "vocab_size": V, **IDS}
GPT2 |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
BLOOM = {"n_layer": 3, "hidden_size": 48, "n_head": 6, "vocab_size": V, "pad_token_id": 0, **IDS}

CASES = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2, untied, inner width, relu": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**GPT2, n_inner=100, tie_word_embeddings=False, activation_function="relu")
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)),
    "llama 3.1, tied, wide heads": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**COMMON, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3)
    ),
    "llama, yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, rope_parameters=YARN)),
    "mistral, window, multi-query": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**{**COMMON, "num_key_value_heads": 1}, sliding_window=9)
    ),
    "mistral without a window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**COMMON, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**COMMON, tie_word_embeddings=True)),
    "qwen2, window": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=0)
    ),
    "qwen2, a window above two layers": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=2)
    ),
    "qwen3, a window in every second layer": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            **COMMON,
            head_dim=24,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**COMMON, head_dim=24)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**BLOOM)),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**COMMON, head_dim=16)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**COMMON, head_dim=16)),
}


@functools.cache
def made(case):
    """The model of a case; the same at every call."""
    torch.manual_seed(sorted(CASES).index(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CASES[case]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + 0.3 * torch.randn_like(p))
    return model


def write(case, path, dtype=torch.float32, **settings):
    """Save the model of a case as transformers does."""
    copy.deepcopy(made(case)).to(dtype).save_pretrained(path, **settings)
    return path


def write_chatglm(path, rename=lambda name: name, **more):
    """A transformers `glm` under THUDM's names: fused q|k|v, and config.json as theirs."""
    glm = made("glm")
    state = dict(glm.state_dict())
    stored = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    for n in range(3):
        ours, theirs = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            stored[f"{theirs}self_attention.query_key_value.{kind}"] = torch.cat(parts)
        for a, b in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ):
            stored[f"{theirs}{b}.weight"] = state[f"{ours}{a}.weight"]
    path.mkdir(parents=True)
    save_file({rename(name): t.contiguous() for name, t in stored.items()}, path / "model.safetensors", {"format": "pt"})
    config = {
        **{"model_type": "chatglm", "num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "kv_channels": 16},
        **{"ffn_hidden_size": 80, "padded_vocab_size": V, "seq_length": 64, "layernorm_epsilon": 1.5625e-07, "rmsnorm": True},
        **{"post_layer_norm": True, "add_bias_linear": False, "add_qkv_bias": True, "multi_query_attention": True},
        **{"multi_query_group_num": 2, "apply_residual_connection_post_layernorm": False, "original_rope": True},
        **{
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "apply_query_key_layer_scaling": True,
        },
        **more,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def tensors_of(path):
    """Name -> tensor of a directory of Hugging Face."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found
