"""Which rank holds the others up: every rank's own time in a step, without its waits for others, compared with that of its peers.

A step ends on all ranks at once, so its time says nothing of who was slow; what each spent on its own work does. Each rank measures
that (`Stopwatch`; `transport/stalls.py`), all gather it once an interval, and rank 0 judges (`Comparison`). The peers of a rank are the
others of its pipeline stage, which do the same work; stages do different work and are not compared.

    step        1   2   3   4   5 | 6   7            8                  9
    with 5:     measured ......   |     the gather   the gather ends;   a GPU's numbers
                                  |     begins       told on a CPU      are told

Nothing is waited for: a step's moments are read when its report was, one step later, and the gather (a sum of rows, 8 bytes for each
rank) has a step to end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatrain.parallel.mesh import ParallelContext
from megatrain.runtime.reports import Queued
from megatrain.transport.group import Handle
from megatrain.transport.host import Reading, to_device
from megatrain.transport.stalls import stalls_of
from megatrain.transport.wrappers import Recorder

Array = npt.NDArray[np.float64]

PLAIN = 2.0
"""A rank that takes this much longer than its peers is slow, however noisy the machine."""
NOISE = 3.0
"""A smaller ratio must lie this many standard deviations of all ranks' ratios above 1; their spread is that of the last intervals."""
LEAST_INTERVALS, MOST_INTERVALS = 10, 40
"""Intervals by which the spread is measured: before there are so many, only PLAIN counts; older ones are forgotten."""
SPREAD = 1.4826
"""Standard deviation of normal numbers by their median distance from the median."""


@dataclass(frozen=True)
class Pace:
    """The ranks' own times in one interval."""

    least: float
    """Seconds a step of the rank that needed least."""
    median: float
    most: float
    slowest: int
    """The rank that took longest, measured by its peers."""
    ratio: float
    """Its time by the median of its peers'; nan where no rank has peers."""
    slow: tuple[tuple[int, float], ...] = ()
    """Ranks that are slow from this interval on, with their ratios."""
    recovered: tuple[int, ...] = ()
    """Ranks that were, and are no more."""


class Comparison:
    """Says which ranks are slow: those that took `ratio` times as long as their peers' median in each of the last `intervals`.

    Under NOISE a run of such intervals is chance, so that the mean of their logarithms must also lie above it, or each be PLAIN.
    """

    def __init__(self, stages: Sequence[int], ratio: float, intervals: int) -> None:
        """stages: the pipeline stage of each rank."""
        numbers = np.asarray(stages)
        self._groups = [found for stage in np.unique(numbers) if len(found := np.flatnonzero(numbers == stage)) > 1]
        self._ratio, self._intervals = math.log(ratio), intervals
        self._seen: deque[Array] = deque(maxlen=max(MOST_INTERVALS, intervals))
        """Logarithm of each rank's ratio, by interval."""
        self._slow = np.zeros(len(numbers), dtype=bool)

    def __call__(self, seconds: Sequence[float]) -> Pace | None:
        """Comparison an interval by the ranks' seconds a step; None where a rank has measured nothing."""
        times = np.asarray(seconds, dtype=np.float64)
        if not np.isfinite(times).all():
            return None
        times = np.maximum(times, np.finfo(np.float64).tiny)
        ratios = np.ones(len(times))
        for members in self._groups:
            ratios[members] = times[members] / medians_of_others(times[members])
        self._seen.append(np.log(ratios))
        over = self._seen[-1] >= self._ratio
        found = self._found()
        new, recovered = np.flatnonzero(found & ~self._slow), np.flatnonzero(self._slow & ~over)
        self._slow = (self._slow & over) | found
        slowest = int(ratios.argmax())
        least, median, most = float(times.min()), float(np.median(times)), float(times.max())
        ratio = float(ratios[slowest]) if self._groups else math.nan
        return Pace(
            least, median, most, slowest, ratio, tuple((int(r), float(ratios[r])) for r in new), tuple(recovered.tolist())
        )

    def _found(self) -> npt.NDArray[np.bool_]:
        """The ranks that are slow by what was seen so far."""
        seen = np.array(self._seen)
        last = seen[-self._intervals :]
        if len(last) < self._intervals or not self._groups:
            return np.zeros(seen.shape[1], dtype=bool)
        slow: npt.NDArray[np.bool_] = last.min(0) >= max(math.log(PLAIN), self._ratio)
        if len(seen) >= LEAST_INTERVALS:
            distances = np.abs(seen - np.median(seen, 0))[:, np.concatenate(self._groups)]
            slow |= (last.min(0) >= self._ratio) & (last.mean(0) >= NOISE * SPREAD * np.median(distances))
        return slow


def medians_of_others(times: Array) -> Array:
    """For each of n > 1 numbers the median of the n - 1 others."""
    order = times.argsort()
    by_size, place = times[order], order.argsort()
    low, high = (len(times) - 2) // 2, (len(times) - 1) // 2  # places of the middle ones, where one of n is taken out
    both: Array = by_size[low + (low >= place)] + by_size[high + (high >= place)]
    return both / 2


class Stopwatch:
    """Measures this rank's own time in its steps, and gathers every rank's at the end of each interval."""

    def __init__(self, ctx: ParallelContext, recorder: Recorder, every: int, tell: Callable[[int, list[float]], None]) -> None:
        """every: steps of an interval; 0: nothing is measured.

        tell: called on every rank with an interval's last step and the mean own seconds of each rank.
        """
        self._ctx, self._every, self._tell = ctx, every, tell
        self._stalls = stalls_of(ctx.device)
        self._sampled = ctx.device.type == "cuda"  # two events a wait: in the last step of an interval alone
        self._measured: deque[tuple[Queued, Callable[[], float] | None]] = deque()
        """Steps that are queued and not yet read, with their waits; None where these were not counted."""
        self._seconds: list[float] = []
        """Own time of the steps of this interval so far."""
        self._gathering: tuple[int, torch.Tensor, Handle] | None = None
        self._readings: deque[tuple[int, Reading]] = deque()
        self._begun = False
        if every > 0:
            recorder.stalls = self._stalls

    def measure(self, step: int, queue: Callable[[], Queued]) -> Queued:
        """`queue()`, which queues update `step`, measured (collective: all ranks measure the same steps)."""
        if self._every == 0:
            return queue()
        self._go_on()
        counts = self._begun and (not self._sampled or step % self._every == 0)  # the first step also connects and compiles
        self._begun = True
        if counts:
            self._stalls.open()
        queued = queue()
        self._measured.append((queued, self._stalls.close() if counts else None))
        return queued

    def finish(self) -> None:
        """End the gather that is under way (collective), before the run's last calls."""
        self._end_gather()
        while self._readings:
            step, reading = self._readings.popleft()
            self._tell(step, reading.wait().tolist())

    def _go_on(self) -> None:
        """Without waiting: end a gather, tell what has come of earlier ones, read the step before the one queued last."""
        self._end_gather()
        while self._readings and self._readings[0][1].copied.reached():
            step, reading = self._readings.popleft()
            self._tell(step, reading.wait().tolist())
        if len(self._measured) < 2:
            return
        queued, stalled = self._measured.popleft()
        if stalled is not None:
            self._seconds.append(queued.ended.seconds_since(queued.began) - stalled())
        if queued.step % self._every == 0:
            mean = sum(self._seconds) / len(self._seconds) if self._seconds else math.nan
            self._seconds.clear()
            world = self._ctx.world
            row = torch.zeros(world.size, dtype=torch.float64)
            row[world.rank] = mean
            self._gathering = queued.step, *world.start_all_reduce(to_device([row], self._ctx.device)[0])

    def _end_gather(self) -> None:
        if self._gathering is not None:
            step, row, handle = self._gathering
            self._gathering = None
            handle.wait()
            self._readings.append((step, self._ctx.world.start_to_host(row)))
