"""Learning rate and weight decay as pure functions of where a run is, counted so that another batch cannot bend them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatrain.config.schema import OptimConfig


@dataclass(frozen=True)
class Position:
    """Where in its schedules a run is: in updates, where train.steps gives its length, or in tokens, where train.tokens does."""

    done: float
    """Before the update that comes next."""
    total: float
    """At the end of the run."""
    warmup: float
    """At the end of the warm-up."""
    first: float = 1
    """Of the first update."""
    full: float = 1
    """Of an update once a ramp of the batch is over."""


def weight_decay(config: OptimConfig, at: Position) -> float:
    """Decay of the next update: linear from weight_decay to weight_decay_end at the last one, constant without."""
    if config.weight_decay_end is None:
        return config.weight_decay
    progress = min(1.0, at.done / max(at.full, at.total - at.full))
    return config.weight_decay + (config.weight_decay_end - config.weight_decay) * progress


def learning_rate(config: OptimConfig, at: Position) -> float:
    """Rate of the next update.

    Linear warm-up (the first update has lr / warmup_steps, not 0; none has more than lr), then `lr_schedule` from lr to min_lr:
    cosine (arXiv:1608.03983), linear, wsd (arXiv:2404.06395: constant, then linear over the last `decay_fraction`), constant.
    """
    if at.done < at.warmup:
        return min(config.lr, config.lr * (at.done + at.first) / at.warmup)
    progress = min(1.0, (at.done - at.warmup) / (at.total - at.warmup)) if at.total > at.warmup else 1.0
    span = config.lr - config.min_lr
    if config.lr_schedule == "cosine":
        return min(config.lr, config.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.lr_schedule == "linear":
        return config.lr - span * progress
    if config.lr_schedule == "wsd":
        decay = config.decay_fraction * at.total
        into_decay = at.done - (at.total - decay)
        return config.lr if into_decay <= 0 else config.lr - span * min(1.0, into_decay / decay)
    return config.lr
