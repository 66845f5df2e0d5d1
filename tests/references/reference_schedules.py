"""Learning-rate schedules written a second time, from their formulas, for the tests; imports nothing from megatrain."""

from __future__ import annotations

from math import cos, pi


def reference_rates(
    schedule: str, steps: int, lr: float, min_lr: float, warmup_steps: int = 0, decay_fraction: float = 0.1
) -> list[float]:
    """Learning rate of each of `steps` updates, counted from 0.

    Warm-up: lr (k + 1) / warmup_steps. Then cosine and linear fall from lr towards min_lr over what remains; wsd falls linearly
    over the last decay_fraction of all steps; constant stays.
    """
    rates = [lr * (k + 1) / warmup_steps for k in range(min(warmup_steps, steps))]
    for k in range(warmup_steps, steps):
        t = (k - warmup_steps) / (steps - warmup_steps)
        left = (steps - k) / (decay_fraction * steps) if decay_fraction else 1.0
        share_of_lr = {"cosine": (1 + cos(pi * t)) / 2, "linear": 1 - t, "wsd": min(1.0, left), "constant": 1.0}[schedule]
        rates.append(share_of_lr * lr + (1 - share_of_lr) * min_lr)
    return rates
