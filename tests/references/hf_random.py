"""Random configs of Hugging Face's families: legal ones in every spelling, and ones that say something twice, or what nobody reads."""

ACTIVATIONS = ("gelu_new", "gelu", "relu", "gelu_pytorch_tanh")
KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "glm", "glm4", "bloom")
NOT_SAID = object()


def drawn(rng, *values):
    """One of these."""
    return rng.choice(values)


def config(rng):
    """A config.json that transformers and megatrain must both take, and mean the same by."""
    kind = rng.choice(KINDS)
    made = {"gpt2": gpt2, "bloom": bloom}.get(kind, llama_like)(rng, kind)
    made |= {"model_type": kind, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    made = {name: value for name, value in made.items() if value is not NOT_SAID}
    items = list(made.items())
    rng.shuffle(items)
    return dict(items)


def gpt2(rng, kind):
    heads = rng.choice((1, 2, 3, 4))
    rate = drawn(rng, 0.0, 0.1)
    said = {
        drawn(rng, "n_layer", "num_hidden_layers"): rng.randint(1, 3),
        drawn(rng, "n_embd", "hidden_size"): heads * rng.choice((4, 5, 8)),
        drawn(rng, "n_head", "num_attention_heads"): heads,
        "n_inner": drawn(rng, NOT_SAID, None, 24, 33),
        "n_positions": rng.choice((24, 32)),
        "vocab_size": rng.randint(20, 60),
        "layer_norm_epsilon": drawn(rng, NOT_SAID, 1e-3, 1e-1),
        "activation_function": drawn(rng, NOT_SAID, *ACTIVATIONS),
        "tie_word_embeddings": drawn(rng, NOT_SAID, True, False),
        "attn_pdrop": drawn(rng, NOT_SAID, 0.0, 0.3),
        **({} if rng.random() < 0.3 else {"embd_pdrop": rate, "resid_pdrop": rate}),
    }
    return twice(rng, said, {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_positions": "n_ctx"})


def bloom(rng, kind):
    heads = rng.choice((1, 2, 3, 5, 8))
    said = {
        drawn(rng, "n_layer", "num_hidden_layers"): rng.randint(1, 3),
        drawn(rng, "hidden_size", "n_embed"): heads * rng.choice((4, 6, 8)),
        drawn(rng, "n_head", "num_attention_heads"): heads,
        "vocab_size": rng.randint(20, 60),
        "layer_norm_epsilon": drawn(rng, NOT_SAID, 1e-3, 1e-1),
        "tie_word_embeddings": drawn(rng, NOT_SAID, True),
        "seq_length": drawn(rng, NOT_SAID, None, 64),
        "apply_residual_connection_post_layernorm": drawn(rng, NOT_SAID, False),
    }
    return twice(rng, said, {"n_layer": "num_hidden_layers", "hidden_size": "n_embed", "n_head": "num_attention_heads"})


def llama_like(rng, kind):
    groups = rng.choice((1, 2))
    heads = groups * rng.choice((1, 2, 3))
    width, layers, positions = rng.choice((4, 6, 8, 10)), rng.randint(1, 3), rng.choice((24, 32, 64))
    own_width = rng.random() < 0.4 or kind in ("qwen3", "glm", "glm4")
    said = {
        "num_hidden_layers": layers,
        "hidden_size": heads * (width if not own_width else rng.choice((5, 8))),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width if own_width else NOT_SAID,
        "intermediate_size": rng.choice((12, 21, 32)),
        "max_position_embeddings": positions,
        "vocab_size": rng.randint(20, 60),
        "rms_norm_eps": drawn(rng, NOT_SAID, 1e-3, 1e-1),
        "tie_word_embeddings": drawn(rng, NOT_SAID, True, False),
        "hidden_act": drawn(rng, NOT_SAID, "silu"),
        "attention_dropout": drawn(rng, NOT_SAID, 0.0, 0.2),
        drawn(rng, "torch_dtype", "dtype"): "float32",
    }
    if kind in ("llama", "mistral") and not own_width:
        said["head_dim"] = drawn(rng, NOT_SAID, None)
    if kind in ("llama", "qwen2") and groups == heads and rng.random() < 0.5:
        said["num_key_value_heads"] = None
    if kind in ("glm", "glm4"):
        said["attention_bias"] = drawn(rng, NOT_SAID, True, False)
    said |= window(rng, kind, layers) | rope(rng, kind, positions, width)
    return twice(rng, said, {})


def window(rng, kind, layers):
    if kind == "mistral":
        return {"sliding_window": drawn(rng, NOT_SAID, None, 1, 7, 20)}
    if kind not in ("qwen2", "qwen3"):
        return {}
    choice = rng.choice(("none", "unused", "all", "never reached", "by type"))
    return {
        "none": {},
        "unused": {"use_sliding_window": False, "sliding_window": drawn(rng, 7, None), "max_window_layers": 0},
        "all": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        "never reached": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": drawn(rng, NOT_SAID, layers)},
        "by type": {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * layers},
    }[choice]


def rope(rng, kind, positions, width):
    """Rotary settings: of transformers 5, of 4, or both where they say the same."""
    theta = drawn(rng, NOT_SAID, 100.0, 5000, 500000.0)
    part = NOT_SAID
    if kind in ("glm", "glm4"):
        part = rng.choice([NOT_SAID] * (width % 4 == 0) + [1, 1.0] + [even / width for even in range(2, width, 2)])
    scaling = rng.choice(("none", "none", "linear", "llama3", "yarn"))
    within = {"factor": drawn(rng, 1.5, 2, 8.0)} if scaling != "none" else {}
    if scaling in ("llama3", "yarn") and rng.random() < 0.7:
        within["original_max_position_embeddings"] = rng.choice((8, 16))
    if scaling == "llama3":
        within |= {"low_freq_factor": drawn(rng, 0.5, 1), "high_freq_factor": drawn(rng, 2.0, 4)}
    if scaling == "yarn":
        more = {
            "beta_fast": drawn(rng, None, 4, 32),
            "beta_slow": drawn(rng, None, 1, 2.0),
            "truncate": True,
            "attention_factor": None,
        }
        within |= {name: value for name, value in more.items() if rng.random() < 0.4}
    named = {"rope_type": scaling if scaling != "none" else "default"}
    outside = {"rope_theta": theta, "partial_rotary_factor": part}
    original = "original_max_position_embeddings"
    if original in within and rng.random() < 0.2:
        outside[original] = within[original] if rng.random() < 0.5 else within.pop(original)
    spelling = rng.choice(("5", "5", "4", "4 with type", "null"))
    if spelling == "5":
        inside = {name: value for name, value in outside.items() if value is not NOT_SAID}
        return {"rope_parameters": {**named, **within, **inside}, **(outside if rng.random() < 0.3 else {})}
    if scaling == "none":
        return {
            **outside,
            "rope_scaling": drawn(rng, NOT_SAID, None, {}),
            "rope_parameters": None if spelling == "null" else NOT_SAID,
        }
    named = {"type": scaling} if spelling == "4 with type" else {"rope_type": scaling, "type": scaling}
    return {**outside, "rope_scaling": {**named, **within}}


def twice(rng, said, others):
    """The same, with another name that says what one says already."""
    for one, other in others.items():
        if said.get(one, NOT_SAID) is not NOT_SAID and rng.random() < 0.2:
            said[other] = said[one]
    return said


def changed(rng, legal):
    """(a legal config with one more thing, a name that a refusal of it must have)."""
    kind = legal["model_type"]
    changes = [
        ("num_hidden_layers", 5), ("n_layer", 5), ("hidden_size", 40), ("n_embd", 40), ("num_attention_heads", 7), ("vocab_size", 70),
        ("sliding_window", 3), ("use_sliding_window", True), ("layer_types", ["sliding_attention"]), ("attention_bias", True),
        ("layer_norm_eps", 0.5), ("max_position_embeddings", 23), ("n_positions", 23), ("intermediate_size", 17), ("head_dim", 7),
        ("head_dim", 12), ("partial_rotary_factor", 0.3), ("partial_rotary_factor", None), ("rope_theta", 17.0), ("rope_theta", None),
        ("rope_scaling", {"type": "linear", "factor": 3.0}), ("rope_scaling", {"rope_type": "dynamic", "factor": 3.0}),
        ("rope_scaling", {"rope_type": "linear", "type": "yarn", "factor": 3.0}), ("rope_scaling", {"factor": 3.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 3.0, "mscale": 0.7, "mscale_all_dim": 0.5}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 3.0, "truncate": False}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("original_max_position_embeddings", 11), ("hidden_act", "relu"), ("activation_function", "silu"), ("mlp_bias", True),
        ("num_key_value_heads", None), ("num_key_value_heads", 3), ("tie_word_embeddings", None), ("scale_attn_by_inverse_layer_idx", True),
        ("apply_residual_connection_post_layernorm", True), ("final_logit_softcapping", 5.0), ("n_inner", 19), ("max_window_layers", 1),
        ("torch_dtype", "bfloat16"), ("rms_norm_eps", None), ("embedding_multiplier", 3.0), ("qk_layernorm", True),
    ]  # fmt: skip
    turning = [change for change in changes if change[0].startswith(("rope", "partial", "original"))]
    name, value = rng.choice(turning if rng.random() < 0.4 else changes)
    return {**legal, name: value}, name, kind
