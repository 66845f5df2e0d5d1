"""The rules between knobs: what cannot be split, what contradicts, what a later release delivers.

`load.py` has checked that every value is of its type; here the values are held against each other and against the number of
processes, before anything is built. Each refusal says what is wrong, the numbers, the key to change and a value that works.
Nothing is ignored: what this release does not do yet is refused, by the table DEFERRED (docs/config.md shows it too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatrain.config.budget import Gauge
from megatrain.config.keys import knobs
from megatrain.config.schema import Config, ModelConfig, ParallelConfig
from megatrain.config.source import ConfigError
from megatrain.config.validate_glm import require_glm
from megatrain.config.validate_schedules import require_schedules


@dataclass(frozen=True)
class Deferred:
    """A knob of which this release accepts some values only."""

    key: str
    allowed: tuple[Any, ...]
    why: str


DEFERRED = (
    Deferred("parallel.context_parallel_size", (1,), "context parallelism comes in a later release"),
    Deferred("parallel.expert_parallel_size", (1,), "mixtures of experts come in a later release"),
    Deferred("optim.name", ("adamw", "adam", "sgd"), "Muon comes in a later release"),
)

WRITERS = ("tensorboard",)
LATER_WRITERS = ("wandb", "mlflow")
"""What `log.to` takes, now and later."""

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
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_size", "layer_split", "bucket_size")
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
"""Of `data.glm`, in [0, 1]."""
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
FRACTIONS = ("data.glm.blank.mask_ratio", "data.glm.sentence.mask_ratio")
"""In (0, 1)."""
"""In [0, 1)."""
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


def validate(config: Config, world_size: int, begun: Callable[[], Gauge | None] = lambda: None) -> None:
    """Hold every rule against `config` in a world of `world_size` processes. Raises ConfigError at the first one broken.

    begun: what the schedules of the run that goes on with `config` are measured by, if one does; called on all ranks or on none.
    """
    _require_released(config)
    _require_ranges(config)
    _require_data(config)
    require_glm(config, _values(config), {knob.key: knob.default for knob in knobs()})
    validate_layout(config, world_size)
    _require_batches(config, world_size)
    require_schedules(config, begun)
    _require_device(config)


def validate_layout(config: Config, world_size: int) -> None:
    """Hold the rules of the model's shape and its layout alone. Raises ConfigError."""
    _require_heads(config.model)
    _require_positions(config.model)
    _require_rope(config.model)
    _require_tensor_split(config.model, config.parallel, world_size)
    _require_layer_split(config.model, config.parallel)
    _require_world(config, world_size)


def choices(values: Iterable[Any]) -> str:
    """`1, 2 or 4`."""
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def show(value: Any) -> str:
    """A value as it is written in a config."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(show, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("\n", "\\n")


def _values(config: Config) -> dict[str, Any]:
    """`section.key` -> value."""
    return {knob.key: knob.of(config) for knob in knobs()}


def _require_released(config: Config) -> None:
    values = _values(config)
    for rule in DEFERRED:
        value = values[rule.key]
        if value not in rule.allowed:
            use = choices(map(show, rule.allowed))
            raise ConfigError(f"{rule.key}={show(value)} is not in this release: {rule.why}. Use {rule.key}={use}.")
    for writer in config.log.to:
        if writer in LATER_WRITERS:
            raise ConfigError(f"log.to={show(config.log.to)}: {writer} is not in this release. Use log.to=[tensorboard] or [].")
        if writer not in WRITERS:
            raise ConfigError(f"log.to={show(config.log.to)}: {writer!r} is no known writer. Use log.to=[tensorboard] or [].")


def _require_ranges(config: Config) -> None:
    """Each number must lie within its own bounds; null stands for a derived value, or for none."""
    values = _values(config)
    defaults = {knob.key: knob.default for knob in knobs()}
    bounds = (
        (POSITIVE, "must be greater than 0", lambda number: number > 0),
        (NOT_NEGATIVE, "must be 0 or more", lambda number: isinstance(number, str) or number >= 0),
        (BELOW_ONE, "must lie in [0, 1)", lambda number: 0 <= number < 1),
        (FRACTIONS, "must lie in (0, 1)", lambda number: 0 < number < 1),
        (AT_MOST_ONE, "must be at most 1", lambda number: number <= 1),
        (("model.rope_factor",), "must be 1 or more", lambda number: number >= 1),
        (("train.seed",), "must be less than 2^63", lambda number: number < 1 << 63),
        (NOT_EMPTY, "must not be empty text", lambda text: text != ""),
    )
    for keys, rule, holds in bounds:
        for key in keys:
            value = values[key]
            parts = value if isinstance(value, tuple) else (value,)
            if not all(part is None or holds(part) for part in parts):
                shown = repr(value) if isinstance(value, str) else show(value)
                raise ConfigError(f"{key}={shown} {rule}. Use for example {show(defaults[key])}.")


def _require_data(config: Config) -> None:
    if not config.data.train:
        raise ConfigError("data.train is empty. Use the prefix of a .bin/.idx pair, as `megatrain data tokenize` writes it.")
    for name, corpora in (("train", config.data.train), ("valid", config.data.valid)):
        for i, corpus in enumerate(corpora):
            if not corpus.path:
                raise ConfigError(f"data.{name}[{i}].path is empty. Use the prefix of a .bin/.idx pair.")
            if not corpus.weight > 0:
                what = f"data.{name}[{i}].weight={corpus.weight}"
                raise ConfigError(f"{what} must be greater than 0. Use for example 1.0, or leave the corpus out.")
    for name, token in (("eod", config.data.eod), ("bos", config.data.bos)):
        if token is not None and config.data.tokenizer is None:
            raise ConfigError(
                f"data.{name}={token} names a token, and data.tokenizer is null. Use data.tokenizer=PATH, or leave it out."
            )
    if config.model.vocab_size is None and config.data.tokenizer is None:
        raise ConfigError(
            "model.vocab_size and data.tokenizer are both null, so the vocabulary is unknown. "
            "Use data.tokenizer=bytes, data.tokenizer=TOKENIZER.json or a number for model.vocab_size."
        )


def _require_heads(model: ModelConfig) -> None:
    hidden, heads, groups = model.hidden_size, model.num_attention_heads, model.query_groups
    if model.head_dim is None and hidden % heads:
        raise ConfigError(
            f"model.hidden_size={hidden} is not a multiple of model.num_attention_heads={heads}. Use model.hidden_size="
            f"{choices(_multiples(hidden, heads))}, or model.num_attention_heads={choices(_nearest(_divisors(hidden), heads))}."
        )
    if heads % groups:
        raise ConfigError(
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}. "
            f"Use model.num_query_groups={choices(_divisors(heads))}."
        )


def _require_positions(model: ModelConfig) -> None:
    """A sample must not be longer than the positions that there are."""
    if model.seq_length <= model.positions:
        return
    wider = f"model.max_positions={model.seq_length}"
    raise ConfigError(
        f"model.seq_length={model.seq_length} is more than model.max_positions={model.positions}"
        + (
            f", the rows of the table of learned positions. Use model.seq_length={model.positions} or less, or {wider} for a model "
            "that is trained from the beginning."
            if model.learned_positions
            else f". Use {wider}: model.position={model.position} has no table; or model.seq_length={model.positions} or less."
        )
    )


def _require_rope(model: ModelConfig) -> None:
    """Rotary embeddings turn pairs, and their scalings need an order."""
    if not model.rotary:
        return
    hidden, heads = model.hidden_size, model.num_attention_heads
    unit = 4 if model.two_dimensional else 2
    what = f"model.position={model.position} turns pairs of numbers{' in each half of a head' if unit == 4 else ''}"
    if model.head_dim is not None and model.head_dim % unit:
        fits = choices(_multiples(model.head_dim, unit))
        raise ConfigError(f"{what}, but model.head_dim={model.head_dim}. Use model.head_dim={fits}.")
    if model.head_size % unit:
        even = [count for count in _divisors(hidden) if hidden // count % unit == 0]
        fits = (
            f"model.num_attention_heads={choices(_nearest(even, heads))}"
            if even
            else ("an even model.hidden_size" if unit == 2 else "a model.hidden_size that 4 divides")
        )
        raise ConfigError(
            f"{what}, but the head dimension is {model.head_size} "
            f"(model.hidden_size={hidden} / model.num_attention_heads={heads}). Use {fits}."
        )
    if model.rotated < 2:
        raise ConfigError(
            f"model.rope_fraction={model.rope_fraction} of a head dimension of {model.head_size} is less than one pair. "
            f"Use model.rope_fraction={unit / model.head_size:g} or more."
        )
    for low, high in (("rope_low_freq_factor", "rope_high_freq_factor"), ("rope_beta_slow", "rope_beta_fast")):
        if getattr(model, low) >= getattr(model, high):
            raise ConfigError(
                f"model.{low}={getattr(model, low)} must be less than model.{high}={getattr(model, high)}. "
                f"Use model.{low}={getattr(model, high) / 4:g}."
            )


def _require_tensor_split(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Every matrix, and with sequence parallelism every sequence, must fall into equal parts."""
    size = parallel.tensor_parallel_size
    problem = _split_problem(model, size, parallel.sequence_parallel)
    if problem is None:
        return
    fits = _fitting_tensor_sizes(model, parallel)
    here = [fit for fit in fits if world_size % fit == 0]
    in_world = f" (in a world of size {world_size}: {choices(here)})" if here != fits else ""
    raise ConfigError(f"{problem} cannot be split over parallel.tensor_parallel_size={size}. Use {choices(fits)}{in_world}.")


def _require_layer_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Every virtual stage of the pipeline must have a layer, and all layers must lie somewhere."""
    layers, stages, chunks = model.num_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    pieces = (
        f"parallel.pipeline_parallel_size={stages} x parallel.virtual_pipeline_size={chunks} = {stages * chunks} virtual stages"
    )
    if layers < stages * chunks:
        fewer = [size for size in range(stages, 0, -1) if size * chunks <= layers][:1]
        smaller = f", or parallel.pipeline_parallel_size={fewer[0]}" if fewer else ""
        raise ConfigError(
            f"model.num_layers={layers} cannot be split over {pieces}: each needs a layer. "
            f"Use model.num_layers={stages * chunks} or more{smaller}."
        )
    given = parallel.layer_split
    if given is not None and (len(given) != stages * chunks or sum(given) != layers):
        least, more = divmod(layers, stages * chunks)
        even = show(tuple(least + (i < more) for i in range(stages * chunks)))
        raise ConfigError(
            f"parallel.layer_split={show(given)} has {sum(given)} layers on {len(given)} virtual stages, but there are "
            f"model.num_layers={layers} and {pieces}. Use for example parallel.layer_split={even}."
        )


def _split_problem(model: ModelConfig, size: int, sequence_parallel: bool) -> str | None:
    """The key, with its value, that `size` tensor-parallel ranks cannot share; None where all is well.

    Key/value heads are either shared out (size <= groups) or replicated, each over size / groups ranks.
    """
    groups = model.query_groups
    if model.num_attention_heads % size:
        return f"model.num_attention_heads={model.num_attention_heads}"
    if groups % size and size % groups:
        return f"model.num_query_groups={groups}"
    if model.ffn_size % size:
        return f"model.ffn_hidden_size={model.ffn_size}"
    if sequence_parallel and model.seq_length % size:
        return f"with parallel.sequence_parallel=true, model.seq_length={model.seq_length}"
    return None


def _fitting_tensor_sizes(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Every tensor-parallel size that this model can be split over; 1 is among them."""
    sizes = _divisors(model.num_attention_heads)
    return [size for size in sizes if _split_problem(model, size, parallel.sequence_parallel) is None]


def _require_world(config: Config, world_size: int) -> None:
    p = config.parallel
    if world_size < 1:
        raise ConfigError(f"a world of {world_size} ranks cannot train anything. Start 1 process or more.")
    ranks = p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size
    if world_size % ranks:
        others = p.pipeline_parallel_size * p.context_parallel_size
        fits = [size for size in _fitting_tensor_sizes(config.model, p) if world_size % (size * others) == 0]
        smaller = f", or parallel.tensor_parallel_size={choices(fits)}" if fits else ""
        raise ConfigError(
            f"a world of size {world_size} cannot be split over parallel.tensor_parallel_size={p.tensor_parallel_size} x "
            f"parallel.pipeline_parallel_size={p.pipeline_parallel_size} x "
            f"parallel.context_parallel_size={p.context_parallel_size} = {ranks} ranks a replica. "
            f"Start {choices(_multiples(world_size, ranks))} processes{smaller}."
        )


def _require_batches(config: Config, world_size: int) -> None:
    train, replicas = config.train, config.data_parallel_size(world_size)
    _require_multiple("train.global_batch_size", train.global_batch_size, train.micro_batch_size, replicas)
    if train.batch_ramp is None:
        return
    start, increment, _ = train.batch_ramp
    if start > train.global_batch_size:
        raise ConfigError(
            f"train.batch_ramp={show(train.batch_ramp)} begins above train.global_batch_size={train.global_batch_size}. "
            f"Use train.batch_ramp={show((train.micro_batch_size * replicas, increment, train.batch_ramp[2]))}."
        )
    _require_multiple("train.batch_ramp[0]", start, train.micro_batch_size, replicas)
    _require_multiple("train.batch_ramp[1]", increment, train.micro_batch_size, replicas)
    mix, wave = config.data.glm.objective_mix, train.micro_batch_size * replicas
    present = sum(share > 0 for share in (mix.blank, mix.sentence, mix.document))
    if config.data.objective == "glm" and mix.mode == "weighted" and start < present:
        raise ConfigError(
            f"data.glm.objective_mix.mode=weighted puts each of {present} objectives into every batch, but train.batch_ramp="
            f"{show(train.batch_ramp)} begins with {start}. Use train.batch_ramp="
            f"{show((-(-present // wave) * wave, increment, train.batch_ramp[2]))}."
        )


def _require_multiple(what: str, batch: int, micro: int, replicas: int) -> None:
    """Every batch is dealt out in whole micro-batches to all replicas."""
    if batch % (micro * replicas) == 0:
        return
    fits = _nearest(_divisors(batch // replicas), micro) if batch % replicas == 0 else []
    smaller = f", or train.micro_batch_size={choices(fits)}" if fits else ""
    raise ConfigError(
        f"{what}={batch} is not a multiple of train.micro_batch_size={micro} x {replicas} "
        f"data-parallel replicas = {micro * replicas}. "
        f"Use {what}={choices(_multiples(batch, micro * replicas))}{smaller}."
    )


def _require_device(config: Config) -> None:
    if config.train.precision == "fp16" and config.optim.master == "split":
        raise ConfigError(
            "optim.master=split keeps the 16 bits that a BF16 parameter lacks, but train.precision=fp16. "
            "Use optim.master=fp32, or train.precision=bf16."
        )
    device, backend = config.parallel.device, config.parallel.backend
    if config.train.precision == "fp64" and device == "cuda":
        raise ConfigError(
            "train.precision=fp64 is for checks on CPU, but parallel.device=cuda. Use parallel.device=cpu, or fp32."
        )
    if backend == "nccl" and device == "cpu":
        raise ConfigError("parallel.backend=nccl needs GPUs, but parallel.device=cpu. Use parallel.backend=gloo or auto.")


def _divisors(number: int) -> list[int]:
    """Every divisor, rising."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def _multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and just above `number`; 0 is none."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple]


def _nearest(values: list[int], to: int, count: int = 8) -> list[int]:
    """At most `count` of the values, those nearest to `to`, rising."""
    return sorted(sorted(values, key=lambda value: abs(value - to))[:count])
