"""The rules between the keys of a blend: data.train with its weights and epochs, data.schedule, data.replay."""

from __future__ import annotations

import difflib
from collections import Counter
from itertools import pairwise

from megatrain.config.budget import budget_of
from megatrain.config.keys import choices, show
from megatrain.config.pieces import at_home, begin_of, end_of
from megatrain.config.schema import Config, CorpusConfig, WeightsConfig
from megatrain.config.source import ConfigError

_OF_TRAIN = ("name", "epochs", "max_epochs", "old")


def require_blend(config: Config) -> None:
    """Raise ConfigError at the first rule broken."""
    for i, corpus in enumerate(config.data.valid):
        for key in _OF_TRAIN:
            if value := getattr(corpus, key):
                raise ConfigError(
                    f"data.valid[{i}].{key}={show(value)} has no effect: it is for data.train alone. Leave it out."
                )
    _require_epochs(config)
    _require_replay(config)
    _require_names(config)
    for number in range(len(config.data.schedule)):
        _require_place(config, number)
        _require_weights(config, number)
    _require_order(config)


def _require_epochs(config: Config) -> None:
    replaced = bool(config.data.schedule) and begin_of(config.data.schedule[0], config) == 0
    for i, corpus in enumerate(config.data.train):
        key = f"data.train[{i}]"
        if corpus.epochs is not None and corpus.max_epochs is not None:
            raise ConfigError(
                f"{key} has epochs={show(corpus.epochs)} and max_epochs={show(corpus.max_epochs)}: the first says how often it is seen, "
                "the second how often at most. Leave one out."
            )
        if corpus.weight != 1 and corpus.epochs is not None:
            raise ConfigError(
                f"{key}.weight={show(corpus.weight)} has no effect: its share of the samples follows from epochs={show(corpus.epochs)}. "
                f"Leave it out, or use max_epochs={show(corpus.epochs)} in the place of epochs."
            )
        if corpus.weight != 1 and replaced:
            raise ConfigError(
                f"{key}.weight={show(corpus.weight)} has no effect: data.schedule[0] has other weights from the first step on. Leave it "
                "out."
            )


def _require_replay(config: Config) -> None:
    data = config.data
    old = [corpus for corpus in data.train if corpus.old]
    if data.replay is None:
        if old:
            raise ConfigError(
                f"data.train[{data.train.index(old[0])}].old=true has no effect: it has one when data.replay is given. Use for example "
                "data.replay=0.05, or leave it out."
            )
        return
    if not old or len(old) == len(data.train):
        raise ConfigError(
            f"data.replay={show(data.replay)} is the share of old corpora beside new ones, and data.train has {len(old)} with old: true "
            f"among {len(data.train)}. Mark those of the earlier training, as [{{path: data/web, old: true}}, {{path: data/law}}]."
        )
    even = next((i for i, corpus in enumerate(data.train) if corpus.epochs is not None), None)
    if even is not None:
        raise ConfigError(
            f"data.train[{even}].epochs and data.replay={show(data.replay)} both say what share of the samples corpora have. Use "
            f"data.train[{even}].max_epochs in the place of epochs, or leave one out."
        )


def _require_names(config: Config) -> None:
    """Check that weights can tell corpora apart, and that there are some to weigh."""
    if config.data.schedule and all(corpus.epochs is not None for corpus in config.data.train):
        raise ConfigError(
            "data.schedule has no effect: every corpus of data.train has `epochs`, from which its share of the samples follows. Leave it "
            "out, or use max_epochs in the place of epochs."
        )
    labels = Counter(corpus.label for corpus in config.data.train)
    twice = [label for label, count in labels.items() if count > 1]
    named = any(corpus.name in twice for corpus in config.data.train if corpus.name)
    if twice and (config.data.schedule or named):
        raise ConfigError(
            f"data.train has {labels[twice[0]]} corpora of the name {twice[0]}. Give each a `name` of its own, as "
            f"{{path: PREFIX, name: {twice[0].rpartition('/')[2]}2}}."
        )


def _require_place(config: Config, number: int) -> None:
    """Check that a piece of the schedule says once where it begins, and that the run comes there."""
    key, piece = f"data.schedule[{number}]", config.data.schedule[number]
    if sum(value is not None for value in (piece.from_share, piece.from_step, piece.from_tokens)) != 1:
        raise ConfigError(
            f"{key} begins at {piece.place or 'no place'}. Give one of from_share: 0.9 (a share of the run), from_step: 900 (steps done) "
            "and from_tokens: 9.0e+8 (tokens consumed)."
        )
    steps, end = budget_of(config).total_steps(), end_of(config)
    if begin_of(piece, config) >= end:
        raise ConfigError(
            f"{key} begins at {piece.place}, where the run of {steps} steps and {end * config.model.seq_length} tokens is over. Use a "
            "place before, such as from_share: 0.9, or a longer run."
        )


def _require_weights(config: Config, number: int) -> None:
    """Check that a piece of the schedule names each corpus that has a weight, once, and no other."""
    key, piece, corpora = f"data.schedule[{number}].weights", config.data.schedule[number], config.data.train
    names = Counter(at_home(name) for name, _ in piece.weights)
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"{key} names {name} {count} times. Keep one of them.")
        _require_known(key, name, corpora)
    left = [corpus for corpus in corpora if corpus.epochs is None and corpus.label not in names]
    if left:
        raise ConfigError(
            f"{key} does not name {left[0].label}, a corpus of data.train. Write {{{', '.join(_weights(piece, left))}}}, or 0 for what "
            "is left out."
        )
    if not any(weight for _, weight in piece.weights):
        raise ConfigError(f"{key} has no weight above 0, so nothing would be read. Give one corpus a weight of 1.")


def _require_known(key: str, name: str, corpora: tuple[CorpusConfig, ...]) -> None:
    found = next((corpus for corpus in corpora if corpus.label == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [corpus.label for corpus in corpora], n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {choices(corpus.label for corpus in corpora)}."
        raise ConfigError(f"{key} names {name}, and no corpus of data.train has that name or path. {hint}")
    if found.epochs is not None:
        raise ConfigError(
            f"{key} names {name}, whose share of the samples follows from epochs={show(found.epochs)}. Leave it out of the weights, or use "
            f"max_epochs={show(found.epochs)} in the place of epochs."
        )


def _weights(piece: WeightsConfig, left: list[CorpusConfig]) -> list[str]:
    """The pairs of a piece, with those that it lacks, as in YAML."""
    return [f"{name}: {weight:g}" for name, weight in (*piece.weights, *((corpus.label, corpus.weight) for corpus in left))]


def _require_order(config: Config) -> None:
    """Check that each piece of the schedule begins behind the one before."""
    pieces = config.data.schedule
    places = [begin_of(piece, config) for piece in pieces]
    for number, (before, here) in enumerate(pairwise(places), 1):
        if here <= before:
            length = config.model.seq_length
            raise ConfigError(
                f"data.schedule[{number}] begins at {pieces[number].place} (token {here * length}), and the one before it at "
                f"{pieces[number - 1].place} (token {before * length}). List them in the order of the run, each at a place of its own."
            )
