"""Conditions that stop a run before its last step: a time limit, the end of its allocation, a file that appears."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatrain.config.schema import TrainConfig
from megatrain.runtime.launch import Launch
from megatrain.runtime.slurm import job_end

EndTime = Callable[[Mapping[str, str]], "float | None"]


class Limits:
    """Checked once a step on every rank; the step's all-reduce tells the other ranks.

    Only rank 0 asks the scheduler when the allocation ends, and asks again at that time, since it may have been extended. One rank of
    each node looks for the file.
    """

    def __init__(
        self, train: TrainConfig, launch: Launch, env: Mapping[str, str] = os.environ, end_time: EndTime = job_end
    ) -> None:
        self.why = ""
        """The limit that was reached; empty if none."""
        minutes = train.exit_after_minutes
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._file = None if train.exit_file is None or launch.local_rank else Path(train.exit_file)
        self._end = (lambda: end_time(env)) if launch.rank == 0 else (lambda: None)
        self._ends = self._end()
        left = math.inf if self._ends is None else max(0.0, self._ends - time.time())
        self._margin = min(60 * train.exit_before_end_minutes, left / 2)  # in a short allocation, at most half of what is left
        self._before_end = time.monotonic() + left - self._margin

    def reached(self) -> bool:
        """Whether a limit is reached; `why` then names it."""
        if time.monotonic() >= self._before_end:
            ends = self._end()
            if ends is None or self._ends is None:
                self._before_end = math.inf
            else:  # the clock may have been set since
                self._before_end += ends - self._ends
            self._ends = ends
        if time.monotonic() >= self._deadline:
            self.why = "train.exit_after_minutes"
        elif time.monotonic() >= self._before_end:
            self.why = "the end of the job's time"
        elif self._file is not None and self._file.exists():
            self.why = "train.exit_file"
        return bool(self.why)
