"""The bounds of each number. They are checked before the rules between numbers, so that no rule has to compute with an absurd number.

Upper bounds lie far beyond what anybody trains. A larger number is a slip, which would otherwise surface late, as some other error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatrain.config.keys import knobs, show
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError

POSITIVE = (
    *(f"model.{name}" for name in ("num_layers", "hidden_size", "num_attention_heads", "head_dim", "num_query_groups")),
    *(
        f"model.{name}"
        for name in ("ffn_hidden_size", "seq_length", "max_positions", "vocab_size", "norm_eps", "rope_theta", "init_std")
    ),
    *(f"model.{name}" for name in ("rope_fraction", "rope_original_length", "rope_low_freq_factor", "rope_high_freq_factor")),
    *(
        f"model.{name}"
        for name in ("rope_beta_fast", "rope_beta_slow", "rope_factor", "window", "sparse_block", "sparse_local_blocks")
    ),
    *(f"model.{name}" for name in ("embedding_init_std", "deepnorm_alpha", "embedding_grad_scale")),
    *(
        f"parallel.{name}"
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "virtual_pipeline_size",
            "layer_split",
            "zero_ranks",
            "bucket_size",
        )
    ),
    *(f"optim.{name}" for name in ("lr", "eps", "decay_fraction")),
    *(f"train.{name}" for name in ("steps", "tokens", "global_batch_size", "micro_batch_size", "hang_timeout_seconds")),
    *(f"train.{name}" for name in ("batch_ramp", "skip_steps", "loss_scale", "loss_scale_window", "loss_scale_hysteresis")),
    *(f"train.{name}" for name in ("loss_scale_min", "exit_after_minutes")),
    *(f"log.{name}" for name in ("every", "peak_tflops")),
    *(f"data.glm.blank.{name}" for name in ("poisson_lambda", "min_span", "max_span")),
    *("data.glm.document.max_ratio", "data.glm.text_length"),
    "checkpoint.staging_gib",
)
PROBABILITIES = ("blank.single_span_prob", "blank.decoder_noise_prob", "document.suffix_prob", "short_seq_prob")
"""Keys of `data.glm` in [0, 1]."""
NOT_NEGATIVE = (
    *(f"model.{name}" for name in ("logit_softcap", "sparse_global_blocks", "embedding_grad_steps")),
    *(f"optim.{name}" for name in ("min_lr", "warmup_steps", "weight_decay", "weight_decay_end", "clip_grad")),
    *(f"train.{name}" for name in ("seed", "eval_every", "eval_batches", "audit_every", "z_loss", "loss_chunk")),
    "train.exit_before_end_minutes",
    *(f"checkpoint.{name}" for name in ("save_every", "keep", "keep_every")),
    *(f"data.glm.objective_mix.{name}" for name in ("blank", "sentence", "document")),
    *(f"data.glm.tokens.{name}" for name in ("cls", "eos", "mask", "gmask", "smask", "sop", "eop", "noise")),
    *("data.glm.blank.min_gap", "data.glm.document.min_ratio", "data.glm.document.reserve_tokens"),
    *(f"data.glm.{name}" for name in PROBABILITIES),
    *("data.eod", "data.bos", "log.norms_every"),
)
BELOW_ONE = ("model.dropout", "model.attention_dropout", "optim.betas", "optim.momentum", "train.label_smoothing")
"""Keys in [0, 1)."""
FRACTIONS = ("data.glm.blank.mask_ratio", "data.glm.sentence.mask_ratio")
"""Keys in (0, 1)."""
AT_MOST_ONE = (
    *("optim.decay_fraction", "model.rope_fraction", "model.embedding_grad_scale"),
    *(f"data.glm.{name}" for name in (*PROBABILITIES, "document.min_ratio", "document.max_ratio")),
)
NOT_EMPTY = (
    "model.init_from",
    "data.tokenizer",
    "data.eod",
    "data.bos",
    "data.cache_dir",
    "checkpoint.dir",
    "checkpoint.resume",
    "log.dir",
    "train.exit_file",
)

LARGEST_INTEGER, LARGEST_NUMBER = (1 << 31) - 1, 1e15
"""Upper bounds for keys that LARGEST does not list."""
LARGEST = {
    **dict.fromkeys(
        (f"model.{name}" for name in ("num_layers", "num_attention_heads", "num_query_groups", "head_dim")), 1 << 16
    ),
    **dict.fromkeys((f"model.{name}" for name in ("hidden_size", "ffn_hidden_size", "vocab_size")), 1 << 24),
    **dict.fromkeys((f"model.{name}" for name in ("seq_length", "max_positions")), 1 << 24),
    **dict.fromkeys((f"parallel.{name}_parallel_size" for name in ("tensor", "pipeline", "context", "expert")), 1 << 24),
    **dict.fromkeys(("parallel.virtual_pipeline_size", "parallel.layer_split"), 1 << 16),
    **dict.fromkeys((f"train.{name}" for name in ("global_batch_size", "micro_batch_size")), 1 << 24),
    **dict.fromkeys((f"data.glm.blank.{name}" for name in ("min_span", "max_span", "poisson_lambda")), 1 << 16),
    "train.seed": (1 << 63) - 1,
    "train.tokens": 1e18,
    "train.hang_timeout_seconds": 1e6,  # sockets count milliseconds in 32 bits
}


def require_ranges(config: Config, sections: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError at the first number outside of its bounds; null, which stands for a derived value or for none, passes.

    sections: check only these; None: all.
    """
    found = {knob.key: knob for knob in knobs() if sections is None or knob.section in sections}
    bounds = (
        (POSITIVE, "must be greater than 0", lambda number: number > 0),
        (NOT_NEGATIVE, "must be 0 or more", lambda number: isinstance(number, str) or number >= 0),
        (BELOW_ONE, "must lie in [0, 1)", lambda number: 0 <= number < 1),
        (FRACTIONS, "must lie in (0, 1)", lambda number: 0 < number < 1),
        (AT_MOST_ONE, "must be at most 1", lambda number: number <= 1),
        (("model.rope_factor",), "must be 1 or more", lambda number: number >= 1),
        (("model.rope_theta",), "must be greater than 1", lambda number: number > 1),
        (("train.seed",), "must be less than 2^63", lambda number: number < 1 << 63),
        (NOT_EMPTY, "must not be empty text", lambda text: text != ""),
    )
    for keys, rule, holds in bounds:
        for key in keys:
            if key in found and not all(part is None or holds(part) for part in _parts(found[key].of(config))):
                value = found[key].of(config)
                shown = repr(value) if isinstance(value, str) else show(value)
                raise ConfigError(f"{key}={shown} {rule}. Use for example {show(found[key].default)}.")
    for key, knob in found.items():
        for part in _parts(knob.of(config)):
            largest = LARGEST.get(key, LARGEST_INTEGER if isinstance(part, int) else LARGEST_NUMBER)
            if isinstance(part, (int, float)) and part > largest:
                value = show(knob.of(config))
                raise ConfigError(f"{key}={value} must be at most {show(largest)}. Use for example {show(knob.default)}.")


def _parts(value: Any) -> Iterator[Any]:
    """The elements of a list, or the value."""
    yield from value if isinstance(value, tuple) else (value,)
