"""The rules of `data.glm`: numbers that contradict each other."""

from __future__ import annotations

from megatrain.config.schema import Config
from megatrain.config.source import ConfigError


def require_glm(config: Config) -> None:
    """Raise ConfigError at the first rule broken."""
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


def require_glm_text(config: Config) -> None:
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
