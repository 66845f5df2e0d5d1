"""A table for each Hugging Face family: the names in config.json of keys of the model section, and values that are required.

Defaults are those of transformers' classes (tests/huggingface/test_config.py compares them); THUDM's own files have no such classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.checkpoint.together import ContentError
from megatrain.config.schema import ModelConfig
from megatrain.huggingface.json_names import Json, JsonKey, contradiction, key, lenient

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
"""Names of activations without a gate -> model.activation."""


@dataclass(frozen=True)
class Dialect:
    """How the config.json of one family is read and written."""

    fixed: Json
    """Keys of the model section that the family fixes."""
    keys: Mapping[str, JsonKey]
    """Key of the model section -> its names in config.json."""
    demands: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Names that must have one of these values if they are present; the first is written."""
    also: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Names that the family does not read -> values that are accepted, as they are true of the family anyway; null is accepted too."""
    reads: tuple[str, ...] = ()
    """Other names in config.json that `read` uses."""
    rotated: float | None = None
    """Share of a head that is rotated by default, where config.json can set it; None: the whole head, always."""
    read: Callable[[Json, Json], Json] = lambda config, model: {}
    """Function of (config.json, the keys so far) that returns further keys of the model section."""
    write: Callable[[ModelConfig], Json] = lambda model: {}
    """Function of the model that returns further names and values of config.json."""
    model_type: str = ""
    """model_type in config.json, if it is not the kind's own name."""
    rope: bool = True
    """Whether config.json has rotary settings beside `keys` and `read` (rope.py)."""


_WINDOW = ("sliding_window", "use_sliding_window", "layer_types")


def _mistral_window(config: Json, model: Json) -> Json:
    """The window, one for all layers. Raises ContentError where config.json says something else too."""
    window = config.get("sliding_window", 4096)
    kinds = config.get("layer_types")
    every = {"full_attention" if window is None else "sliding_attention"}
    if config.get("use_sliding_window") not in (None, window is not None):
        raise contradiction(f"sliding_window={window}", f"use_sliding_window={config['use_sliding_window']!r}")
    if kinds is not None and set(kinds) != every:
        raise contradiction(f"sliding_window={window}, which a mistral has in all layers,", f"layer_types={kinds}")
    return {"window": window}


def _qwen_window(config: Json, model: Json) -> Json:
    """The window, which config.json may give without using it, and the layers that have it."""
    used = config.get("use_sliding_window", False)
    if type(used) is not bool:
        raise ContentError(f"config.json has use_sliding_window={used!r}, which is neither true nor false")
    window = config.get("sliding_window", 4096) if used else None
    layers, whole = model["num_layers"], config.get("max_window_layers", 28)
    if type(whole) is not int or whole < 0:
        raise ContentError(f"config.json has max_window_layers={whole!r}, which is no whole number of 0 or more")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if window is not None and n >= whole else "full_attention" for n in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise contradiction(f"num_hidden_layers={layers}", f"layer_types={kinds}")
    slides = "sliding_attention" in kinds
    if slides and window is None:
        said = f"use_sliding_window={used}, sliding_window={config.get('sliding_window', 4096)}"
        raise contradiction(f"layer_types={kinds}", said)
    return {"window": window, "window_pattern": _repeated(kinds)} if slides else {"window": None}


def _repeated(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives the kinds of all layers, in the words of model.window_pattern."""
    words = {"s": "local", "f": "global"}
    letters = "".join(
        kind[0] for kind in kinds
    )  # as text, since comparing 65,536 layers with each other one by one takes minutes
    length = next(n for n in range(1, len(letters) + 1) if letters.startswith(letters[n:]))
    return tuple(words[letter] for letter in letters[:length])


def _gpt2_dropout(config: Json, model: Json) -> Json:
    rates = {config.get(name, 0.1) for name in ("embd_pdrop", "resid_pdrop")}
    if len(rates) > 1:
        raise ContentError(
            f"config.json has embd_pdrop={config.get('embd_pdrop')} and resid_pdrop={config.get('resid_pdrop')}: one dropout"
        )
    return {"dropout": rates.pop(), "activation": _activation(config.get("activation_function", "gelu_new"))}


def _glm1_dropout(config: Json, model: Json) -> Json:
    rates = {config.get(name, 0.1) for name in ("embedding_dropout_prob", "output_dropout_prob")}
    if len(rates) > 1:
        raise ContentError(
            f"config.json has embedding_dropout_prob and output_dropout_prob of {sorted(rates)}: the model section has one dropout"
        )
    return {}


def _llama_heads(config: Json, model: Json) -> Json:
    """No keys; raises ContentError for a width that the heads do not divide, which transformers refuses in this family only."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    if hidden % heads:
        raise ContentError(f"config.json has hidden_size={hidden}, which num_attention_heads={heads} do not divide")
    return {}


def _chatglm(config: Json, model: Json) -> Json:
    shared = config.get("multi_query_attention")
    if shared and config.get("multi_query_group_num") is None:
        raise ContentError("config.json has multi_query_attention and no multi_query_group_num")
    head = model["head_dim"] or model["hidden_size"] // model["num_attention_heads"]
    if head % 4:
        raise ContentError(
            f"config.json rotates half of the {head} numbers of a head (kv_channels), and pairs need an even number"
        )
    return {
        "num_query_groups": config["multi_query_group_num"] if shared else None,
        "rope_theta": 10000.0 * (1 if config.get("rope_ratio") is None else config["rope_ratio"]),
    }


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ContentError(f"config.json has activation_function={name!r}; {', '.join(ACTIVATIONS)} are known")
    return ACTIVATIONS[name]


def _shapes(
    layers: int, hidden: int, heads: int, ffn: int, positions: int, vocab: int, **others: JsonKey
) -> dict[str, JsonKey]:
    """The keys of LLaMA and its descendants, with the defaults of a family."""
    return {
        "num_layers": key("num_hidden_layers", default=layers),
        "hidden_size": key("hidden_size", default=hidden),
        "num_attention_heads": key("num_attention_heads", default=heads),
        "num_query_groups": key("num_key_value_heads", default=heads, null=None),
        "head_dim": key("head_dim", default=None, null=None),
        "ffn_hidden_size": key("intermediate_size", default=ffn),
        "seq_length": key("max_position_embeddings", default=positions),
        "vocab_size": key("vocab_size", default=vocab),
        "norm_eps": key("rms_norm_eps", default=1e-6),
        "init_std": key("initializer_range", default=0.02),
        "attention_dropout": key("attention_dropout", default=0.0),
        "tied_embeddings": key("tie_word_embeddings", default=False),
        **others,
    }


_GLM_SHAPES = _shapes(
    *(40, 4096, 32, 13696, 131072, 151552),
    num_query_groups=key("num_key_value_heads", default=2),
    head_dim=key("head_dim", default=128),
    norm_eps=key("rms_norm_eps", default=1.5625e-07),
    attention_dropout=key("attention_dropout", default=0.0, null=0.0),
    qkv_bias=key("attention_bias", default=True),
)
_LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "norm_placement": "pre"}
_GLM = {**_LLAMA, "rope_interleaved": True}
_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


def _write_window(model: ModelConfig) -> Json:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in model.windows]
    whole = next((n for n, window in enumerate(model.windows) if window is not None), model.num_layers)
    used = {"use_sliding_window": whole < model.num_layers, "max_window_layers": whole}
    return {"sliding_window": model.window, **used, "layer_types": kinds}


DIALECTS = {
    "gpt2": Dialect(
        {"norm": "layernorm", "position": "learned", "bias": True, "norm_placement": "pre"},
        {
            "num_layers": key("n_layer", "num_hidden_layers", default=12),
            "hidden_size": key("n_embd", "hidden_size", default=768),
            "num_attention_heads": key("n_head", "num_attention_heads", default=12),
            "ffn_hidden_size": key("n_inner", default=None, null=None),
            "seq_length": key("n_positions", "n_ctx", "max_position_embeddings", default=1024),
            "vocab_size": key("vocab_size", default=50257),
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
    "llama": Dialect(
        _LLAMA,
        _shapes(
            *(32, 4096, 32, 11008, 2048, 32000),
            num_query_groups=key("num_key_value_heads", default=None, null=None),
            attention_dropout=key("attention_dropout", default=0.0, null=0.0),
        ),
        {**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        read=_llama_heads,
    ),
    "mistral": Dialect(
        _LLAMA,
        _shapes(*(32, 4096, 32, 14336, 131072, 32000), num_query_groups=key("num_key_value_heads", default=8)),
        _SILU,
        reads=_WINDOW,
        read=_mistral_window,
        write=lambda model: {"sliding_window": model.window},
    ),
    "qwen2": Dialect(
        {**_LLAMA, "qkv_bias": True},
        _shapes(32, 4096, 32, 22016, 32768, 151936),
        _SILU,
        also={"attention_bias": (True,), "qkv_bias": (True,)},
        reads=_WINDOW,
        read=_qwen_window,
        write=_write_window,
    ),
    "qwen3": Dialect(
        {**_LLAMA, "qk_norm": True},
        _shapes(*(32, 4096, 32, 22016, 32768, 151936), head_dim=key("head_dim", default=128)),
        {**_SILU, "attention_bias": (False,)},
        also={"qk_norm": (True,), "use_qk_norm": (True,), "qk_layernorm": (True,)},
        reads=_WINDOW,
        read=_qwen_window,
        write=_write_window,
    ),
    "glm": Dialect(
        _GLM,
        _GLM_SHAPES,
        _SILU,
        rotated=0.5,
        write=lambda model: {"pad_token_id": None},  # transformers' default is an id of the published vocabulary
    ),
    "glm4": Dialect(
        {**_GLM, "norm_placement": "sandwich"},
        _GLM_SHAPES,
        _SILU,
        rotated=0.5,
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
            "num_layers": key("n_layer", "num_hidden_layers", default=2),
            "hidden_size": key("hidden_size", "n_embed", default=64),
            "num_attention_heads": key("n_head", "num_attention_heads", default=8),
            "seq_length": key("seq_length", default=2048, null=2048),
            "vocab_size": key("vocab_size", default=250880),
            "norm_eps": key("layer_norm_epsilon", default=1e-5),
            "init_std": key("initializer_range", default=0.02),
            "dropout": key("hidden_dropout", default=0.0),
            "attention_dropout": key("attention_dropout", default=0.0),
            "tied_embeddings": key("tie_word_embeddings", default=True),
        },
        {"apply_residual_connection_post_layernorm": (False,)},
    ),
    "chatglm": Dialect(
        {**_GLM, "qkv_bias": True, "rope_fraction": 0.5},
        {
            "num_layers": lenient("num_layers"),
            "hidden_size": lenient("hidden_size"),
            "num_attention_heads": lenient("num_attention_heads"),
            "head_dim": lenient("kv_channels", default=None),
            "ffn_hidden_size": lenient("ffn_hidden_size"),
            "seq_length": lenient("seq_length"),
            "vocab_size": lenient("padded_vocab_size"),
            "norm_eps": lenient("layernorm_epsilon", default=1e-5),
            "dropout": lenient("hidden_dropout", default=0.0),
            "attention_dropout": lenient("attention_dropout", default=0.0),
            "tied_embeddings": lenient("tie_word_embeddings", default=False),
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
        reads=("multi_query_attention", "multi_query_group_num", "rope_ratio"),
        read=_chatglm,
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
            "num_layers": lenient("num_layers"),
            "hidden_size": lenient("hidden_size"),
            "num_attention_heads": lenient("num_attention_heads"),
            "ffn_hidden_size": lenient("inner_hidden_size", default=None),
            "seq_length": lenient("max_sequence_length", default=2048),
            "vocab_size": lenient("vocab_size"),
            "norm_eps": lenient("layernorm_epsilon", default=1e-5),
            "tied_embeddings": lenient("tie_word_embeddings", default=False),
        },
        {"prefix_projection": (False,), "pre_seq_len": (None,)},
        reads=("position_encoding_2d",),
        read=lambda config, model: {"position": "rope_2d" if config.get("position_encoding_2d", True) else "rope"},
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
            "num_layers": lenient("num_layers"),
            "hidden_size": lenient("hidden_size"),
            "num_attention_heads": lenient("num_attention_heads"),
            "seq_length": lenient("max_sequence_length"),
            "vocab_size": lenient("vocab_size"),
            "dropout": lenient("output_dropout_prob", default=0.1),
            "attention_dropout": lenient("attention_dropout_prob", default=0.1),
        },
        {"block_position_encoding": (True,), "relative_encoding": (False,), "spell_length": (None,)},
        read=_glm1_dropout,
        write=lambda model: {"embedding_dropout_prob": model.dropout},
        model_type="glm",
        rope=False,
    ),
}
"""Kind of model -> how its config.json is read and written."""
