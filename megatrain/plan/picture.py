"""Pictures of pipeline timelines (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.parallel.simulator import Timeline
from megatrain.plan.timeline import LETTERS
from megatrain.records.plot import save_png

_COLOURS = {"F": "#2f6fb5", "B": "#4b9b6e", "W": "#d9a62b"}
_LEGEND = {"F": "forward", "B": "backward (split: input gradient)", "W": "weight gradient"}
_LATER_CHUNKS = 0.55
"""Opacity of a stage's second and later chunks."""


def draw_timeline(timelines: Sequence[tuple[str, Timeline]], png: Path) -> None:
    """Draw timelines below one another, on one clock. Raises OSError where the picture cannot be written."""
    rows = sum(len(timeline.stages) for _, timeline in timelines)
    figure = Figure(figsize=(14.0, 1.2 + 0.45 * rows + 0.5 * len(timelines)), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(timeline.makespan for _, timeline in timelines)
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, timeline) in zip(axes, timelines, strict=True):
        _draw_stages(axis, timeline, longest)
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("time")
    for letter, meaning in _LEGEND.items():
        axes[0].broken_barh([(0, 0)], (0, 0), facecolors=_COLOURS[letter], label=meaning)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=8)
    if png.is_dir():
        raise IsADirectoryError(f"{png} is a directory: give the picture a name, such as {png / 'timeline.png'}")
    if not png.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {png.parent} for the picture {png.name}: make it first")
    save_png(figure, png)


def _draw_stages(axis: Axes, timeline: Timeline, longest: float) -> None:
    """One row for each stage, with micro-batch numbers where they fit."""
    for row, events in enumerate(timeline.stages):
        bars: dict[tuple[str, float], list[tuple[float, float]]] = {}  # one drawing call a kind: there may be 100,000
        for event in events:
            length = event.end - event.start
            opacity = _LATER_CHUNKS if event.instruction.chunk else 1.0
            bars.setdefault((LETTERS[event.instruction.kind], opacity), []).append((event.start, length))
            if length > longest / 110:
                middle, number = event.start + length / 2, str(event.instruction.micro_batch)
                axis.text(middle, row, number, ha="center", va="center", fontsize=7, color="white")
        line = 0.6 if len(events) < 400 else 0.0
        for (letter, opacity), spans in bars.items():
            colour = _COLOURS[letter]
            axis.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour, alpha=opacity, edgecolor="white", linewidth=line)
    stages = len(timeline.stages)
    axis.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axis.set_ylim(stages - 0.5, -0.5)
    axis.set_xlim(0, longest)
