"""config.json of Hugging Face <-> the `model` section, by a table for each family: names of keys, and values that are required.

json_names.py reads a name's value, rope.py the rotary settings. Defaults are those of transformers' classes. Settings that the model
section cannot express are refused by name, never dropped.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatrain.checkpoint.together import ContentError
from megatrain.config.schema import ModelConfig
from megatrain.huggingface.dialects import DIALECTS
from megatrain.huggingface.families import FAMILIES
from megatrain.huggingface.json_names import (
    SAME,
    Json,
    refuse_foreign,
    require_one_meaning,
    value_of,
)
from megatrain.huggingface.rope import NAMES as ROPE_NAMES
from megatrain.huggingface.rope import rope_of, rope_to

_WHOLE = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size", "seq_length"),
    *("vocab_size", "window"),
}
"""Keys whose values are counts, 1 or more."""
_RANGES = {item.name: item.metadata["range"] for item in fields(ModelConfig) if item.name in _WHOLE}
_READ = {"window": "sliding_window", "num_query_groups": "multi_query_group_num"}
"""Counts that a family's `read` gives -> their name in config.json."""
_NOT_OF_THE_SHAPE = {
    *("family", "preset", "init_from", "seq_length", "dropout", "attention_dropout", "softmax_fp32", "residual_fp32"),
    *("init", "init_std", "embedding_init_std", "scale_residual_init", "vocab_size", "rope_angle_dtype"),
    *("embedding_grad_scale", "embedding_grad_steps"),
}
"""Keys of the model section that do not change which weights a model has, or how it computes with them outside of training."""


def model_of(config: Json) -> Json:
    """The keys of the model section that a config.json gives. Raises ContentError for settings that the section cannot express."""
    kind = kind_from(config)
    if config.get("quantization_config") or config.get("quantization_bit"):
        raise ContentError(
            "config.json says that the weights are quantised (quantization_config, quantization_bit); give the directory of the model "
            "before quantisation"
        )
    dialect = DIALECTS[kind]
    own = names_of(kind)
    refuse_foreign(config, kind, own, dialect.also)
    for name, allowed in dialect.demands.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ContentError(f"config.json has {name}={config[name]!r}, and a {kind} can be read with {allowed[0]!r} alone")
    model = dict(dialect.fixed)
    for ours, of in dialect.keys.items():
        model[ours] = value_of(config, of)
        _require_count(ours, of.names[0], model[ours])
    model["max_positions"] = model["seq_length"]
    found = dialect.read(config, model)  # which may go through all layers
    for ours, name in _READ.items():
        _require_count(ours, name, found.get(ours))
    model |= found
    meant = _filled(model)
    names = {ours: of.names[0] for ours, of in dialect.keys.items()}
    require_one_meaning(config, meant, names | {"max_positions": names["seq_length"]}, own)
    rope = {}
    if dialect.rope and model["position"] == "rope":
        rope = rope_of(config, kind, model["max_positions"], meant["head_dim"], dialect.rotated)
    return {**model, **rope}


def _require_count(ours: str, name: str, value: Any) -> None:
    """Raise ContentError for the value of a name in config.json that a count of the model section cannot be; null passes."""
    if ours not in _WHOLE or value is None:
        return
    if type(value) is not int or value < 1:
        raise ContentError(f"config.json has {name}={value!r}, which is no whole number above 0")
    if rule := _RANGES[ours].broken_by(value):
        raise ContentError(f"config.json has {name}={value}, and model.{ours} {rule}")


def names_of(kind: str) -> set[str]:
    """All names in config.json that are read for a kind of model."""
    dialect = DIALECTS[kind]
    keys = {name for of in dialect.keys.values() for name in of.names}
    rope = ROPE_NAMES if dialect.rope and dialect.fixed.get("position") == "rope" else ()
    return keys | set(dialect.demands) | set(dialect.reads) | set(rope)


def _filled(model: Json) -> Json:
    """The sizes of a model, with null replaced by the value that it stands for."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    means = {"num_query_groups": heads, "head_dim": hidden // heads, "ffn_hidden_size": 4 * hidden}
    return {name: means[name] if model.get(name) is None and name in means else model.get(name) for name in (*SAME, *means)}


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
    """The config.json of a model. Raises ContentError if the family cannot express the model."""
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
        "qkv_bias": model.qkv_biased,
    }
    for ours, of in dialect.keys.items():
        config[of.names[0]] = values[ours]
    if dialect.rope and model.position == "rope":
        config |= rope_to(model, dialect.rotated)
    config |= dialect.write(model)
    lost = [name for name in _differences(model, ModelConfig(**model_of(config))) if name not in _NOT_OF_THE_SHAPE]
    if lost:
        lost = [f"{name}={getattr(model, name)!r}" for name in lost]
        raise ContentError(f"a {kind} of Hugging Face cannot have {', '.join(lost)}")
    return config


def same_model(one: Json, other: Json) -> bool:
    """Whether two config.json give the same model section."""
    return not _differences(ModelConfig(**model_of(one)), ModelConfig(**model_of(other)))


def _differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Keys of the model section in which two models differ."""
    return [item.name for item in fields(one) if _effective(one, item.name) != _effective(other, item.name)]


def kind_of(model: ModelConfig, vocab_size: int) -> str:
    """The first family that can express a model. Raises ContentError if none can."""
    reasons = []
    for kind in DIALECTS:
        try:
            config_of(model, vocab_size, kind)
        except ContentError as error:
            reasons.append(str(error))
        else:
            return kind
    raise ContentError("no family of Hugging Face is such a model: " + "; ".join(reasons))


def _effective(model: ModelConfig, name: str) -> Any:
    """A key's value, with null replaced by the value that it stands for; None for settings that have no effect in this model."""
    if name.startswith("rope_") and not model.rotary:
        return None
    if name == "deepnorm_alpha":
        return model.residual_scale
    if name.startswith("rope_") and name not in ("rope_theta", "rope_fraction", "rope_interleaved", "rope_scaling"):
        if model.rope_scaling == "none" or model.rope_factor == 1 or (model.rope_scaling == "linear" and name != "rope_factor"):
            return None
        if name.startswith("rope_beta") != (model.rope_scaling == "yarn") and name not in (
            "rope_factor",
            "rope_original_length",
        ):
            return None
    if name.startswith("sparse_") and model.sparse is None:
        return None
    means = {
        "window": max((window or 0 for window in model.windows), default=0),
        "window_pattern": model.windows,
        "max_positions": model.positions,
        "head_dim": model.head_size,
        "num_query_groups": model.query_groups,
        "ffn_hidden_size": model.ffn_size,
        "qkv_bias": model.qkv_biased,
        "rope_scaling": model.rope_scaling if model.rope_factor > 1 else "none",
        "rope_original_length": model.original_length,
        "rope_fraction": model.rotated,
    }
    return means.get(name, getattr(model, name))
