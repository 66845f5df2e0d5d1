"""Conditions under which a knob has an effect: how they are written, and those that several knobs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class Effect:
    """The condition under which a knob has an effect. Elsewhere a value other than the default is refused, so that no value is ignored."""

    words: str
    """The condition as text, to follow `when`."""
    keys: tuple[str, ...]
    """The keys whose values decide."""
    holds: Callable[[Any], bool]
    """The condition as a function of a whole config."""

    def __and__(self, other: Effect) -> Effect:
        keys = (*self.keys, *(key for key in other.keys if key not in self.keys))
        return Effect(f"{self.words}, and {other.words}", keys, lambda config: self.holds(config) and other.holds(config))


def where(key: str, *values: Any) -> Effect:
    """The effect of a knob that counts only while `key` has one of `values`."""
    get = attrgetter(key)
    shown = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    words = " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return Effect(f"{key} is {words}", (key,), lambda config: get(config) in values)


def above(key: str, number: float) -> Effect:
    """The effect of a knob that counts only while `key` is above `number`."""
    get = attrgetter(key)
    return Effect(f"{key} is above {number:g}", (key,), lambda config: get(config) > number)


def given(key: str) -> Effect:
    """The effect of a knob that counts only while `key` has a value: not null, nor an empty list."""
    get = attrgetter(key)
    return Effect(f"{key} is given", (key,), lambda config: get(config) not in (None, ()))


# --- model ----------------------------------------------------------------------------------------------------------------

ROTARY = where("model.position", "rope", "rope_2d")
STRETCHED = ROTARY & above("model.rope_factor", 1)
SCALED = ROTARY & where("model.rope_scaling", "linear", "llama3", "yarn")
LLAMA3, YARN = (STRETCHED & where("model.rope_scaling", kind) for kind in ("llama3", "yarn"))
FROM_ORIGINAL = STRETCHED & where("model.rope_scaling", "llama3", "yarn")
POSITIONS = Effect(
    "model.position is learned or learned_2d, or it is not below model.seq_length",
    ("model.position", "model.seq_length"),
    lambda config: config.model.learned_positions or config.model.positions >= config.model.seq_length,
)
DEEPNORM = where("model.norm_placement", "deepnorm")
WINDOW = given("model.window")
SPARSE = given("model.sparse_block")
ALIBI = where("model.position", "alibi") & where("train.precision", "bf16", "fp16")
HALF = where("train.precision", "bf16", "fp16")
INIT_STD = Effect(
    "model.init is normal, or xavier without model.embedding_init_std",
    ("model.init", "model.embedding_init_std"),
    lambda config: config.model.init == "normal" or (config.model.init == "xavier" and config.model.embedding_init_std is None),
)
DAMPED = Effect(
    "model.embedding_grad_scale is not 1",
    ("model.embedding_grad_scale",),
    lambda config: config.model.embedding_grad_scale != 1,
)

# --- layout and data ------------------------------------------------------------------------------------------------------

SEVERAL_STAGES = Effect(
    "parallel.pipeline_parallel_size or parallel.virtual_pipeline_size is above 1",
    ("parallel.pipeline_parallel_size", "parallel.virtual_pipeline_size"),
    lambda config: max(config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_size) > 1,
)
NOT_DOUBLE = where("train.precision", "bf16", "fp16", "fp32")
SHARDED = where("parallel.zero_stage", 1, 2, 3)
BLANKS = where("data.objective", "glm")
DRAWN = BLANKS & where("data.glm.objective_mix.mode", "sample")
SENTENCES = BLANKS & above("data.glm.objective_mix.sentence", 0)
SPANS = BLANKS & above("data.glm.objective_mix.document", 0)
ENDS = BLANKS & Effect(
    "data.glm.objective_mix.sentence or data.glm.short_seq_prob is above 0",
    ("data.glm.objective_mix.sentence", "data.glm.short_seq_prob"),
    lambda config: max(config.data.glm.objective_mix.sentence, config.data.glm.short_seq_prob) > 0,
)
NOISY = BLANKS & Effect(
    "data.glm.objective_mix.blank or data.glm.blank.single_span_prob is above 0",
    ("data.glm.objective_mix.blank", "data.glm.blank.single_span_prob"),
    lambda config: max(config.data.glm.objective_mix.blank, config.data.glm.blank.single_span_prob) > 0,
)
TASK_MASKS = BLANKS & where("data.glm.task_masks", True)
NOISE = BLANKS & above("data.glm.blank.decoder_noise_prob", 0)
SECOND_POSITIONS = BLANKS & where("model.position", "learned_2d", "rope_2d")

# --- optimizer, run and checkpoints ---------------------------------------------------------------------------------------

DECAYS = where("optim.lr_schedule", "cosine", "linear", "wsd")
WSD = where("optim.lr_schedule", "wsd")
ADAM, SGD = where("optim.name", "adamw", "adam"), where("optim.name", "sgd")
IN_STEPS = Effect("train.tokens is null", ("train.tokens",), lambda config: config.train.tokens is None)
ROLLS_BACK = where("train.on_spike", "rollback")
BF16, FP16 = where("train.precision", "bf16"), where("train.precision", "fp16")
KEPT = above("checkpoint.keep", 0)
COPIED = above("checkpoint.in_memory_every", 0)
COMPARED = above("log.stragglers_every", 0)
FROM_A_PATH = Effect(
    "checkpoint.resume is a path", ("checkpoint.resume",), lambda config: config.checkpoint.resume not in ("auto", "never")
)
