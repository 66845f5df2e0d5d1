"""How much a run trains: the samples of each update, and how many updates there are. Pure functions of the samples consumed.

train.steps              updates, whatever their batch
train.tokens             instead: as many updates as it takes to have consumed so many tokens
train.batch_ramp         [start, increment, samples]: the global batch begins at `start` sequences and grows by `increment` at a
                         time, evenly over the first `samples`, to train.global_batch_size (GPT-3, arXiv:2005.14165, appendix B)

Schedules are counted in what the length is given in: updates or tokens. So another batch, ramp or number of replicas bends none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatrain.config.schema import Config


@dataclass(frozen=True)
class Budget:
    """The samples of each update, and how many updates there are."""

    full: int
    """Sequences of an update once the ramp is over."""
    start: int
    increment: int
    ramp_samples: int
    steps: int
    """Updates of the whole run, where `samples` does not say."""
    samples: int | None = None
    """Of the whole run, where its length is given in tokens: the last update is the one that reaches them."""

    def batch_size(self, consumed: int) -> int:
        """Sequences of the update that comes after `consumed` samples."""
        if consumed >= self.ramp_samples:
            return self.full
        increments = -(-(self.full - self.start) // self.increment)
        return min(self.full, self.start + consumed * increments // self.ramp_samples * self.increment)

    def consumed(self, steps: int, since: int = 0) -> int:
        """Samples after so many updates more than consumed `since`."""
        done, samples = 0, since
        while done < steps and samples < self.ramp_samples:
            alike = min(self._alike(samples), steps - done)
            samples += alike * self.batch_size(samples)
            done += alike
        return samples + (steps - done) * self.full

    def steps_to(self, samples: int, since: int = 0) -> int:
        """Updates that it takes to go from `since` samples consumed to at least so many."""
        done, consumed = 0, since
        while consumed < min(samples, self.ramp_samples):
            batch = self.batch_size(consumed)
            alike = min(self._alike(consumed), -(-(samples - consumed) // batch))
            consumed += alike * batch
            done += alike
        return done + max(0, -(-(samples - consumed) // self.full))

    def _alike(self, consumed: int) -> int:
        """Updates after so many samples, within the ramp, until its batch grows, so that a long ramp is counted in few steps."""
        increments = -(-(self.full - self.start) // self.increment)
        grown = consumed * increments // self.ramp_samples + 1
        next_batch = -(-grown * self.ramp_samples // increments) if increments else self.ramp_samples
        return -(-(next_batch - consumed) // self.batch_size(consumed))

    def total_steps(self, done: int = 0, consumed: int = 0) -> int:
        """Updates of the whole run, `done` of which have consumed so many samples."""
        return self.steps if self.samples is None else done + self.steps_to(self.samples, consumed)


@lru_cache(maxsize=8)
def budget_of(config: Config) -> Budget:
    """The budget of a config."""
    train = config.train
    samples = None if train.tokens is None else math.ceil(train.tokens / config.model.seq_length)
    return Budget(train.global_batch_size, *_ramp(train.global_batch_size, train.batch_ramp), train.steps, samples)


DEFAULT_WARMUP = 100
"""Steps, in a run that is long enough."""


def warmup_of(config: Config) -> int:
    """Steps of a config's warm-up: as given, or as many as suit the length of the run, and with wsd end before the decay begins."""
    given, steps = config.optim.warmup_steps, budget_of(config).total_steps()
    if given is not None:
        return given
    stays = 1 - config.optim.decay_fraction if config.optim.lr_schedule == "wsd" else 1
    return min(DEFAULT_WARMUP, steps // 10, int(steps * stays))


@dataclass(frozen=True)
class Gauge:
    """What the schedules of a run with train.tokens are measured by: tokens, with the batch that the run began with."""

    first: int
    """Of its first update."""
    full: int
    """Of an update once the ramp is over."""
    warmup_steps: int
    warmup: int
    """Of so many first updates."""


def gauge_of(config: Config) -> Gauge:
    """The gauge of a run that begins with a config."""
    train = config.train
    return gauge(train.global_batch_size, train.batch_ramp, warmup_of(config), config.model.seq_length)


def gauge(batch: int, ramp: tuple[int, int, int] | None, warmup_steps: int, seq_length: int) -> Gauge:
    """The gauge of a run that begins with such batches (sequences), warm-up (updates) and samples (tokens)."""
    budget = Budget(batch, *_ramp(batch, ramp), warmup_steps)
    first, warmup = budget.batch_size(0), budget.consumed(warmup_steps)
    return Gauge(first * seq_length, batch * seq_length, warmup_steps, warmup * seq_length)


def _ramp(batch: int, ramp: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(start, increment, samples) of a ramp; one that is over at once where there is none."""
    return (batch, 1, 0) if ramp is None else ramp
