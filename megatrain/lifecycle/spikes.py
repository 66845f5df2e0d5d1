"""The loss guard: tells steps whose loss or gradient leaves what is usual, and runs that skip one step after another, or most of them.

    usual      median m of the last train.spike_history values, and how far they stray: s = the larger of 1.4826 MAD and (q90 - m) / 1.2816,
               which are the standard deviation where values are normal; at least a hundredth of m (loss), 0.15 (log of a norm)
    limit      m + train.spike_threshold (1 + 8 / n) s, from n >= 8 values: of the loss, and of the logarithms of gradient norms (of the
               whole model, and of its parts where log.norms_every has them)
    at first   while n < 8: m + train.spike_threshold max(m, 1) of a loss, and m + train.spike_threshold of a logarithm; before any loss
               m is that of a guess
    a spike    a value beyond the limit; values below never are

The limit of step t is made of steps up to t - 2, whether or not step t - 1 is reported already: so it is the same however often a run
saves or evaluates, on every rank, and on a device that must not wait for the host. What is seen and decided is kept in checkpoints
(`Spikes.state`), and a run that resumes decides as it would have. A run that went back to its first steps has the values that they had
before, for as long as there are fewer than 8 new ones.

MAD alone is 0 on a plateau (hence the floors) and blind to a second kind of batch, one in five, whose loss lies elsewhere (hence q90).
Leaving out batches after a spike: PaLM, arXiv:2204.02311, section 5.1. The embedding's gradient: GLM-130B, arXiv:2210.02414, section 3.3.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from megatrain.config.schema import TrainConfig
from megatrain.runtime.reports import Caution, StepReport

LEAST = 8
"""Fewest values that a limit is made of."""
NEAR = 2 * LEAST
"""Steps after a rollback of which the values from before it are kept, until there are LEAST new ones."""
LATE = 2
"""A step's limit is made of values of steps that came at least so many before it."""
OF_MAD, OF_Q90 = 1.4826, 1.2816
"""A normal distribution's standard deviation over its MAD; its 90% quantile in standard deviations."""
SHRUNK = 0.1
"""Factor of the embedding's gradient under train.spike_remedy, as in GLM-130B."""
LOSS, NORM = "loss", "gradient norm"
IN_ROWS = 4
"""More than half of this many times train.max_skipped_in_row steps that are skipped are as bad as that many in a row."""


class Diverged(RuntimeError):
    """Training went wrong, and may not simply go on; the message says where to look. The process ends with `exit_code`."""

    exit_code = os.EX_PROTOCOL  # 76


def usual(values: Sequence[float]) -> tuple[float, float]:
    """(median, spread) of some values; the spread, 0 if nearly all are equal, is the standard deviation where they are normal."""
    ordered = sorted(values)
    median = _middle(ordered)
    mad = _middle(sorted(abs(value - median) for value in ordered))
    q90 = ordered[round(0.9 * (len(ordered) - 1))]
    return median, max(OF_MAD * mad, (q90 - median) / OF_Q90)


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class History:
    """The last values of one number (of a norm: their logarithms), by the steps that they are of."""

    def __init__(self, size: int, *, norm: bool, guess: float = math.nan) -> None:
        """size: how many values a limit is made of. norm: whether the number is a norm, of which only logarithms are near to normal.
        guess: what to expect before there is a value; nan: nothing.
        """
        self.size, self.norm, self.guess = size, norm, guess
        self.steps: deque[int] = deque(maxlen=size + LATE)
        self.values: deque[float] = deque(maxlen=size + LATE)
        self.before: dict[int, float] = {}
        """After a rollback: values that the same steps, counted from 1, had before it."""

    def after(self, step: int, end: int) -> dict[int, float]:
        """Values of the steps that follow `step`, NEAR at most, and come before `end`: what jumped there says nothing."""
        known = self.before | dict(zip(self.steps, self.values, strict=True))
        return {at: value for at, value in known.items() if step < at <= step + NEAR and at < end}

    def add(self, step: int, value: float) -> None:
        """Remember a value; one that is not finite (of a norm: not positive) says nothing of what is usual."""
        if math.isfinite(value) and (value > 0 or not self.norm):
            self.steps.append(step)
            self.values.append(math.log(value) if self.norm else value)

    def limit(self, step: int, threshold: float) -> tuple[float, float]:
        """(median, limit) for a step; the limit is inf, and the median nan, while nothing is known."""
        later = sum(at > step - LATE for at in islice(reversed(self.steps), LATE))
        found = list(self.values)[-self.size - later : len(self.values) - later]
        if len(found) < LEAST:
            found = [*self.before.values(), *found]
        if not found and math.isnan(self.guess):
            return math.nan, math.inf
        median, spread = usual(found or [self.guess])
        if len(found) < LEAST:  # too few to tell how far they stray
            limit = median + threshold * (1.0 if self.norm else max(abs(median), 1.0))
        else:
            spread = max(spread, 0.15 if self.norm else max(0.01 * abs(median), 0.01))
            limit = median + threshold * (1 + LEAST / len(found)) * spread
        return (math.exp(median), math.exp(min(limit, 700.0))) if self.norm else (median, limit)


class Spike(NamedTuple):
    """A value beyond its limit."""

    what: str
    """`loss`, `gradient norm`, `gradient norm of PART`."""
    value: float
    usual: float
    """The median of the values before."""
    limit: float

    def __str__(self) -> str:
        return f"{self.what} {self.value:.4g}, usually {self.usual:.4g}, is beyond {self.limit:.4g}"


class Bad(NamedTuple):
    """Steps that went wrong, after which the run must go back or end."""

    first: int
    """Number of the first step that went wrong."""
    last: int
    consumed: int
    """Samples consumed up to the last, included."""
    samples: int
    """Samples of the last."""
    why: str
    """The reason as text, to follow `step 12: `."""


class Spikes:
    """The loss guard of one run: is told of every step, in order, and says what to do."""

    def __init__(self, train: TrainConfig, guess: float = math.nan) -> None:
        """guess: the loss to expect before the first step; nan: nothing is known of it."""
        self.train, self.guess = train, guess
        self.histories: dict[str, History] = {}
        self.bad: Bad | None = None
        """Set while the run must go back or end; steps that are told of meanwhile are ignored, since they will not have been."""
        self.skipped = 0
        """Steps in a row that were skipped against the will of the config."""
        self.recent: deque[int] = deque(maxlen=IN_ROWS * train.max_skipped_in_row)
        """For each of the last steps its number if it was skipped so, else 0."""
        self.settled = False
        """Whether an update was applied with the loss scale of fp16, which until then is still looked for."""
        self.spiking = False
        """Whether the step before was a spike."""
        self.eased: dict[str, int] | None = None
        """After a rollback: the step gone back to (`from`), the steps of the new warm-up (`steps`), and whether the embedding's
        gradient is shrunk meanwhile (`shrink`, 0 or 1).
        """
        self.retries = 0
        """Rollbacks since the last checkpoint that lies behind a spike."""
        self.gone: list[int] = [0, 0]
        """The step of the spike that the run last went back from, and the step that it went back to."""
        self._parts: dict[int, dict[str, Spike]] = {}
        """By steps that a report is yet to come of: norms of parts beyond their limits."""
        self._known: dict[int, dict[str, tuple[float, float]]] = {}
        """(median, limit) by name of steps that a report is yet to come of: the step asks for them, and then its report."""

    def caution(self, step: int) -> Caution:
        """How carefully to take a step, counted from 1."""
        eased, rate, shrunk = self.eased, 1.0, 1.0
        if eased is not None and step <= eased["from"] + eased["steps"]:
            rate, shrunk = (step - eased["from"]) / eased["steps"], SHRUNK if eased["shrink"] else 1.0
        if self.train.on_spike != "skip":
            return Caution(rate, shrunk)
        most = -math.inf if self._parts.get(step) else self.limits(step)[LOSS][1]
        return Caution(rate, shrunk, most, self.limits(step)[NORM][1])

    def limits(self, step: int) -> dict[str, tuple[float, float]]:
        """(median, limit) of loss and gradient norm at a step."""
        if step not in self._known:
            threshold = self.train.spike_threshold
            self._known[step] = {name: self._history(name).limit(step, threshold) for name in (LOSS, NORM)}
        return self._known[step]

    def see_parts(self, step: int, norms: Mapping[str, float]) -> None:
        """Take note of the gradient norms of the parts of the model in a step, before its update."""
        found = {}
        for part, norm in norms.items():
            history = self._history(f"{NORM} of {part}")
            median, limit = history.limit(step, self.train.spike_threshold)
            if math.isfinite(norm) and norm > limit:
                found[part] = Spike(f"{NORM} of {part}", norm, median, limit)
            history.add(step, norm)
        self._parts[step] = found

    def see(self, report: StepReport) -> list[Spike]:
        """Take note of a step; returns its values beyond their limits, if the step before had none. May set `bad`."""
        if self.bad is not None:
            return []
        step, values = report.step, {LOSS: report.loss, NORM: report.grad_norm}
        limits = self.limits(step)
        del self._known[step]
        spikes = [
            Spike(name, values[name], *limits[name])
            for name in values
            if not report.overflow and math.isfinite(values[name]) and values[name] > limits[name][1]
        ]
        of_parts = self._parts.pop(step, {})
        spikes += [] if report.overflow else of_parts.values()
        for name, value in values.items() if not report.overflow else ():
            self._history(name).add(step, value)
        self._count(report)
        if spikes and self.train.on_spike == "rollback":
            why = "; ".join(map(str, spikes))
            self.bad = Bad(step, step, report.consumed_samples, report.samples, why)
        told, self.spiking = spikes if not self.spiking else [], bool(spikes)
        return told

    def _count(self, report: StepReport) -> None:
        """Count steps that are skipped, one after another and in all."""
        self.settled = self.settled or (self.train.precision == "fp16" and not report.overflow)
        falling = self.train.precision == "fp16" and not self.settled and report.loss_scale > self.train.loss_scale_min
        if report.step in self.train.skip_steps and not report.overflow:
            return  # as asked
        skipped = report.skipped and not falling
        self.skipped = self.skipped + 1 if skipped else 0
        self.recent.append(report.step if skipped else 0)
        among, most = [step for step in self.recent if step], self.train.max_skipped_in_row
        if most and self.skipped >= most:
            first, why = report.step - self.skipped + 1, f"{self.skipped} steps in a row were skipped"
        elif len(among) > math.ceil(self._share() * IN_ROWS * most):
            first, why = among[0], f"{len(among)} of the last {len(self.recent)} steps were skipped"
        else:
            return
        self.bad = Bad(first, report.step, report.consumed_samples, report.samples, why)

    def _share(self) -> float:
        """Share of steps that may be skipped for good: half, or what fp16 needs where a scale that is right grows very often."""
        tries = self.train.loss_scale_hysteresis if self.train.precision == "fp16" else 0
        return max(0.5, tries / (tries + self.train.loss_scale_window))

    def bound(self) -> int:
        """The step before which the checkpoint to go back to lies: where the run has not come past the last spike, that one is not good."""
        bad = self.bad
        if bad is None:
            raise ValueError("the run has no reason to go back")
        return min(bad.first, self.gone[1]) if self.retries and bad.last <= self.gone[0] else bad.first

    def tries(self, step: int) -> int:
        """Number of rollbacks since the last checkpoint behind a spike, if the run goes back to `step` now."""
        return 0 if step >= self.gone[0] else self.retries

    def go_back(self, bad: Bad, step: int, kept: Mapping[str, Any]) -> None:
        """Take over the state of the checkpoint of `step`, to which the run goes back because of `bad`."""
        train, retries = self.train, self.tries(step) + 1
        before = {name: of.after(step, bad.first) for name, of in self.histories.items()}
        self.restore(kept)
        for name, values in before.items():
            if len(values) >= LEAST > len(self._history(name).values) - LATE:
                self._history(name).before = values
        self.gone, self.retries = [bad.last, step], retries
        self.eased = {"from": step, "steps": train.spike_warmup_steps, "shrink": int(train.spike_remedy != "none")}
        self.skipped, self.spiking = 0, False
        self.recent.clear()

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps; plain JSON."""
        return {
            "history": {name: list(map(list, zip(of.steps, of.values, strict=True))) for name, of in self.histories.items()},
            "before": {name: list(map(list, of.before.items())) for name, of in self.histories.items() if of.before},
            "skipped": self.skipped,
            "recent": list(self.recent),
            "settled": self.settled,
            "spiking": self.spiking,
            "eased": self.eased,
            "retries": self.retries,
            "gone": self.gone,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept; an empty one, as earlier releases saved, begins anew."""
        self.histories.clear()
        for name, pairs in state.get("history", {}).items():
            history = self._history(name)
            history.steps.extend(step for step, _ in pairs)
            history.values.extend(value for _, value in pairs)
        for name, pairs in state.get("before", {}).items():
            self._history(name).before = dict(map(tuple, pairs))
        self.skipped, self.settled = state.get("skipped", 0), state.get("settled", False)
        self.recent = deque(state.get("recent", ()), self.recent.maxlen)
        self.spiking, self.eased = state.get("spiking", False), state.get("eased")
        self.retries, self.gone = state.get("retries", 0), list(state.get("gone", [0, 0]))
        self.bad, self._known, self._parts = None, {}, {}

    def _history(self, name: str) -> History:
        guess = self.guess if name == LOSS else math.nan
        return self.histories.setdefault(name, History(self.train.spike_history, norm=name != LOSS, guess=guess))
