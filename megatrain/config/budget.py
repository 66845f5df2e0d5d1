"""How much a run trains: the samples of each update, and how many updates there are. Pure functions of the samples consumed.

train.steps              updates
train.tokens             instead: as many updates as it takes to have consumed so many tokens
train.batch_ramp         [start, increment, samples]: the global batch begins at `start` sequences and grows by `increment` at a
                         time, evenly over the first `samples`, to train.global_batch_size (GPT-3, arXiv:2005.14165, appendix B)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    """Updates of the whole run."""
    whole_batches: float = 0.0
    """Samples of the whole run in units of the full batch: what learning rates are a function of."""

    def batch_size(self, consumed: int) -> int:
        """Sequences of the update that comes after `consumed` samples."""
        if consumed >= self.ramp_samples:
            return self.full
        increments = -(-(self.full - self.start) // self.increment)
        return min(self.full, self.start + int(consumed * increments / self.ramp_samples) * self.increment)

    def consumed(self, steps: int) -> int:
        """Samples that so many updates consume."""
        done = samples = 0
        while done < steps and samples < self.ramp_samples:
            samples += self.batch_size(samples)
            done += 1
        return samples + (steps - done) * self.full

    def steps_to(self, samples: int) -> int:
        """Updates that it takes to consume at least so many samples."""
        done = consumed = 0
        while consumed < min(samples, self.ramp_samples):
            consumed += self.batch_size(consumed)
            done += 1
        return done + max(0, -(-(samples - consumed) // self.full))


@lru_cache(maxsize=8)
def budget_of(config: Config) -> Budget:
    """The budget of a config."""
    train = config.train
    start, increment, samples = train.batch_ramp or (train.global_batch_size, 1, 0)
    budget = Budget(train.global_batch_size, start, increment, samples, train.steps)
    if train.tokens is not None:
        budget = replace(budget, steps=budget.steps_to(math.ceil(train.tokens / config.model.seq_length)))
    return replace(budget, whole_batches=budget.consumed(budget.steps) / budget.full)
