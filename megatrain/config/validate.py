"""The rules between keys: sizes that cannot be split, values that contradict each other, values that have no effect beside others.

`load.py` has checked the type of every value. The range of each stands beside its key in the schema (`knob(..., above=0)`), and so do the
values that a later release takes and the condition under which a key has an effect; docs/config.md shows all three. They are checked first,
so that no rule between numbers computes with an absurd one. Then values are compared with each other and with the number of processes,
before anything is built. Each error says what is wrong, the numbers, the key to change and a value that works.
"""

from __future__ import annotations

from collections.abc import Callable

from megatrain.config.blend_rules import require_blend
from megatrain.config.budget import WarmUp, budget_of, warmup_of
from megatrain.config.keys import choices, knobs, show
from megatrain.config.schema import Config, ModelConfig, ParallelConfig
from megatrain.config.source import ConfigError


def validate(config: Config, world_size: int, begun: Callable[[], WarmUp | None] = lambda: None) -> None:
    """Check every rule for a run with `world_size` processes. Raises ConfigError at the first one broken.

    begun: the warm-up of the run that `config` continues, or None; called on all ranks or on none.
    """
    validate_step(config, world_size)
    _require_data(config)
    require_blend(config)
    _require_glm_text(config)
    _require_schedules(config, begun)
    require_effects(config)


def validate_data(config: Config) -> None:
    """Check the rules of corpora, their blend and how samples are made of them, whatever the layout. Raises ConfigError."""
    require_values(config)
    _require_glm(config)
    _require_data(config)
    require_blend(config)
    _require_glm_text(config)


def validate_step(config: Config, world_size: int) -> None:
    """Check the rules of one training step, which do not depend on the corpora or the number of steps. Raises ConfigError."""
    require_values(config)
    _require_glm(config)
    validate_layout(config, world_size)
    _require_batches(config, world_size)
    _require_embedding_grad(config.model)
    _require_device(config)


def require_values(config: Config, sections: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError at the first value out of its knob's range, or not of this release. Null, true and false are in every range.

    sections: check only these; None: all.
    """
    for knob in knobs():
        if (sections is None or knob.section in sections) and (problem := knob.refused(config)):
            raise ConfigError(problem)


def require_effects(config: Config) -> None:
    """Raise ConfigError at the first value, other than its default, that would be ignored."""
    for knob in knobs():
        if problem := knob.ignored(config):
            raise ConfigError(problem)


def validate_model(config: Config) -> None:
    """Check the rules of the model section alone, whatever the rest of the config. Raises ConfigError."""
    require_values(config, ("model",))
    _require_heads(config.model)
    _require_positions(config.model)
    _require_rope(config.model)
    _require_window(config.model)


def validate_layout(config: Config, world_size: int) -> None:
    """Check the rules of the model's shape and layout alone. Raises ConfigError."""
    _require_heads(config.model)
    _require_positions(config.model)
    _require_rope(config.model)
    _require_window(config.model)
    _require_tensor_split(config.model, config.parallel, world_size)
    _require_layer_split(config.model, config.parallel)
    _require_world(config, world_size)


def _require_data(config: Config) -> None:
    if not config.data.train:
        raise ConfigError("data.train is empty. Use the prefix of a .bin/.idx pair, as `megatrain data tokenize` writes it.")
    for name, corpora in (("train", config.data.train), ("valid", config.data.valid)):
        for i, corpus in enumerate(corpora):
            if name == "train" and corpus.set:
                raise ConfigError(
                    f"data.train[{i}].set={corpus.set} has no effect: only held-out text is told apart by name. Leave it out."
                )
            if name == "valid" and corpus.weight != 1:
                raise ConfigError(
                    f"data.valid[{i}].weight={corpus.weight} has no effect: of held-out text every token counts once. Leave it out."
                )
    for name, token in (("eod", config.data.eod), ("bos", config.data.bos)):
        if token is not None and config.data.tokenizer is None:
            raise ConfigError(
                f"data.{name}={token} names a token, and data.tokenizer is null. Use data.tokenizer=PATH, or leave it out."
            )
    for key, texts in (("log.samples.prompts", config.log.samples.prompts), ("eval.tasks", config.eval.tasks)):
        if texts and config.data.tokenizer is None:
            raise ConfigError(
                f"{key} is text, and data.tokenizer is null. Use data.tokenizer=TOKENIZER.json (or bytes), as the corpus was made "
                "with, or leave it out."
            )
    if config.model.vocab_size is None and config.data.tokenizer is None:
        raise ConfigError(
            "model.vocab_size and data.tokenizer are both null, so the vocabulary is unknown. "
            "Use data.tokenizer=bytes, data.tokenizer=TOKENIZER.json or a number for model.vocab_size."
        )


def _require_window(model: ModelConfig) -> None:
    """Check that the pattern gives some layer the window."""
    if "local" not in model.window_pattern[: model.num_layers]:
        raise ConfigError(
            f"model.window_pattern={show(model.window_pattern)} gives no layer the window (model.window={show(model.window)}, "
            f"model.num_layers={model.num_layers}). "
            f"Use for example model.window_pattern=[local, global] with model.window={model.window or 4096}, or leave both out."
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
    """Check that a sample is not longer than the number of positions."""
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
    """Check that rotary embeddings have pairs to rotate, and that the bounds of a scaling are in order."""
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
    """Check that every matrix and, with sequence parallelism, every sequence splits into equal parts."""
    size = parallel.tensor_parallel_size
    problem = _split_problem(model, size, parallel.sequence_parallel)
    if problem is None:
        return
    fits = _fitting_tensor_sizes(model, parallel)
    here = [fit for fit in fits if world_size % fit == 0]
    in_world = f" (in a world of size {world_size}: {choices(here)})" if here != fits else ""
    raise ConfigError(f"{problem} cannot be split over parallel.tensor_parallel_size={size}. Use {choices(fits)}{in_world}.")


def _require_layer_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that every virtual stage of the pipeline has a layer, and that layer_split covers all layers."""
    layers, stages, chunks = model.num_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    pieces = (
        f"parallel.pipeline_parallel_size={stages} x parallel.virtual_pipeline_size={chunks} = {stages * chunks} virtual stages"
    )
    if layers < stages * chunks:
        fewer = layers // chunks
        smaller = f", or parallel.pipeline_parallel_size={fewer}" if fewer else ""
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
    """The key, with its value, that does not split over `size` tensor-parallel ranks; None if all do.

    Key/value heads are either split (size <= groups) or replicated, each on size / groups ranks.
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
    """All tensor-parallel sizes that this model can be split over; 1 is among them."""
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
    data = config.data_parallel_size(world_size) * p.context_parallel_size
    if p.zero_ranks is not None and data % p.zero_ranks:
        raise ConfigError(
            f"parallel.zero_ranks={p.zero_ranks} does not divide the {data} data-parallel ranks of a world of size {world_size}. Use "
            f"parallel.zero_ranks={choices(_nearest(_divisors(data), p.zero_ranks))}, or null: all of them."
        )


def _require_batches(config: Config, world_size: int) -> None:
    train, replicas = config.train, config.data_parallel_size(world_size)
    _require_multiple("train.global_batch_size", train.global_batch_size, train.micro_batch_size, replicas)
    if train.batch_ramp is not None:
        _require_ramp(config, train.batch_ramp, train.micro_batch_size * replicas, replicas)


def _require_ramp(config: Config, ramp: tuple[int, int, int], wave: int, replicas: int) -> None:
    """Check that batches grow from `ramp` on, in whole waves: the sequences of one micro-batch for each of the replicas."""
    train, mix = config.train, config.data.glm.objective_mix
    full, micro, (start, increment, samples) = train.global_batch_size, train.micro_batch_size, ramp
    if wave == full:
        raise ConfigError(
            f"train.batch_ramp={show(ramp)} cannot begin below train.global_batch_size={full}, which is one micro-batch of "
            f"train.micro_batch_size={micro} for each of {replicas} data-parallel replicas. Use train.batch_ramp=null, or "
            f"train.global_batch_size={2 * wave} or more."
        )
    if start >= full:
        where = "above" if start > full else "at"
        raise ConfigError(
            f"train.batch_ramp={show(ramp)} begins {where} train.global_batch_size={full}. "
            f"Use train.batch_ramp={show((wave, -(-increment // wave) * wave, samples))}."
        )
    _require_multiple("train.batch_ramp[0]", start, micro, replicas, full)
    _require_multiple("train.batch_ramp[1]", increment, micro, replicas)
    present = sum(share > 0 for share in (mix.blank, mix.sentence, mix.document))
    if config.data.objective == "glm" and mix.mode == "weighted" and start < present:
        enough = -(-present // wave) * wave
        raise ConfigError(
            f"data.glm.objective_mix.mode=weighted puts each of {present} objectives into every batch, but train.batch_ramp="
            f"{show(ramp)} begins with {start}. Use train.batch_ramp="
            f"{show((enough, increment, samples) if enough < full else None)}."
        )


def _require_multiple(what: str, batch: int, micro: int, replicas: int, below: int | None = None) -> None:
    """Check that a batch is a whole number of micro-batches for each replica. The batch that is advised is less than `below`."""
    if batch % (micro * replicas) == 0:
        return
    fits = _nearest(_divisors(batch // replicas), micro) if batch % replicas == 0 else []
    smaller = f", or train.micro_batch_size={choices(fits)}" if fits else ""
    near = [size for size in _multiples(batch, micro * replicas) if below is None or size < below]
    raise ConfigError(
        f"{what}={batch} is not a multiple of train.micro_batch_size={micro} x {replicas} "
        f"data-parallel replicas = {micro * replicas}. Use {what}={choices(near)}{smaller}."
    )


def _require_embedding_grad(model: ModelConfig) -> None:
    """Check that the factor of the embedding's gradient lasts for a step."""
    if model.embedding_grad_scale != 1 and model.embedding_grad_steps == (0, 0):
        raise ConfigError(
            f"model.embedding_grad_steps=[0, 0] holds model.embedding_grad_scale={model.embedding_grad_scale} for no step, and lets it "
            "rise over none. Use for example model.embedding_grad_steps=[1000, 1000], or null: the scale holds for the whole run."
        )


def _require_device(config: Config) -> None:
    """Check that the numbers' precision, their device and the collectives go together."""
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


def _require_schedules(config: Config, begun: Callable[[], WarmUp | None]) -> None:
    """Raise ConfigError at the first rule broken. begun: the warm-up of the run that `config` continues; called only where it matters."""
    optim = config.optim
    if optim.lr_schedule != "constant" and optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}. Use optim.min_lr={optim.lr / 10:.3g}.")
    problem = _warmup_problem(config, warmup_of(config)) or _decay_problem(config) or _skip_problem(config)
    if problem is not None and config.train.tokens is not None:  # in tokens, a changed batch does not make the run shorter
        kept = begun()
        problem = problem if kept is None else _warmup_problem(config, kept)
    if problem is not None:
        raise ConfigError(problem)


def _length(config: Config) -> str:
    """The run's length as errors say it: `train.steps=100`, or `the 35 steps of train.tokens=409600`."""
    tokens, steps = config.train.tokens, budget_of(config).total_steps()
    return f"train.steps={steps}" if tokens is None else f"the {steps} steps of train.tokens={tokens:g}"


def _warmup_problem(config: Config, began: WarmUp) -> str | None:
    """The error if the warm-up does not fit into the run's length, both in the unit that schedules are counted in; None if it fits."""
    optim, budget, tokens = config.optim, budget_of(config), config.train.tokens
    steps = budget.total_steps()
    what = _length(config)
    warmup, total = (began.warmup_steps, steps) if tokens is None else (began.warmup, tokens)
    if warmup >= total:
        return (
            f"optim.warmup_steps={began.warmup_steps} is not less than {what}. "
            f"Use optim.warmup_steps={steps // 10}, or more steps."
        )
    if optim.lr_schedule == "wsd" and warmup + optim.decay_fraction * total > total:
        room = total - optim.decay_fraction * total
        fits = int(room) if tokens is None else budget.steps_to(int(room / config.model.seq_length) + 1) - 1
        return (
            f"the last optim.decay_fraction={optim.decay_fraction} of {what} begins before "
            f"optim.warmup_steps={began.warmup_steps} have passed. Use a smaller optim.decay_fraction, or "
            f"optim.warmup_steps={fits}."
        )
    return None


def _decay_problem(config: Config) -> str | None:
    """The error if wsd's decay is so short that the last update still has the whole rate; None if it decays."""
    optim, budget, tokens = config.optim, budget_of(config), config.train.tokens
    steps = budget.total_steps()
    total = float(steps) if tokens is None else tokens

    def left(updates: int) -> float:
        """Share of the run that is left before so many last updates."""
        done = max(0, steps - updates)
        return 1 - (done if tokens is None else budget.consumed(done) * config.model.seq_length) / total

    if optim.lr_schedule != "wsd" or optim.decay_fraction > left(1) + 1e-9:
        return None
    fits = f"optim.decay_fraction={left(2):.2g}, or " if (optim.warmup_steps or 0) <= steps - 3 else ""
    longer = f"steps={int(1 / optim.decay_fraction + 1e-9) + 1}"
    if tokens is not None:
        longer = f"tokens={float(f'{1.05 * budget.full * config.model.seq_length / optim.decay_fraction:.3g}'):g}"
    return (
        f"the last optim.decay_fraction={optim.decay_fraction} of {_length(config)} has no update in it, so that optim.lr_schedule=wsd "
        f"never decays. Use {fits}train.{longer} or more."
    )


def _skip_problem(config: Config) -> str | None:
    """The error if train.skip_steps lists a step that the run does not have; None if it has all."""
    skip, steps = config.train.skip_steps, budget_of(config).total_steps()
    if not skip or max(skip) <= steps:
        return None
    fits = show(tuple(step for step in skip if step <= steps))
    return f"train.skip_steps={show(skip)} goes beyond {_length(config)}. Use train.skip_steps={fits}, or a longer run."


def _require_glm(config: Config) -> None:
    """Check that GLM's objectives fit into the batches, and their spans and texts into a sample."""
    if config.data.objective != "glm":
        if config.data.has_answers:
            raise ConfigError(
                f"data.train has a corpus with answers, which data.objective={config.data.objective} does not read. Use data.objective=glm."
            )
        return
    glm, train = config.data.glm, config.train
    mix, blank, document = glm.objective_mix, glm.blank, glm.document
    shares = {"blank": mix.blank, "sentence": mix.sentence, "document": mix.document}
    present = sum(share > 0 for share in shares.values())
    if not present:
        raise ConfigError("data.glm.objective_mix has no share above 0. Use for example data.glm.objective_mix.blank=1.")
    if mix.mode == "weighted" and train.global_batch_size < present:
        raise ConfigError(
            f"data.glm.objective_mix.mode=weighted puts each of {present} objectives into every batch, but train.global_batch_size="
            f"{train.global_batch_size}. Use train.global_batch_size={present} or more."
        )
    if mix.mode == "weighted" and glm.loss_norm == "microbatch" and train.micro_batch_size < present:
        raise ConfigError(
            f"data.glm.loss_norm=microbatch takes means within micro-batches, and data.glm.objective_mix.mode=weighted needs {present} "
            f"sequences in each, but train.micro_batch_size={train.micro_batch_size}. Use train.micro_batch_size={present}."
        )
    if blank.min_span > blank.max_span:
        raise ConfigError(
            f"data.glm.blank.min_span={blank.min_span} is above data.glm.blank.max_span={blank.max_span}. Use "
            f"data.glm.blank.min_span={blank.max_span} or less."
        )
    if document.min_ratio > document.max_ratio:
        raise ConfigError(
            f"data.glm.document.min_ratio={document.min_ratio} is above data.glm.document.max_ratio={document.max_ratio}. Use "
            f"data.glm.document.min_ratio={document.max_ratio} or less."
        )
    if glm.text_length is not None and glm.text_length > config.model.seq_length - 2:
        raise ConfigError(
            f"data.glm.text_length={glm.text_length} leaves no room for sentinels in model.seq_length={config.model.seq_length}. Use "
            f"data.glm.text_length={config.model.seq_length - 2} or less, or null."
        )


def _require_glm_text(config: Config) -> None:
    """Raise ConfigError where the given corpora do not suit the objectives."""
    if config.data.objective != "glm":
        return
    sentence = config.data.glm.objective_mix.sentence
    if any(corpus.answers is not None for corpus in config.data.valid):
        raise ConfigError(
            "data.valid has a corpus with answers, which are for data.train alone. Use its text, or leave it out."
        )
    if sentence > 0 and config.data.tokenizer is None:
        raise ConfigError(
            f"data.glm.objective_mix.sentence={sentence} needs to know which tokens end a sentence, and data.tokenizer is null. Use "
            "data.tokenizer=PATH, or data.glm.objective_mix.sentence=0."
        )


def _divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def _multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and just above `number`, without 0."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple]


def _nearest(values: list[int], to: int, count: int = 8) -> list[int]:
    """The `count` values nearest to `to`, ascending."""
    return sorted(sorted(values, key=lambda value: abs(value - to))[:count])
