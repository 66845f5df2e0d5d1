"""Looks ahead for what a config of a preparation names and lacks, before anything is read: files, rules, languages, a tokenizer.

A worker would find it too, hours later, when it first needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from megatrain.config.source import ConfigError
from megatrain.corpus.judging import AUTO, RulesByKind
from megatrain.corpus.ngram_choices import LanguageModelConfig
from megatrain.corpus.perplexity import CODE, PerplexityScorer, read_thresholds
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.revision import paths_in
from megatrain.data.prepare.text_store import tokens_around
from megatrain.data.tokenizer import load_tokenizer
from megatrain.files import opened_plain

Ids = list[Any] | None
"""Values for JSON that decide on ids; None without a tokenizer."""
LANGUAGE = re.compile(r"[a-z]{2,3}")
"""A code of ISO 639: two letters, or three of a language that has no two."""


def require_languages(config: PrepareConfig) -> None:
    """Raise ConfigError for a language that is no code: it would have no rules, or be that of no document."""
    for key, language in _languages(config):
        if not LANGUAGE.fullmatch(language):
            raise ConfigError(
                f"{key}={language!r} is no language's code, which has two or three small letters, as ISO 639-1 has them. Use for example "
                "en or zh."
            )


def _languages(config: PrepareConfig) -> Iterator[tuple[str, str]]:
    """(key, value) of each language that a config names."""
    for number, source in enumerate(config.read.sources):
        if source.language != AUTO:
            yield f"read.sources[{number}].language", source.language
    yield from (("language.keep", code) for code in config.language.keep)
    models: tuple[LanguageModelConfig, ...] = config.perplexity.models
    yield from (
        (f"perplexity.models[{i}].language", model.language) for i, model in enumerate(models) if model.language != CODE
    )


def require_rules(config: PrepareConfig) -> None:
    """Raise ConfigError for rules and thresholds of a source that there are none of, or that no document could meet."""
    for number, source in enumerate(config.read.sources):
        try:
            RulesByKind(source, config.filter)
        except ValueError as error:
            raise ConfigError(f"read.sources[{number}], {source.name}: {error}.") from None


def require_files(config: PrepareConfig) -> None:
    """Raise ConfigError for a file that a config names and that cannot be read, but for input, which readers know more of."""
    sections: dict[str, Any] = {
        "clean": config.clean,
        "dedup": config.dedup,
        "perplexity": config.perplexity,
        "augment": config.augment,
    }
    for key, path in chain.from_iterable(paths_in(section, name) for name, section in sections.items()):
        try:
            with opened_plain(path):
                pass
        except OSError as error:
            raise ConfigError(
                f"{key}: {path!r} cannot be read ({error.strerror or error}; relative paths start at {Path.cwd()})."
            ) from None


def require_models(config: PrepareConfig) -> Ids:
    """Open the tokenizer that is named, and thresholds of perplexity; all that decides on the ids of a store by that tokenizer, files
    beside it included. Raises ValueError for what does not fit.
    """
    PerplexityScorer(config.perplexity)
    if config.perplexity.thresholds is not None:
        read_thresholds(config.perplexity.thresholds, config.perplexity)
    if config.tokenize.tokenizer is None:
        return None
    encoder = load_tokenizer(config.tokenize.tokenizer, config.tokenize.eod, config.tokenize.bos)
    if config.tokenize.append_eod and encoder.eod is None:
        raise ConfigError(
            f"tokenize.append_eod=true, and no token of {encoder.label} is known to end a document. Name one "
            f"(tokenize.eod=TOKEN, or an id out of 0..{encoder.vocab_size - 1}), or set tokenize.append_eod=false."
        )
    around = tokens_around(encoder, config.tokenize.append_eod)
    return [encoder.identity, around.begin, around.end]
