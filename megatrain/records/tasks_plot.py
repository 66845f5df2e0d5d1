"""Draws RUN/tasks.png: the first metric of each task of a run (eval.tasks) over its steps, with 95% intervals, a panel for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatrain.records.plot import save_png, style_axes
from megatrain.records.rows import read_tasks

_LINE = "#2f6fb5"
_COLUMNS = 4


def draw_tasks(metrics: Path | str, png: Path | str) -> None:
    """Draw the tasks in metrics.jsonl as a picture at `png`, which is replaced at once. Raises OSError."""
    rows = read_tasks(metrics)
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    lines, columns = max(1, -(-len(names) // _COLUMNS)), max(1, min(_COLUMNS, len(names)))
    figure = Figure(figsize=(3.2 * columns, 2.4 * lines), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        _draw(panel, name, [row for row in rows if name in row["tasks"]])
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    save_png(figure, Path(png))


def _draw(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One task's panel."""
    metric = next(iter(rows[-1]["tasks"][name]))
    steps = [row["tasks_of_step"] for row in rows]
    value, low, high = (
        np.array([_number(row[key].get(name, {}).get(metric)) for row in rows]) for key in ("tasks", "tasks_low", "tasks_high")
    )
    axes.fill_between(steps, low, high, color=_LINE, alpha=0.15, linewidth=0)
    axes.plot(steps, value, color=_LINE, linewidth=1.4, marker="o", markersize=3)
    axes.set_title(f"{name}: {metric}", fontsize=9, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    style_axes(axes)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
