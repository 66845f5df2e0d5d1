"""The length of a run and its batch sizes: samples of each update, number of updates. Pure functions of the samples consumed.

train.steps              number of updates, whatever their batch
train.tokens             instead: as many updates as it takes to consume this many tokens
train.batch_ramp         [start, increment, samples]: the global batch begins at `start` sequences and grows by `increment` at a
                         time, evenly over the first `samples`, to train.global_batch_size (GPT-3, arXiv:2005.14165, appendix B)

Learning-rate schedules are counted in the unit that the length is given in, updates or tokens. With train.tokens, another batch size,
ramp or number of replicas therefore does not bend the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatrain.config.schema import Config, OptimConfig


@dataclass(frozen=True)
class Budget:
    """The samples of each update, and how many updates there are."""

    full: int
    """Sequences of an update after the ramp."""
    start: int
    increment: int
    ramp_samples: int
    steps: int
    """Updates of the whole run; unused where `samples` is given."""
    samples: int | None = None
    """Samples of the whole run, where its length is given in tokens: the last update is the one that reaches them."""

    def batch_size(self, consumed: int) -> int:
        """Sequences of the update that follows `consumed` samples."""
        if consumed >= self.ramp_samples:
            return self.full
        increments = -(-(self.full - self.start) // self.increment)
        return min(self.full, self.start + consumed * increments // self.ramp_samples * self.increment)

    def consumed(self, steps: int, since: int = 0) -> int:
        """Samples consumed after `steps` more updates, starting from `since`."""
        done, samples = 0, since
        while done < steps and samples < self.ramp_samples:
            alike = min(self._alike(samples), steps - done)
            samples += alike * self.batch_size(samples)
            done += alike
        return samples + (steps - done) * self.full

    def steps_to(self, samples: int, since: int = 0) -> int:
        """Updates needed to go from `since` samples consumed to at least `samples`."""
        done, consumed = 0, since
        while consumed < min(samples, self.ramp_samples):
            batch = self.batch_size(consumed)
            alike = min(self._alike(consumed), -(-(samples - consumed) // batch))
            consumed += alike * batch
            done += alike
        return done + max(0, -(-(samples - consumed) // self.full))

    def _alike(self, consumed: int) -> int:
        """Updates, after `consumed` samples within the ramp, that have the same batch size: a long ramp is counted in few steps."""
        increments = -(-(self.full - self.start) // self.increment)
        grown = consumed * increments // self.ramp_samples + 1
        next_batch = -(-grown * self.ramp_samples // increments) if increments else self.ramp_samples
        return -(-(next_batch - consumed) // self.batch_size(consumed))

    def total_steps(self, done: int = 0, consumed: int = 0) -> int:
        """Updates of the whole run, of which `done` have consumed `consumed` samples."""
        return self.steps if self.samples is None else done + self.steps_to(self.samples, consumed)


@lru_cache(maxsize=8)
def budget_of(config: Config) -> Budget:
    """The budget of a config."""
    train = config.train
    samples = None if train.tokens is None else math.ceil(train.tokens / config.model.seq_length)
    return Budget(train.global_batch_size, *_ramp(train.global_batch_size, train.batch_ramp), train.steps, samples)


DEFAULT_WARMUP = 100
"""Steps of warm-up where optim.warmup_steps is null and the run is long enough."""


def warmup_of(config: Config) -> int:
    """Steps of warm-up: optim.warmup_steps, or if null a number that suits the run's length and, with wsd, ends before the decay begins."""
    given, steps = config.optim.warmup_steps, budget_of(config).total_steps()
    if given is not None:
        return given
    stays = 1 - config.optim.decay_fraction if config.optim.lr_schedule == "wsd" else 1
    return min(DEFAULT_WARMUP, steps // 10, int(steps * stays))


@dataclass(frozen=True)
class Gauge:
    """With train.tokens, a run's schedules are measured in tokens: this holds the batch and warm-up, in tokens, that the run began with."""

    first: int
    """Tokens of the run's first update."""
    full: int
    """Tokens of an update after the ramp."""
    warmup_steps: int
    warmup: int
    """Tokens of the first `warmup_steps` updates."""


def gauge_of(config: Config) -> Gauge:
    """The gauge of a run that begins with a config."""
    train = config.train
    return gauge(train.global_batch_size, train.batch_ramp, warmup_of(config), config.model.seq_length)


def gauge(batch: int, ramp: tuple[int, int, int] | None, warmup_steps: int, seq_length: int) -> Gauge:
    """The gauge of a run that begins with global batches of `batch` sequences; warmup_steps in updates, seq_length in tokens a sample."""
    budget = Budget(batch, *_ramp(batch, ramp), warmup_steps)
    first, warmup = budget.batch_size(0), budget.consumed(warmup_steps)
    return Gauge(first * seq_length, batch * seq_length, warmup_steps, warmup * seq_length)


def _ramp(batch: int, ramp: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(start, increment, samples) of a ramp; without one, a ramp that is over at once."""
    return (batch, 1, 0) if ramp is None else ramp


# Learning rate and weight decay as pure functions of where a run is, counted so that another batch cannot bend them.


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
    """Size of the first update, in that unit."""
    full: float = 1
    """Size of an update once a ramp of the batch is over."""


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
