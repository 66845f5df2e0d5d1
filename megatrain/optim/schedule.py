"""Learning rate and weight decay as pure functions of the samples consumed, so that resuming or changing the batch size cannot lose it."""

from __future__ import annotations

import math

from megatrain.config.schema import OptimConfig


def weight_decay(config: OptimConfig, consumed_samples: int, samples_per_step: int, total_steps: float) -> float:
    """Decay of the update that comes after `consumed_samples`: linear from weight_decay to weight_decay_end, constant without."""
    if config.weight_decay_end is None:
        return config.weight_decay
    progress = min(1.0, consumed_samples / samples_per_step / max(1, total_steps - 1))
    return config.weight_decay + (config.weight_decay_end - config.weight_decay) * progress


def learning_rate(config: OptimConfig, consumed_samples: int, samples_per_step: int, total_steps: float) -> float:
    """Rate of the update that comes after `consumed_samples`, of `total_steps` steps of `samples_per_step`.

    Linear warm-up over `warmup_steps` (the first update has lr / warmup_steps, not 0), then `lr_schedule` from lr to min_lr:
    cosine (arXiv:1608.03983), linear, wsd (arXiv:2404.06395: constant, then linear over the last `decay_fraction`), constant.
    """
    step = consumed_samples / samples_per_step
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    span = config.lr - config.min_lr
    if config.lr_schedule == "cosine":
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "linear":
        return config.lr - span * progress
    if config.lr_schedule == "wsd":
        decay_steps = config.decay_fraction * total_steps
        into_decay = step - (total_steps - decay_steps)
        return config.lr if into_decay <= 0 else config.lr - span * min(1.0, into_decay / decay_steps)
    return config.lr
