"""The rules of learning-rate schedules: the warm-up ends within the run, and before the decay begins."""

from __future__ import annotations

from collections.abc import Callable

from megatrain.config.budget import Gauge, budget_of, gauge_of
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError


def require_schedules(config: Config, begun: Callable[[], Gauge | None]) -> None:
    """Raise ConfigError at the first rule broken. begun: the gauge of the run that `config` continues; called only where it matters."""
    optim = config.optim
    if optim.lr_schedule != "constant" and optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}. Use optim.min_lr={optim.lr / 10:.3g}.")
    problem = _problem(config, gauge_of(config))
    if problem is not None and config.train.tokens is not None:  # in tokens, a changed batch does not make the run shorter
        kept = begun()
        problem = problem if kept is None else _problem(config, kept)
    if problem is not None:
        raise ConfigError(problem)


def _problem(config: Config, gauge: Gauge) -> str | None:
    """The error if the warm-up does not fit into the run's length, both in the unit that schedules are counted in; None if it fits."""
    optim, budget, tokens = config.optim, budget_of(config), config.train.tokens
    steps = budget.total_steps()
    what = f"train.steps={steps}" if tokens is None else f"the {steps} steps of train.tokens={tokens:g}"
    warmup, total = (gauge.warmup_steps, steps) if tokens is None else (gauge.warmup, tokens)
    if warmup >= total:
        return (
            f"optim.warmup_steps={gauge.warmup_steps} is not less than {what}. "
            f"Use optim.warmup_steps={steps // 10}, or more steps."
        )
    if optim.lr_schedule == "wsd" and warmup + optim.decay_fraction * total > total:
        room = total - optim.decay_fraction * total
        fits = int(room) if tokens is None else budget.steps_to(int(room / config.model.seq_length) + 1) - 1
        return (
            f"the last optim.decay_fraction={optim.decay_fraction} of {what} begins before "
            f"optim.warmup_steps={gauge.warmup_steps} have passed. Use a smaller optim.decay_fraction, or "
            f"optim.warmup_steps={fits}."
        )
    return None
