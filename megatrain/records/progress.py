"""A progress bar with the time left, on a terminal only.

    ━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━  52% 520/1000 | loss 4.8312 | 12.3k tokens/s | 0:02:01 left

The bar is on stderr. Where stderr is a file or a pipe, `person_watching` is false, no bar is made and no control character is written.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO


def person_watching(stream: TextIO | None = None) -> bool:
    """Whether `stream` (stderr by default) is a terminal that can move its cursor."""
    stream = sys.stderr if stream is None else stream
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class StepBar:
    """The bar of one training run."""

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None) -> None:
        """Draw the bar on `stream` (stderr by default), with `start_step` of `total_steps` done before the clock starts.

        Raises ImportError without rich.
        """
        from rich.console import Console  # noqa: PLC0415  imported only where somebody watches
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
        from rich.table import Column  # noqa: PLC0415

        console = Console(
            file=sys.stderr if stream is None else stream, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        whole = Column(no_wrap=True, min_width=7)  # a narrow terminal shortens the bar, never the time left
        self._progress = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} | loss {task.fields[loss]} | {task.fields[speed]} tokens/s |"),
            TimeRemainingColumn(table_column=whole),
            TextColumn("left"),
            console=console,
            expand=True,
            speed_estimate_period=300.0,  # seconds: evaluations and checkpoints come and go, so look at the last five minutes
            redirect_stdout=False,
            redirect_stderr=stream is None,  # warnings of this process appear above the bar
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, loss="-", speed="-")
        self._progress.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` updates are done."""
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", speed=short(tokens_per_second))

    def print(self, text: str) -> None:
        """Print lines above the bar, as they are."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is and give the cursor back. May be called twice."""
        self._progress.stop()


def short(value: float) -> str:
    """A number in at most five characters: 873, 12.3k, 1.25M, 3.02G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"
