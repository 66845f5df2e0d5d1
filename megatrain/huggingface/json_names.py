"""Reads names in a config.json: defaults, nulls, several names for one thing, and names that only another family reads.

A missing name has the default of transformers' class; a null means what it means there, or is refused. Two names for the same thing must
agree, even where transformers reads only one of them. A name that would make it another model in some other family is refused, since
transformers itself ignores it silently.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from megatrain.checkpoint.together import ContentError

Json = dict[str, Any]
REFUSED = object()
"""Stands for: no default, or null is not allowed."""

SAME = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_query_groups": ("num_key_value_heads", "multi_query_group_num", "num_query_groups", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "kv_channels"),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "inner_hidden_size"),
    "max_positions": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_sequence_length", "max_seq_len"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    "tied_embeddings": ("tie_word_embeddings", "tie_embeddings", "tie_weights"),
}
"""Key of the model section -> the names that families use for it."""

_PLAIN: tuple[Any, ...] = (False, 0)
_ONE: tuple[Any, ...] = (1, 1.0)
FOREIGN: Mapping[str, tuple[Any, ...]] = {
    **{"sliding_window": (), "use_sliding_window": _PLAIN, "sliding_window_pattern": (), "attention_chunk_size": ()},
    **{
        "layer_types": (),
        "no_rope_layers": ([],),
        "no_rope_layer_interval": (),
        "rope_local_base_freq": (),
        "per_layer_config": (),
    },
    **{"rope_theta": (), "rope_scaling": ({},), "rope_parameters": ({},), "partial_rotary_factor": _ONE, "rotary_pct": _ONE},
    **{"rotary_dim": (), "rotary_emb_base": (), "rope_ratio": _ONE, "alibi": _PLAIN},
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "add_bias_linear", "add_qkv_bias", "qkv_bias"), _PLAIN),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "parallel_attn", "use_parallel_residual"), _PLAIN),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "clip_qkv"), _PLAIN),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"), _ONE),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base"), ()),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "q_lora_rank"), _PLAIN),
    **dict.fromkeys(("multi_query", "multi_query_attention", "is_encoder_decoder", "prefix_projection"), _PLAIN),
    **dict.fromkeys(("position_encoding_2d", "apply_residual_connection_post_layernorm"), _PLAIN),
}
"""Names that change what a model computes in some family -> values that mean no change; null always does."""


class JsonKey(NamedTuple):
    """Names in config.json of a key of the model section. Any of them is read, the first is written."""

    names: tuple[str, ...]
    default: Any = REFUSED
    """Value if no name is present."""
    null: Any = REFUSED
    """Value if the name is null."""


def key(*names: str, default: Any = REFUSED, null: Any = REFUSED) -> JsonKey:
    """A JsonKey of a family in transformers."""
    return JsonKey(names, default, null)


def lenient(*names: str, default: Any = REFUSED) -> JsonKey:
    """A JsonKey of THUDM's own files, where null means the same as a missing name."""
    return JsonKey(names, default, default)


def value_of(config: Json, of: JsonKey) -> Any:
    """The value of a key in a config.json. Raises ContentError if it is missing, null, or given differently under two names."""
    said = {name: config[name] for name in of.names if config.get(name) is not None}
    for name, value in said.items():
        first = next(iter(said))
        if name != first and value != said[first]:
            raise contradiction(f"{first}={said[first]!r}", f"{name}={value!r}")
    if said:
        return next(iter(said.values()))
    if of.names[0] in config and of.null is REFUSED:
        raise nothing_said(of.names[0])
    value = of.null if of.names[0] in config else of.default
    if value is REFUSED:
        raise ContentError(f"config.json has no {of.names[0]}. Give the number that the weights were trained with.")
    return value


def nothing_said(name: str, advice: str = "Give the number that the weights were trained with") -> ContentError:
    """The error for a null that transformers cannot read either."""
    return ContentError(f"config.json has {name}=null, which says nothing. {advice}.")


def contradiction(one: str, other: str) -> ContentError:
    """The error for two contradicting statements in a config.json."""
    return ContentError(f"config.json has {one} and {other}, which contradict each other. Remove the one that is wrong.")


def require_one_meaning(config: Json, meant: Mapping[str, Any], names: Mapping[str, str], own: Collection[str]) -> None:
    """Raise ContentError where another name for a key of the model section has another value.

    meant: values of the keys, nulls filled in; names: the family's name of each key; own: names that the family reads in its own way.
    """
    for ours, others in SAME.items():
        for name in others:
            said = config.get(name)
            if ours in meant and name not in own and said is not None and said != meant[ours]:
                raise contradiction(f"{names.get(ours, ours)}={meant[ours]!r}", f"{name}={said!r}")
    one, other = config.get("dtype"), config.get("torch_dtype")
    if one is not None and other is not None and one != other:
        raise contradiction(f"dtype={one!r}", f"torch_dtype={other!r}")


def refuse_foreign(config: Json, kind: str, own: Collection[str], also: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ContentError for a name that this family does not read and that describes another model.

    own: names that the family reads; also: name -> values that are accepted, as they are true of the family anyway.
    """
    for name, plain in FOREIGN.items():
        said = config.get(name)
        if name in own or said is None or said in also.get(name, plain):
            continue
        if name == "layer_types" and isinstance(said, list) and set(said) <= {"full_attention"}:
            continue
        raise ContentError(
            f"config.json has {name}={said!r}, which a {kind} of transformers does not read: either model_type={kind!r} is wrong, or "
            f"this is. Remove {name} where the weights were trained without."
        )
