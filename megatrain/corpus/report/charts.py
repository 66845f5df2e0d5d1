"""Draws the pictures of a report, each only where there is something to draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatrain.corpus.report.bins import AN_OCTAVE, edge
from megatrain.corpus.report.summary import StageCount, Summary
from megatrain.records.plot import plain_name, save_png

_INK, _FAINT, _GRID = "#22272e", "#7a828c", "#e6e8eb"
_LEFT, _ALONE, _REFUSED, _LIMIT = "#2f6fb5", "#d9622b", "#f0b595", "#b05a7a"
_COLORS = ("#2f6fb5", "#d9622b", "#4b9b6e", "#8a63b8", "#a08a3c", "#5d7a86", "#b05a7a", "#c9a13b")
BARS = 30
"""Rules, sources and languages of one picture, at most: those that matter most."""

Cutoffs = Mapping[str, tuple[float, float]]


def draw(summary: Summary, folder: Path, cutoffs: Cutoffs | None = None) -> list[str]:
    """Write the pictures into a folder and return their names; each is replaced at once. Raises OSError.

    cutoffs: the perplexities where middle and tail begin, by language.
    """
    pictures: dict[str, tuple[int, Callable[[Axes], None]]] = {}
    if summary.stages:
        pictures["stages.png"] = (len(summary.stages), lambda axes: _stages(axes, summary))
    rules = _worst_rules(summary)
    if rules:
        pictures["rules.png"] = (len(rules), lambda axes: _rules(axes, rules, summary.limits.removes))
    if summary.stages and summary.stages[0].into.documents:
        number = min(BARS, len(summary.stages[0].into.documents))
        pictures["sources.png"] = (number, lambda axes: _sources(axes, summary))
    if summary.stages and (summary.stages[0].into.letters or summary.stages[-1].out.letters):
        pictures["lengths.png"] = (8, lambda axes: _lengths(axes, summary))
    if summary.perplexities:
        pictures["perplexities.png"] = (8, lambda axes: _perplexities(axes, summary, cutoffs or {}))
    if summary.clusters:
        pictures["clusters.png"] = (8, lambda axes: _clusters(axes, summary))
    for name, (rows, draw_into) in pictures.items():
        figure = Figure(figsize=(9.0, 1.6 + 0.3 * rows), dpi=100, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw_into(axes)
        _style(axes)
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
        save_png(figure, folder / name)
    return list(pictures)


def _stages(axes: Axes, summary: Summary) -> None:
    """Share of the first stage's documents and bytes that is left after each stage."""
    first = summary.stages[0].into
    places = np.arange(len(summary.stages))
    for shift, color, label, of in ((-0.2, _LEFT, "documents", "documents"), (0.2, _COLORS[2], "bytes", "bytes")):
        whole = max(1, getattr(first, of).total())
        shares = [getattr(stage.out, of).total() / whole for stage in summary.stages]
        axes.barh(places + shift, shares, 0.38, color=color, label=label)
    axes.set_xlim(
        0, 1.02 * max(1.0, *(stage.out.documents.total() / max(1, first.documents.total()) for stage in summary.stages))
    )
    _names(axes, [stage.name for stage in summary.stages])
    _shares(axes, "left after each stage")


def _worst_rules(summary: Summary) -> list[tuple[str, float, float]]:
    """Rule, share of its stage's documents that it refuses, and that it alone refuses; the largest first."""

    def share(stage: StageCount, counts: Counter[str]) -> float:
        return counts.total() / max(1, stage.into.documents.total())

    rows = [
        (f"{stage.name}: {name}", share(stage, rule.refused.documents), share(stage, rule.alone.documents))
        for stage in summary.stages
        for name, rule in stage.rules.items()
    ]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:BARS]


def _rules(axes: Axes, rows: list[tuple[str, float, float]], limit: float) -> None:
    places = np.arange(len(rows))
    axes.barh(places, [row[1] for row in rows], 0.7, color=_REFUSED, label="refuses")
    axes.barh(places, [row[2] for row in rows], 0.7, color=_ALONE, label="it alone")
    if max(row[1] for row in rows) > limit:
        axes.axvline(limit, color=_LIMIT, linewidth=1.8, linestyle=(0, (5, 3)), label=f"alarm above {limit:.0%}")
    _names(axes, [row[0] for row in rows])
    _shares(axes, "of the stage's documents")


def _sources(axes: Axes, summary: Summary) -> None:
    """For each source the share that each stage took, and what is left."""
    first = summary.stages[0].into.documents
    sources = [name for name, _ in sorted(first.items(), key=lambda item: (-item[1], item[0]))[:BARS]]
    places, left = np.arange(len(sources)), np.zeros(len(sources))
    last = summary.stages[-1].out.documents
    parts = [("left", _LEFT, [last[name] for name in sources])]
    for number, stage in enumerate(summary.stages):
        lost = [max(0, stage.into.documents[name] - stage.out.documents[name]) for name in sources]
        if any(lost):
            parts.append((f"lost in {plain_name(stage.name)}", _COLORS[1 + number % (len(_COLORS) - 1)], lost))
    for label, color, counts in parts:
        shares = np.array([count / max(1, first[name]) for name, count in zip(sources, counts, strict=True)])
        axes.barh(places, shares, 0.7, left=left, color=color, label=label)
        left += shares
    _names(axes, sources)
    _shares(axes, "of the source's documents")


def _lengths(axes: Axes, summary: Summary) -> None:
    first, last = summary.stages[0], summary.stages[-1]
    _histogram(axes, first.into.letters, _FAINT, f"into {plain_name(first.name)}")
    _histogram(axes, last.out.letters, _LEFT, f"out of {plain_name(last.name)}")
    axes.set_xlabel("characters of a document", color=_INK)


def _perplexities(axes: Axes, summary: Summary, cutoffs: Cutoffs) -> None:
    ranked = sorted(summary.perplexities.items(), key=lambda item: (-item[1].total(), item[0]))[: len(_COLORS)]
    for (language, bins), color in zip(ranked, _COLORS, strict=False):
        _histogram(axes, bins, color, plain_name(language))
        for cutoff in cutoffs.get(language, ()):
            axes.axvline(max(cutoff, 1e-3), color=color, linewidth=1.8, linestyle=(0, (5, 3)))
    axes.set_xlabel("perplexity of a document (broken lines: where middle and tail begin)", color=_INK)


def _histogram(axes: Axes, bins: Counter[int], color: str, label: str) -> None:
    if not bins.total():
        return
    numbers = np.arange(min(bins), max(bins) + 2)
    counts = [bins[number] for number in numbers[:-1].tolist()]
    axes.stairs(counts, [edge(number) for number in numbers.tolist()], fill=True, alpha=0.25, color=color)
    axes.stairs(counts, [edge(number) for number in numbers.tolist()], color=color, linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_ylabel(f"documents ({AN_OCTAVE} bins an octave)", color=_INK)


def _clusters(axes: Axes, summary: Summary) -> None:
    for (kind, sizes), color in zip(sorted(summary.clusters.items()), _COLORS, strict=False):
        rising = sorted(sizes)
        axes.plot(rising, [sizes[size] for size in rising], "o", color=color, markersize=5, label=plain_name(kind))
    axes.set_xscale("log")
    axes.set_yscale("log")
    limit = summary.limits.cluster
    if limit is not None and max(max(sizes) for sizes in summary.clusters.values()) > limit:
        axes.axvline(
            limit,
            color=_LIMIT,
            linewidth=1.8,
            linestyle=(0, (5, 3)),
            label=f"alarm above {limit:,}",
        )
    axes.set_xlabel("documents of a cluster of duplicates", color=_INK)
    axes.set_ylabel("clusters", color=_INK)


def _names(axes: Axes, names: list[str]) -> None:
    """Names beside the bars, the first on top."""
    axes.set_yticks(np.arange(len(names)), [plain_name(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _shares(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(label, color=_INK)


def _style(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
