"""config.json of Hugging Face <-> the `model` section, by a table for each family: which key is called what, and what must be so.

Both spellings of rotary settings are read (rope_parameters of transformers 5, and rope_theta with rope_scaling before it); the older
one is written, which both understand. What the model section cannot say is refused by name, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from megatrain.checkpoint.hf import FAMILIES
from megatrain.checkpoint.together import ContentError
from megatrain.config.schema import ModelConfig

Json = dict[str, Any]
_REQUIRED = object()

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
"""Names of activations without a gate -> model.activation."""


class Key(NamedTuple):
    """How config.json calls a value of the model section; the first name is written, any is read."""

    names: tuple[str, ...]
    default: Any = _REQUIRED


@dataclass(frozen=True)
class Dialect:
    """What config.json says in one family."""

    fixed: Json
    """Of the model section: what the family always is."""
    keys: Mapping[str, Key]
    """Key of the model section -> its name."""
    demands: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that must have one of these values, where they are there; the first is written."""
    rope_fraction: float = 1.0
    """Of a config.json that does not say."""
    read: Callable[[Json], Json] = lambda config: {}
    """What else follows from config.json."""
    write: Callable[[ModelConfig], Json] = lambda model: {}
    """What else there is to write."""
    model_type: str = ""
    """Of config.json, where it is not the kind's own name."""
    rope: bool = True
    """Whether config.json says more of rotary positions than `keys` and `read` do."""


def key(*names: str, default: Any = _REQUIRED) -> Key:
    """A Key."""
    return Key(names, default)


def _windows(config: Json) -> Json:
    """The sliding window, which may be there and unused, or used by some layers only. Raises ContentError for the last."""
    window = config.get("sliding_window")
    layers = config.get("num_hidden_layers", 0)
    kinds = config.get("layer_types")
    if kinds is None:
        used = config.get("use_sliding_window", config.get("model_type") == "mistral")
        whole = config.get("max_window_layers", 0) if config.get("model_type") != "mistral" else 0
        kinds = ["sliding_attention" if used and window and n >= whole else "full_attention" for n in range(layers)]
    if len(set(kinds)) > 1:
        raise ContentError(
            "config.json gives some layers a sliding window and others none; the model section has one window for all"
        )
    return {"window": window if kinds and kinds[0] == "sliding_attention" else None}


def _gpt2_dropout(config: Json) -> Json:
    rates = {config.get(name, 0.1) for name in ("embd_pdrop", "resid_pdrop")}
    if len(rates) > 1:
        raise ContentError(
            f"config.json has embd_pdrop={config.get('embd_pdrop')} and resid_pdrop={config.get('resid_pdrop')}: one dropout"
        )
    return {"dropout": rates.pop(), "activation": _activation(config.get("activation_function", "gelu_new"))}


def _glm1_dropout(config: Json) -> Json:
    rates = {config.get(name, 0.1) for name in ("embedding_dropout_prob", "output_dropout_prob")}
    if len(rates) > 1:
        raise ContentError(f"config.json has dropouts of {sorted(rates)} on the embedding and on branches: one dropout")
    return {}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ContentError(f"config.json has the activation {name!r}; {', '.join(ACTIVATIONS)} are known")
    return ACTIVATIONS[name]


_SHAPES = {
    "num_layers": key("num_hidden_layers"),
    "hidden_size": key("hidden_size"),
    "num_attention_heads": key("num_attention_heads"),
    "num_query_groups": key("num_key_value_heads", default=None),
    "head_dim": key("head_dim", default=None),
    "ffn_hidden_size": key("intermediate_size"),
    "seq_length": key("max_position_embeddings"),
    "vocab_size": key("vocab_size"),
    "norm_eps": key("rms_norm_eps", default=1e-6),
    "init_std": key("initializer_range", default=0.02),
    "attention_dropout": key("attention_dropout", default=0.0),
    "tied_embeddings": key("tie_word_embeddings", default=False),
}
_LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "norm_placement": "pre"}
_GLM = {**_LLAMA, "qkv_bias": True, "rope_interleaved": True}
_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


def _write_window(model: ModelConfig) -> Json:
    used = {"use_sliding_window": model.window is not None, "max_window_layers": 0 if model.window else model.num_layers}
    return {"sliding_window": model.window, **used}


DIALECTS = {
    "gpt2": Dialect(
        {"norm": "layernorm", "position": "learned", "bias": True, "norm_placement": "pre"},
        {
            "num_layers": key("n_layer", "num_hidden_layers"),
            "hidden_size": key("n_embd", "hidden_size"),
            "num_attention_heads": key("n_head", "num_attention_heads"),
            "ffn_hidden_size": key("n_inner", default=None),
            "seq_length": key("n_positions", "n_ctx", "max_position_embeddings"),
            "vocab_size": key("vocab_size"),
            "norm_eps": key("layer_norm_epsilon", default=1e-5),
            "init_std": key("initializer_range", default=0.02),
            "attention_dropout": key("attn_pdrop", default=0.1),
            "tied_embeddings": key("tie_word_embeddings", default=True),
        },
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        read=_gpt2_dropout,
        write=lambda model: {
            "embd_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
            "activation_function": next(
                (name for name, ours in ACTIVATIONS.items() if ours == model.activation), model.activation
            ),
        },
    ),
    "llama": Dialect(_LLAMA, _SHAPES, {**_SILU, "attention_bias": (False,), "mlp_bias": (False,)}),
    "mistral": Dialect(_LLAMA, _SHAPES, _SILU, read=_windows, write=lambda model: {"sliding_window": model.window}),
    "qwen2": Dialect({**_LLAMA, "qkv_bias": True}, _SHAPES, _SILU, read=_windows, write=_write_window),
    "qwen3": Dialect(
        {**_LLAMA, "qk_norm": True},
        {**_SHAPES, "head_dim": key("head_dim", default=128)},
        {**_SILU, "attention_bias": (False,)},
        read=_windows,
        write=_write_window,
    ),
    "glm": Dialect(
        _GLM,
        {**_SHAPES, "head_dim": key("head_dim", default=128)},
        {**_SILU, "attention_bias": (True,)},
        rope_fraction=0.5,
        write=lambda model: {"pad_token_id": None},  # transformers' default is an id of the published vocabulary
    ),
    "glm4": Dialect(
        {**_GLM, "norm_placement": "sandwich"},
        {**_SHAPES, "head_dim": key("head_dim", default=128)},
        {**_SILU, "attention_bias": (True,)},
        rope_fraction=0.5,
        write=lambda model: {"pad_token_id": None},
    ),
    "bloom": Dialect(
        {
            "norm": "layernorm",
            "position": "alibi",
            "bias": True,
            "embedding_norm": True,
            "activation": "gelu_tanh",
            "norm_placement": "pre",
        },
        {
            "num_layers": key("n_layer", "num_hidden_layers"),
            "hidden_size": key("hidden_size", "n_embed"),
            "num_attention_heads": key("n_head", "num_attention_heads"),
            "seq_length": key("seq_length", default=2048),
            "vocab_size": key("vocab_size"),
            "norm_eps": key("layer_norm_epsilon", default=1e-5),
            "init_std": key("initializer_range", default=0.02),
            "dropout": key("hidden_dropout", default=0.0),
            "attention_dropout": key("attention_dropout", default=0.0),
            "tied_embeddings": key("tie_word_embeddings", default=True),
        },
        {"apply_residual_connection_post_layernorm": (False,)},
    ),
    "chatglm": Dialect(
        {**_GLM, "rope_fraction": 0.5},
        {
            "num_layers": key("num_layers"),
            "hidden_size": key("hidden_size"),
            "num_attention_heads": key("num_attention_heads"),
            "head_dim": key("kv_channels", default=None),
            "ffn_hidden_size": key("ffn_hidden_size"),
            "seq_length": key("seq_length"),
            "vocab_size": key("padded_vocab_size"),
            "norm_eps": key("layernorm_epsilon", default=1e-5),
            "dropout": key("hidden_dropout", default=0.0),
            "attention_dropout": key("attention_dropout", default=0.0),
            "tied_embeddings": key("tie_word_embeddings", default=False),
        },
        {
            "rmsnorm": (True,),
            "post_layer_norm": (True,),
            "add_bias_linear": (False,),
            "add_qkv_bias": (True,),
            "original_rope": (True,),
            "apply_residual_connection_post_layernorm": (False,),
            "position_encoding_2d": (False,),
            "prefix_projection": (False,),
            "pre_seq_len": (None,),
            "rope_ratio_mode": ("base",),
        },
        read=lambda config: {
            "num_query_groups": config["multi_query_group_num"] if config.get("multi_query_attention") else None,
            "rope_theta": 10000.0 * config.get("rope_ratio", 1),
        },
        write=lambda model: {
            "multi_query_attention": model.query_groups != model.num_attention_heads,
            "multi_query_group_num": model.query_groups,
            "rope_ratio": model.rope_theta / 10000,
        },
        rope=False,
    ),
    "chatglm_6b": Dialect(
        {"norm": "layernorm", "norm_placement": "deepnorm", "activation": "gelu_tanh", "bias": True},
        {
            "num_layers": key("num_layers"),
            "hidden_size": key("hidden_size"),
            "num_attention_heads": key("num_attention_heads"),
            "ffn_hidden_size": key("inner_hidden_size", default=None),
            "seq_length": key("max_sequence_length", default=2048),
            "vocab_size": key("vocab_size"),
            "norm_eps": key("layernorm_epsilon", default=1e-5),
            "tied_embeddings": key("tie_word_embeddings", default=False),
        },
        {"prefix_projection": (False,), "pre_seq_len": (None,)},
        read=lambda config: {"position": "rope_2d" if config.get("position_encoding_2d", True) else "rope"},
        write=lambda model: {"position_encoding_2d": model.position == "rope_2d"},
        model_type="chatglm",
        rope=False,
    ),
    "glm_1": Dialect(
        {
            "norm": "layernorm",
            "norm_placement": "pre",
            "activation": "gelu_tanh",
            "position": "learned_2d",
            "bias": True,
            "tied_embeddings": True,
        },
        {
            "num_layers": key("num_layers"),
            "hidden_size": key("hidden_size"),
            "num_attention_heads": key("num_attention_heads"),
            "seq_length": key("max_sequence_length"),
            "vocab_size": key("vocab_size"),
            "dropout": key("output_dropout_prob", default=0.1),
            "attention_dropout": key("attention_dropout_prob", default=0.1),
        },
        {"block_position_encoding": (True,), "relative_encoding": (False,), "spell_length": (None,)},
        read=_glm1_dropout,
        write=lambda model: {"embedding_dropout_prob": model.dropout},
        model_type="glm",
        rope=False,
    ),
}
"""Kind of model -> what its config.json says."""

_NOT_OF_THE_SHAPE = {
    *("family", "preset", "init_from", "seq_length", "dropout", "attention_dropout", "softmax_fp32", "residual_fp32"),
    *("init", "init_std", "embedding_init_std", "scale_residual_init", "vocab_size", "rope_angle_dtype"),
    *("embedding_grad_scale", "embedding_grad_steps"),
}
"""Keys of the model section that a file of weights does not depend on."""


def model_of(config: Json) -> Json:
    """The keys of the model section that a config.json gives. Raises ContentError for what cannot be said there."""
    kind = kind_from(config)
    if config.get("quantization_config") or config.get("quantization_bit"):
        raise ContentError(
            "config.json says that the weights are quantised; give the directory of the model before quantisation"
        )
    dialect = DIALECTS[kind]
    for name, allowed in dialect.demands.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ContentError(f"config.json has {name}={config[name]!r}, and a {kind} can be read with {allowed[0]!r} alone")
    model = dict(dialect.fixed)
    for ours, (names, default) in dialect.keys.items():
        value = next((config[name] for name in names if name in config), default)
        if value is _REQUIRED:
            raise ContentError(f"config.json has no {names[0]}")
        model[ours] = value
    model["max_positions"] = model["seq_length"]
    rope = _rope_of(config, dialect) if dialect.rope and model["position"] == "rope" else {}
    return {**model, **rope, **dialect.read(config)}


def kind_from(config: Json) -> str:
    """The kind of model of a config.json. THUDM's first models share their model_type with later ones. Raises ContentError."""
    kind = str(config.get("model_type"))
    if kind == "chatglm" and ("inner_hidden_size" in config or config.get("position_encoding_2d")):
        return "chatglm_6b"
    if kind == "glm" and ("block_position_encoding" in config or "max_sequence_length" in config):
        return "glm_1"
    if kind not in FAMILIES:
        raise ContentError(f"config.json is of model_type {config.get('model_type')!r}; known are {', '.join(FAMILIES)}")
    return kind


def config_of(model: ModelConfig, vocab_size: int, kind: str) -> Json:
    """The config.json of a model. Raises ContentError where the family cannot say what the model is."""
    dialect = DIALECTS[kind]
    config: Json = {"model_type": dialect.model_type or kind, "architectures": [FAMILIES[kind].architecture]}
    for name, allowed in dialect.demands.items():
        config[name] = allowed[0]
    values = {item.name: getattr(model, item.name) for item in fields(model)} | {
        "vocab_size": vocab_size,
        "seq_length": model.positions,
        "num_query_groups": model.query_groups,
        "head_dim": model.head_size,
        "ffn_hidden_size": model.ffn_size,
    }
    for ours, (names, _) in dialect.keys.items():
        config[names[0]] = values[ours]
    if dialect.rope and model.position == "rope":
        config |= _rope_to(model)
    config |= dialect.write(model)
    lost = [name for name in _differences(model, ModelConfig(**model_of(config))) if name not in _NOT_OF_THE_SHAPE]
    if lost:
        lost = [f"{name}={getattr(model, name)!r}" for name in lost]
        raise ContentError(f"a {kind} of Hugging Face cannot have {', '.join(lost)}")
    return config


def same_model(one: Json, other: Json) -> bool:
    """Whether two config.json say the same of the model section."""
    return not _differences(ModelConfig(**model_of(one)), ModelConfig(**model_of(other)))


def _differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Keys of the model section in which two models are not the same."""
    return [item.name for item in fields(one) if _meant(one, item.name) != _meant(other, item.name)]


def kind_of(model: ModelConfig, vocab_size: int) -> str:
    """The first family that can say what a model is. Raises ContentError where none can."""
    reasons = []
    for kind in DIALECTS:
        try:
            config_of(model, vocab_size, kind)
        except ContentError as error:
            reasons.append(str(error))
        else:
            return kind
    raise ContentError("no family of Hugging Face is such a model: " + "; ".join(reasons))


def _meant(model: ModelConfig, name: str) -> Any:
    """A value with what null means filled in; of rotary settings nothing where there are none."""
    if name.startswith("rope_") and not model.rotary:
        return None
    if name == "deepnorm_alpha":
        return model.residual_scale
    if name.startswith("rope_") and name not in ("rope_theta", "rope_fraction", "rope_interleaved", "rope_scaling"):
        if model.rope_scaling == "none" or (model.rope_scaling == "linear" and name != "rope_factor"):
            return None
        if name.startswith("rope_beta") != (model.rope_scaling == "yarn") and name not in (
            "rope_factor",
            "rope_original_length",
        ):
            return None
    if name.startswith("sparse_") and model.sparse is None:
        return None
    means = {
        "max_positions": model.positions,
        "head_dim": model.head_size,
        "num_query_groups": model.query_groups,
        "ffn_hidden_size": model.ffn_size,
        "qkv_bias": model.qkv_biased,
        "rope_original_length": model.original_length,
        "rope_fraction": model.rotated,
    }
    return means.get(name, getattr(model, name))


def _rope_of(config: Json, dialect: Dialect) -> Json:
    """Rotary settings in either spelling. Raises ContentError for a kind of scaling that is not known."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = said.get("rope_type", said.get("type", "default"))
    found: Json = {
        "rope_theta": said.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_fraction": said.get("partial_rotary_factor", config.get("partial_rotary_factor", dialect.rope_fraction)),
        "rope_scaling": "none" if kind == "default" else kind,
    }
    if kind == "default":
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise ContentError(f"config.json scales rotary frequencies by {kind!r}; linear, llama3 and yarn are known")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if said.get(name) is not None:
            raise ContentError(f"config.json has {name}={said[name]} for yarn, whose factor here is always 0.1 log(factor) + 1")
    if said.get("truncate") is False:
        raise ContentError("config.json has truncate=false for yarn, whose ramp here always begins and ends at whole pairs")
    original = said.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if not isinstance(said.get("factor"), (int, float)):
        raise ContentError(f"config.json scales rotary frequencies ({kind}) and gives no factor")
    found |= {"rope_factor": said["factor"], "rope_original_length": original}
    if kind == "yarn":
        found["rope_original_length"] = original or config.get("max_position_embeddings")
    names = {
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_beta_fast": "beta_fast",
        "rope_beta_slow": "beta_slow",
    }
    return found | {ours: said[name] for ours, name in names.items() if said.get(name) is not None}


def _rope_to(model: ModelConfig) -> Json:
    """Rotary settings as transformers wrote them before version 5."""
    written: Json = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if model.rope_fraction != 1.0:
        written["partial_rotary_factor"] = model.rope_fraction
    if model.rope_scaling == "none":
        return written
    scaling: Json = {"rope_type": model.rope_scaling, "type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = int(model.original_length)
    if model.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": model.rope_low_freq_factor, "high_freq_factor": model.rope_high_freq_factor}
    if model.rope_scaling == "yarn":
        scaling |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
    return {**written, "rope_scaling": scaling}
