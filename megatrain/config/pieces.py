"""The weights of the corpora over a run, in pieces: those of data.train from the first sample on, then those of data.schedule.

A piece begins at a sample, so that a batch stays a function of the samples consumed; that sample follows from the share, step or number of
tokens in the config by the run's budget, from where the run is, as learning rates do.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction

from megatrain.config.budget import budget_of
from megatrain.config.schema import Config, DataConfig, WeightsConfig


@dataclass(frozen=True)
class Weighting:
    """Weights that hold from a sample on."""

    first: int
    weights: tuple[float, ...]
    """The weight of each corpus of data.train; 0 for those without samples, and for those whose share follows from their epochs."""


def begin_of(piece: WeightsConfig, config: Config, step: int = 0, consumed: int = 0) -> int:
    """First sample of a piece of data.schedule, of a run that has taken `step` steps on `consumed` samples; no more than that if it has
    begun.
    """
    budget, train, length = budget_of(config), config.train, config.model.seq_length
    if piece.from_tokens is not None:
        return math.ceil(as_written(piece.from_tokens) / length)
    if piece.from_share is None:
        at = piece.from_step or 0
    elif train.tokens is not None:
        return math.ceil(as_written(piece.from_share) * as_written(train.tokens) / length)
    else:
        at = math.ceil(as_written(piece.from_share) * train.steps)
    return budget.consumed(at - step, consumed) if at > step else min(consumed, budget.consumed(at))


def end_of(config: Config, step: int = 0, consumed: int = 0) -> int:
    """Samples of the whole run, of which `step` steps have taken `consumed`."""
    budget = budget_of(config)
    return budget.consumed(max(0, budget.total_steps(step, consumed) - step), consumed)


def as_written(number: float) -> Fraction:
    """The number as it was written: 0.1 is one tenth, not the nearest binary fraction."""
    return Fraction(repr(float(number)))


def pieces_of(config: Config, step: int = 0, consumed: int = 0) -> tuple[Weighting, ...]:
    """All pieces of a run that has taken `step` steps on `consumed` samples; the first begins at sample 0."""
    data = config.data
    given = [0.0 if corpus.epochs is not None else corpus.weight for corpus in data.train]
    found = [Weighting(0, _with_replay(data, given))]
    for piece in data.schedule:
        named = {at_home(name): weight for name, weight in piece.weights}
        weights = [0.0 if corpus.epochs is not None else named[corpus.label] for corpus in data.train]
        first = max(found[-1].first, begin_of(piece, config, step, consumed))
        if first == found[-1].first:
            found.pop()
        found.append(Weighting(first, _with_replay(data, weights)))
    return tuple(found)


def at_home(name: str) -> str:
    """The label of a corpus that weights name, which may be a path that begins with ~."""
    return os.path.expanduser(name)  # noqa: PTH111  (a Path would make another text of `./a`)


def _with_replay(data: DataConfig, weights: list[float]) -> tuple[float, ...]:
    """Weights by which old corpora together have data.replay of the samples, each group in its own proportions."""
    old = [corpus.old for corpus in data.train]
    sums = {group: sum(weight for weight, of in zip(weights, old, strict=True) if of == group) for group in (False, True)}
    if data.replay is None or not all(sums.values()):
        return tuple(weights)
    share = {False: (1 - data.replay) / sums[False], True: data.replay / sums[True]}
    return tuple(weight * share[of] for weight, of in zip(weights, old, strict=True))
