"""Which pipeline stage has become slow as a whole: beside its own past, and beside what has become of the other stages meanwhile.

Stages do different work, so that their times say nothing of each other. But what makes a step longer makes it longer for all: a stage that
takes twice its usual time while the others take theirs is held up. A stage's growth is that of its fastest rank, since one of several is
told by its peers.

A stage that was slow from the first step on has a slow past. It is told where it takes much longer than the others, and as much longer
for its FLOPs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEAST_PAST, MOST_PAST = 2, 40
"""Intervals that a rank's usual time is the median of; older ones are forgotten."""


class OwnPast:
    """The usual times of all ranks, by the intervals in which no stage was slow."""

    def __init__(self, stages: Sequence[int], intervals: int) -> None:
        """stages: the pipeline stage of each rank. intervals: that many last ones are in question and not of the past."""
        _, self.stage_of = np.unique(np.asarray(stages), return_inverse=True)
        self._members = [np.flatnonzero(self.stage_of == stage) for stage in range(self.stage_of.max() + 1)]
        self._intervals = intervals
        self._questioned: deque[Array] = deque()
        self._past: deque[Array] = deque(maxlen=MOST_PAST)

    def growth(self, logs: Array) -> Array | None:
        """By the logarithms of the ranks' times, that of each stage's time by its usual one, and by the other stages' growth if they grew.

        None while there is no past, or one stage.
        """
        if len(self._past) < LEAST_PAST or len(self._members) < 2:
            return None
        grown = logs - np.median(np.array(self._past), 0)
        stages = np.array([grown[members].min() for members in self._members])
        return np.asarray(stages - np.maximum(medians_of_others(stages), 0.0))

    def excess(self, logs: Array, work: Array) -> Array | None:
        """By logarithms of the ranks' times and of the stages' work, how much longer each stage takes than the others usually do, or for
        its work, whichever is less: more work excuses a stage, and so does a time that does not follow the work.

        None where the work is not known, or for one stage.
        """
        if len(self._members) < 2 or len(work) != len(self._members):
            return None
        stages = np.array([logs[members].min() for members in self._members])
        beside, for_its_work = (values - medians_of_others(values) for values in (stages, stages - work))
        return np.asarray(np.minimum(beside, for_its_work))

    def add(self, logs: Array, slow: bool) -> None:
        """Remember an interval; one in which a stage is slow, and those that told it, say nothing of what is usual."""
        if slow:
            self._questioned.clear()
            return
        self._questioned.append(logs)
        while len(self._questioned) >= self._intervals:
            self._past.append(self._questioned.popleft())


def medians_of_others(values: Array) -> Array:
    """For each of n > 1 numbers the median of the n - 1 others."""
    order = values.argsort()
    by_size, place = values[order], order.argsort()
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2  # places of the middle ones, where one of n is taken out
    both: Array = by_size[low + (low >= place)] + by_size[high + (high >= place)]
    return both / 2
