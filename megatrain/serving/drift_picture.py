"""The picture of `megatrain serve-report`: each measure in use beside the evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.records.plot import save_png
from megatrain.serving.drift import Drift

COLUMNS = 2


def draw_drifts(drifts: Sequence[Drift], png: Path) -> None:
    """Draw the shares of each measure's bins. Raises OSError."""
    rows = -(-len(drifts) // COLUMNS)
    figure = Figure(figsize=(11, 2.8 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, drift in enumerate(drifts, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        at = range(len(drift.shares))
        for side, (name, values, color) in enumerate(
            (("in use", drift.used, "#1f77b4"), ("evaluated", drift.evaluated, "#b0b0b0"))
        ):
            heights = [share[side] for share in drift.shares]
            axes.bar([x + 0.4 * side - 0.2 for x in at], heights, 0.4, label=f"{name} ({len(values):,})", color=color)
        axes.set_xticks(list(at), bin_names(drift), fontsize=7)
        index = "" if drift.psi is None else f": PSI {drift.psi:.2f} ({drift.by_chance:.2f} by chance), {drift.verdict}"
        axes.set_title(f"{drift.measure.name}{index}", fontsize=9)
        axes.set_ylabel("share", fontsize=8)
        axes.legend(fontsize=7)
    save_png(figure, png)


def bin_names(drift: Drift) -> list[str]:
    """The categories that are there, or the bounds of each bin."""
    if drift.measure.categories:
        return [name for name in drift.measure.categories if name in drift.used or name in drift.evaluated]
    edges = [f"{edge:.3g}" for edge in drift.edges]
    if not edges:
        return ["all"]
    return [f"<{edges[0]}", *(f"{low}-\n{high}" for low, high in pairwise(edges)), f"≥{edges[-1]}"]
