"""Which rank holds the others up: every rank's own time in a step, without its waits for others, compared with that of its peers.

A step ends on all ranks at once, so its time says nothing of who was slow; what each spent on its own work does. Each rank measures
that (`Stopwatch`; `transport/stalls.py`), all gather it once an interval, and rank 0 judges (`Comparison`). The peers of a rank are the
others of its pipeline stage, which do the same work; stages do different work, and each is compared with its own past, and
with what the others take for theirs (own_past.py).

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

from megatrain.lifecycle.own_past import Array, OwnPast, medians_of_others
from megatrain.parallel.mesh import ParallelContext
from megatrain.runtime.reports import Queued
from megatrain.transport.group import Handle
from megatrain.transport.host import Reading, to_device
from megatrain.transport.stalls import stalls_of
from megatrain.transport.wrappers import Recorder

PLAIN = 2.0
"""A rank that takes this much longer than its peers is slow, however noisy the machine."""
NOISE = 3.0
"""A smaller ratio must lie this many standard deviations of all ranks' ratios above 1; their spread is that of the last intervals."""
MANY = 3.0
"""A stage that takes so many times as long as the others usually do, and so many times as long for its work, is slow, whatever its past."""
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
    """The rank that is slowest beside its peers, or whose stage is beside its own past; the one that took longest where none stands out."""
    ratio: float
    """Its time by the median of its peers', or by what its stage usually takes, if that is more; nan where neither is known."""
    slow: tuple[tuple[int, float], ...] = ()
    """Ranks that are slow from this interval on, with their ratios."""
    recovered: tuple[int, ...] = ()
    """Ranks that were, and are no more."""
    of_stage: frozenset[int] = frozenset()
    """The slow ranks that are by their stage's own past, and whose peers are as slow."""
    of_work: frozenset[int] = frozenset()
    """The slow ranks that are beside the other stages, by what each has to do."""


class Steadily:
    """Which of some numbers are slow: those whose logarithm was that of `ratio` or more in each of the last `intervals`.

    Under NOISE a run of such intervals is chance, so that the mean of the logarithms must also lie above it, or each be PLAIN.
    """

    def __init__(self, ratio: float, intervals: int) -> None:
        self._ratio, self._intervals = math.log(ratio), intervals
        self._seen: deque[Array] = deque(maxlen=max(MOST_INTERVALS, intervals))
        self._slow: npt.NDArray[np.bool_] | None = None

    def __call__(self, logs: Array) -> npt.NDArray[np.bool_]:
        """Which are slow after one more interval, by the logarithms of their ratios."""
        self._seen.append(logs)
        found = self._found()
        self._slow = found if self._slow is None else (self._slow & (logs >= self._ratio)) | found
        return self._slow

    def _found(self) -> npt.NDArray[np.bool_]:
        """The slow ones, by what was seen so far."""
        seen = np.array(self._seen)
        last = seen[-self._intervals :]
        if len(last) < self._intervals or not seen.size:
            return np.zeros(seen.shape[1], dtype=bool)
        slow: npt.NDArray[np.bool_] = last.min(0) >= max(math.log(PLAIN), self._ratio)
        if len(seen) >= LEAST_INTERVALS:
            spread = SPREAD * np.median(np.abs(seen - np.median(seen, 0)))
            slow |= (last.min(0) >= self._ratio) & (last.mean(0) >= NOISE * spread)
        return slow


class Comparison:
    """Says which ranks are slow beside the median of their peers, or, where all of a stage are, beside its own past or the other stages."""

    def __init__(self, stages: Sequence[int], ratio: float, intervals: int, work: Sequence[float] = ()) -> None:
        """stages: the pipeline stage of each rank. ratio, intervals: as of `Steadily`. work: FLOPs of each stage; where they are not known,
        a stage is compared with its own past alone.
        """
        numbers = np.asarray(stages)
        self._groups = [found for stage in np.unique(numbers) if len(found := np.flatnonzero(numbers == stage)) > 1]
        self._grouped = np.concatenate([np.empty(0, dtype=np.intp), *self._groups])
        self._ratio = math.log(ratio)
        self._past = OwnPast(stages, intervals)
        self._peers, self._stages = Steadily(ratio, intervals), Steadily(ratio, intervals)
        self._work, self._unlike = np.log(np.asarray(work)), Steadily(max(MANY, ratio), intervals)
        self._slow = np.zeros(len(numbers), dtype=bool)

    def __call__(self, seconds: Sequence[float]) -> Pace | None:
        """Comparison an interval by the ranks' seconds a step; None where a rank has measured nothing."""
        times = np.asarray(seconds, dtype=np.float64)
        if not np.isfinite(times).all():
            return None
        times = np.maximum(times, np.finfo(np.float64).tiny)
        logs, beside = np.log(times), np.full(len(times), math.nan)
        for members in self._groups:
            beside[members] = logs[members] - np.log(medians_of_others(times[members]))
        slow, by_past, of_work = (np.zeros_like(self._slow) for _ in range(3))
        slow[self._grouped] = self._peers(beside[self._grouped])
        excess = self._past.excess(logs, self._work)
        if excess is not None:
            unlike = self._unlike(excess)
            of_work = unlike[self._past.stage_of] & ~slow
            beside = np.fmax(beside, np.where(unlike, excess, math.nan)[self._past.stage_of])
        growth = self._past.growth(logs)
        if growth is not None:
            by_past = self._stages(growth)[self._past.stage_of] & ~slow
            beside = np.fmax(beside, growth[self._past.stage_of])
        self._past.add(logs, bool(by_past.any()))
        slow |= by_past | of_work
        new, recovered = np.flatnonzero(slow & ~self._slow), np.flatnonzero(self._slow & ~slow)
        self._slow = slow
        stands_out = np.nan_to_num(beside, nan=-math.inf)
        slowest = int(stands_out.argmax() if stands_out.max() >= self._ratio else times.argmax())
        return Pace(
            float(times.min()),
            float(np.median(times)),
            float(times.max()),
            slowest,
            math.exp(beside[slowest]),
            tuple((int(rank), math.exp(beside[rank])) for rank in new),
            tuple(recovered.tolist()),
            frozenset(np.flatnonzero(by_past & ~of_work).tolist()),
            frozenset(np.flatnonzero(of_work).tolist()),
        )


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
