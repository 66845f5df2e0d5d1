"""Reports of steps, read one step late, so that the device already has the next step while the host waits for this one's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch

from megatrain.transport.host import Moment, Reading


class Caution(NamedTuple):
    """How carefully a step is taken."""

    rate: float = 1.0
    """Factor of the learning rate."""
    embedding_grad: float = 1.0
    """Factor of the token embedding's gradient."""
    most_loss: float = math.inf
    """The largest loss with which the update is applied."""
    most_grad_norm: float = math.inf
    """The largest gradient norm with which the update is applied."""

    def left_out(self, overflow: torch.Tensor, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether a step's update is left out, from its overflow, loss and gradient norm: all are float64 scalars, on the device."""
        return torch.maximum(overflow, ((loss > self.most_loss) | (grad_norm > self.most_grad_norm)).double())


def carefree(step: int) -> Caution:
    """No caution at any step."""
    return Caution()


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step, the same on every rank."""

    step: int
    """Steps so far, this one included."""
    loss: float
    """Mean over the weight (tokens) of the global batch, before the update."""
    statistics: dict[str, float]
    """The objective's statistics, each as its sum over the global batch by that weight."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    samples: int
    """Sequences of the global batch."""
    skipped: bool
    """Nothing was changed: loss or gradient was not finite or beyond its limit (`Caution`), or train.skip_steps said so."""
    overflow: bool
    """The loss or the gradient was not finite."""
    stop: bool
    """Whether any rank was told to stop."""
    loss_scale: float
    """Loss scale of the next step."""
    consumed_samples: int
    """Sequences of all steps so far, this one included."""
    wait_seconds: float = field(compare=False)
    """How long this rank waited for its batch; differs between ranks."""

    @property
    def accuracy(self) -> float:
        """Share of the weight that was predicted right; nan for an objective that does not say."""
        return self.statistics.get("correct", math.nan)


@dataclass(frozen=True)
class Queued:
    """A step whose operations are all queued on the device; the host has not waited for any of them."""

    step: int
    learning_rate: float
    samples: int
    consumed_samples: int
    wait_seconds: float
    began: Moment
    statistics: tuple[str, ...]
    """Names of the objective's k statistics."""
    numbers: Reading
    """[6 + k] float64: gradient norm, overflow (0 or 1), whether the update was left out (0 or 1), number of ranks told to stop, loss
    scale, loss, and statistics by the weight.
    """

    @property
    def ended(self) -> Moment:
        """The moment at which the update ends."""
        return self.numbers.copied

    def report(self) -> StepReport:
        """The step's report; blocks until the step has ended: the only synchronisation of a step."""
        grad_norm, overflow, skipped, stop, loss_scale, loss, *statistics = self.numbers.wait().tolist()
        return StepReport(
            self.step,
            loss,
            dict(zip(self.statistics, statistics, strict=True)),
            grad_norm,
            self.learning_rate,
            self.samples,
            skipped > 0,
            overflow > 0,
            stop > 0,
            loss_scale,
            self.consumed_samples,
            self.wait_seconds,
        )


class Reports:
    """Calls `tell` for every step in order: when the next step is queued, or at `catch_up`. A context manager.

    If an exception leaves the block, the last queued step is still told, provided that it has ended.
    """

    def __init__(self, tell: Callable[[StepReport, float], None]) -> None:
        """tell: called with the report and the seconds from the end of the step before; after a `catch_up`, from the step's own start."""
        self.stop = False
        """Whether the report of some step said so."""
        self._tell = tell
        self._queued: Queued | None = None
        self._since: Moment | None = None

    def follow(self, queued: Queued) -> None:
        """Tell the step before `queued`, and keep `queued`."""
        before = self._queued
        self.catch_up()
        self._queued, self._since = queued, queued.began if before is None else before.ended

    def catch_up(self) -> bool:
        """Tell the step that was queued last, if it was not told yet; afterwards the device is idle. Returns `stop`."""
        queued, since, self._queued = self._queued, self._since, None
        if queued is not None and since is not None:
            report = queued.report()
            self.stop |= report.stop
            self._tell(report, queued.ended.seconds_since(since))
        return self.stop

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._queued is not None and self._queued.ended.reached():
            self.catch_up()
