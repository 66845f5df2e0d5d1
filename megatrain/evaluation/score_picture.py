"""Draws the scores of tasks with their 95% intervals, of one model or several, from files of results (`megatrain eval --json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.records.plot import plain_name, save_png, style_axes

_INK = "#22272e"
_COLORS = ("#2f6fb5", "#d9622b", "#4b9b6e", "#8a63b8", "#a08a3c", "#5d7a86", "#b05a7a", "#c9a13b")
ROWS = 40
"""Rows of one picture, at most; with more, of each task the first metric alone."""
_POINTS = frozenset({"bleu", "chrf"})
"""Metrics of 0 to 100; others without a panel of their own are of 0 to 1, and drawn in percent."""
_OWN = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "byte_perplexity": "perplexity per byte",
    "word_perplexity": "perplexity per word",
}
"""Metrics with a panel of their own, for which less is better."""

Tasks = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str]


def draw_scores(models: Mapping[str, Tasks], png: Path | str) -> int:
    """Draw the scores of models (name -> the `tasks` of a file of results) as a picture, replaced at once; return the rows left out.

    A row is a metric of a task: a dot for each model at its value, a bar for its interval. Scores that are not finite leave a gap. Raises
    ValueError without scores, OSError.
    """
    rows = _rows(models)
    if not rows:
        raise ValueError("there are no scores to draw: the results have no task with a metric.")
    shown = (
        rows if len(rows) <= ROWS else [row for place, row in enumerate(rows) if row[0] not in {of for of, _ in rows[:place]}]
    )
    panels = _panels(shown[:ROWS])
    heights = [0.9 + len(of) * max(0.3, 0.16 * len(models)) for of in panels.values()]
    figure = Figure(figsize=(9.0, 0.5 + sum(heights)), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, of) in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels.items(), strict=True
    ):
        _panel(axes, models, of)
        axes.set_xlabel(label, color=_INK)
    if len(models) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    save_png(figure, Path(png))
    return len(rows) - len(shown[:ROWS])


def _rows(models: Mapping[str, Tasks]) -> list[Row]:
    """Every (task, metric) of any model, in the order of their first appearance, a task's together."""
    tasks: dict[str, dict[str, None]] = {}
    for model in models.values():
        for task, result in model.items():
            tasks.setdefault(task, {}).update(dict.fromkeys(result["metrics"]))
    return [(task, metric) for task, metrics in tasks.items() for metric in metrics]


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label of the axis -> rows."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        label = _OWN.get(row[1])
        panels.setdefault(
            f"{label} (less is better)" if label else "percent (BLEU and chrF: points), with 95% intervals", []
        ).append(row)
    return panels


def _panel(axes: Axes, models: Mapping[str, Tasks], rows: Sequence[Row]) -> None:
    """Dots and bars; one model's beneath the other's within a row."""
    apart = 0.7 / len(models)
    for number, (model, tasks) in enumerate(models.items()):
        ends = np.array([_ends(tasks, row) for row in rows])
        places = np.arange(len(rows)) + apart * (number - (len(models) - 1) / 2)
        color = _COLORS[number % len(_COLORS)]
        axes.hlines(places, ends[:, 1], ends[:, 2], color=color, linewidth=3.0, alpha=0.35)
        axes.plot(ends[:, 0], places, "o", color=color, markersize=5, label=plain_name(model))
    axes.set_yticks(np.arange(len(rows)), [plain_name(f"{task}  {metric}") for task, metric in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    style_axes(axes)
    axes.tick_params(axis="y", colors=_INK)


def _ends(tasks: Tasks, row: Row) -> tuple[float, float, float]:
    """Value, low and high of a score in the unit of its axis; not a number where the model has it not."""
    task, metric = row
    found = tasks.get(task, {}).get("metrics", {}).get(metric, {})
    unit = 1.0 if metric in _POINTS or metric in _OWN else 100.0
    value, low, high = (np.nan if found.get(name) is None else unit * float(found[name]) for name in ("value", "low", "high"))
    return value, value if np.isnan(low) else low, value if np.isnan(high) else high
