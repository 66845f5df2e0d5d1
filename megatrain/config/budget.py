"""The length of a run, its batches, learning rate and weight decay: pure functions of the steps taken and the samples consumed.

train.steps              number of updates, whatever their batch
train.tokens             instead: as many updates as it takes to consume this many tokens
train.batch_ramp         [start, increment, samples]: the global batch begins at `start` sequences and grows by `increment` at a
                         time, evenly over the first `samples`, to train.global_batch_size (GPT-3, arXiv:2005.14165, appendix B)

Learning-rate schedules are counted in the unit that the length is given in, updates or tokens. With train.tokens, another batch size,
ramp or number of replicas therefore does not bend the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatrain.config.schema import Config, OptimConfig

DEFAULT_WARMUP = 100
"""Steps of warm-up where optim.warmup_steps is null and the run is long enough."""


@dataclass(frozen=True)
class Budget:
    """The samples of each update, and how many updates there are."""

    full: int
    """Sequences of an update after the ramp."""
    start: int
    """Sequences of the first update."""
    increment: int
    ramp_samples: int
    """Samples of the ramp; 0 where all updates are alike."""
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
        for batch, count in self._stretches(since):
            alike = int(min(count, steps))
            since, steps = since + alike * batch, steps - alike
            if steps == 0:
                break
        return since

    def steps_to(self, samples: int, since: int = 0) -> int:
        """Updates needed to go from `since` samples consumed to at least `samples`."""
        done = 0
        for batch, count in self._stretches(since):
            alike = int(min(count, max(0, -(-(samples - since) // batch))))
            since, done = since + alike * batch, done + alike
            if since >= samples:
                break
        return done

    def total_steps(self, done: int = 0, consumed: int = 0) -> int:
        """Updates of the whole run, of which `done` have consumed `consumed` samples."""
        return self.steps if self.samples is None else done + self.steps_to(self.samples, consumed)

    def _stretches(self, consumed: int) -> Iterator[tuple[int, float]]:
        """(sequences, updates in a row that have so many) after `consumed` samples, so that a long ramp is counted in few steps."""
        increments = -(-(self.full - self.start) // self.increment)
        while consumed < self.ramp_samples:
            batch, grown = self.batch_size(consumed), consumed * increments // self.ramp_samples + 1
            grows = -(-grown * self.ramp_samples // increments) if increments else self.ramp_samples
            alike = -(-(grows - consumed) // batch)
            yield batch, alike
            consumed += alike * batch
        yield self.full, math.inf


@lru_cache(maxsize=8)
def budget_of(config: Config) -> Budget:
    """The budget of a config."""
    train = config.train
    samples = None if train.tokens is None else math.ceil(train.tokens / config.model.seq_length)
    return Budget(train.global_batch_size, *(train.batch_ramp or (train.global_batch_size, 1, 0)), train.steps, samples)


def warmup_steps(config: Config) -> int:
    """Steps of warm-up: optim.warmup_steps, or if null a number that suits the run's length and, with wsd, ends before the decay begins."""
    given, steps = config.optim.warmup_steps, budget_of(config).total_steps()
    if given is not None:
        return given
    stays = 1 - config.optim.decay_fraction if config.optim.lr_schedule == "wsd" else 1
    return min(DEFAULT_WARMUP, steps // 10, int(steps * stays))


@dataclass(frozen=True)
class WarmUp:
    """Warm-up and batch that a run began with: with train.tokens they stay the measure of its schedules, whatever batch it goes on with."""

    first: int
    """Tokens of the run's first update."""
    full: int
    """Tokens of an update after the ramp."""
    warmup_steps: int
    warmup: int
    """Tokens of the first `warmup_steps` updates."""


def warmup_of(config: Config) -> WarmUp:
    """The warm-up of a run that begins with a config."""
    budget, steps, length = budget_of(config), warmup_steps(config), config.model.seq_length
    return WarmUp(budget.batch_size(0) * length, budget.full * length, steps, budget.consumed(steps) * length)


@dataclass(frozen=True)
class Position:
    """Where a run's schedules are before an update: in updates with train.steps, in tokens with train.tokens."""

    done: float
    """Done before the update."""
    total: float
    """Done at the end of the run."""
    warmup: float
    """Done at the end of the warm-up."""
    first: float = 1
    """Size of the first update, in that unit."""
    full: float = 1
    """Size of an update once a ramp of the batch is over."""


def position(config: Config, began: WarmUp, step: int, samples: int) -> Position:
    """The place of the update that follows `step` steps, skipped ones too, of `samples` sequences in all."""
    if config.train.tokens is None:
        return Position(step, config.train.steps, began.warmup_steps)
    return Position(samples * config.model.seq_length, config.train.tokens, began.warmup, began.first, began.full)


def weight_decay(config: OptimConfig, at: Position) -> float:
    """Decay of the next update: linear from weight_decay to weight_decay_end at the last one, constant without."""
    first, last = config.weight_decay, config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return first + (last - first) * min(1.0, at.done / max(at.full, at.total - at.full))


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
