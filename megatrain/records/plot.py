"""Draws RUN/loss.png: losses and learning rate of a run so far.

Figures are made without pyplot, which keeps every figure in a global list and picks a windowing backend; a training process wants neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatrain.files import printable, whole
from megatrain.records.rows import read_metrics

_INK, _FAINT, _GRID = "#22272e", "#7a828c", "#e6e8eb"
_TRAIN, _VALID, _RATE = "#2f6fb5", "#d9622b", "#4b9b6e"
_REFERENCES = ("#8a63b8", "#a08a3c", "#5d7a86", "#b05a7a")

NAME = 40
"""Characters of a name in a picture."""

_Numbers = NDArray[np.float64]


def draw_loss(metrics: Path | str, png: Path | str, references: Mapping[str, float] | None = None) -> None:
    """Draw metrics.jsonl at `metrics` as a picture at `png`, which is replaced at once and never seen half-written.

    Training loss, each step and smoothed; validation loss; the learning rate below; and a dashed line at each of `references`
    (label: nats), such as a unigram's entropy. Losses that are not finite leave gaps. Raises OSError where a file cannot be
    read or written.
    """
    steps, evaluations = read_metrics(metrics)
    figure = Figure(figsize=(9.0, 6.0), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4.5, 1.0))
    _draw_losses(upper, steps, evaluations, references or {})
    _draw_rate(lower, steps)
    last = max([1, *(row["step"] for row in (*steps[-1:], *evaluations[-1:]))])
    lower.set_xlim(0, 1.015 * last)
    figure.suptitle(_title(steps, evaluations), x=0.01, ha="left", fontsize=11, color=_INK)
    save_png(figure, Path(png))


def save_png(figure: Figure, png: Path) -> None:
    """Write a figure as a picture that is replaced at once and never seen half-written. Raises OSError."""
    with whole(png) as file:
        figure.savefig(file, format="png")


def plain_name(name: str) -> str:
    """A name as text that the font can draw, which is no formula and at most NAME long; other characters are written out."""
    font = get_font(findfont(FontProperties()))
    shown = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in printable(name))
    return (shown if len(shown) <= NAME else f"{shown[: NAME - 3]}...").replace("$", r"\$")


def smooth(values: _Numbers, window: float) -> _Numbers:
    """Mean of each value and its neighbours on both sides, weighted exp(-distance / window), so that the curve does not lag.

    A value that is not finite stays NaN and does not enter the mean of others.
    """
    known = np.isfinite(values)
    clean = np.where(known, values, 0.0)
    total = _decaying_sum(clean, window) + _decaying_sum(clean[::-1], window)[::-1] - clean
    weight = _decaying_sum(known, window) + _decaying_sum(known[::-1], window)[::-1] - known
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=known)


def _decaying_sum(values: NDArray[Any], window: float) -> _Numbers:
    """Sum of each value and those before it, weighted exp(-distance / window)."""
    decay = math.exp(-1.0 / window)
    return np.array(list(accumulate(values.tolist(), lambda total, value: total * decay + value)), dtype=np.float64)


def _draw_losses(
    axes: Axes, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], references: Mapping[str, float]
) -> None:
    at, loss = _column(steps, "step"), _column(steps, "loss")
    smoothed = smooth(loss, max(1.0, len(loss) / 100))
    few = len(loss) <= 40
    axes.plot(
        at, loss, color=_TRAIN, alpha=0.3, linewidth=0.8, marker="o" if few else "", markersize=3, label="train, each step"
    )
    axes.plot(at, smoothed, color=_TRAIN, linewidth=1.8, label="train, smoothed")
    valid_at, valid = _column(evaluations, "step"), _column(evaluations, "valid_loss")
    if len(valid):
        axes.plot(
            valid_at,
            valid,
            color=_VALID,
            linewidth=1.4,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            label="validation",
        )
    for (label, value), color in zip(references.items(), _REFERENCES * len(references), strict=False):
        axes.axhline(value, color=color, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{label} ({value:.2f})")
    _limit_losses(axes, loss, np.concatenate((loss[:1], loss[-1:], valid, np.array([*references.values()], dtype=np.float64))))
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    style_axes(axes)


def _limit_losses(axes: Axes, loss: _Numbers, always: _Numbers) -> None:
    """Set the limits to show nearly all losses, and `always`: a rare spike may leave the picture, but not flatten the rest."""
    loss = loss[np.isfinite(loss)]
    usual = np.percentile(loss, (0.5, 99.5), method="lower") if len(loss) else loss
    framed = np.concatenate((usual, always[np.isfinite(always)]))
    if not len(framed):
        return
    bottom, top = framed.min(), framed.max()
    margin = 0.05 * (top - bottom) or 0.5
    axes.set_ylim(bottom - margin, top + margin)


def _draw_rate(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    at, rate = _column(steps, "step"), _column(steps, "learning_rate")
    axes.plot(at, rate, color=_RATE, linewidth=1.4, marker="o" if len(rate) == 1 else "", markersize=3)
    axes.fill_between(at, rate, color=_RATE, alpha=0.12, linewidth=0)
    highest = np.nanmax(rate, initial=0.0)
    axes.set_ylim(0, 1.1 * highest if highest > 0 else 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("learning rate", color=_INK)
    axes.set_xlabel("step", color=_INK)
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """Grid, ticks and spines as all pictures of scores and losses have them."""
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    axes.yaxis.get_offset_text().set_color(_FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)


def _title(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not steps and not evaluations:
        return "no step yet"
    parts = [f"step {max(row['step'] for row in (*steps[-1:], *evaluations[-1:]))}"]
    if steps:
        parts.append(f"train loss {_number(steps[-1].get('loss'))}")
    if evaluations:
        parts.append(f"validation loss {_number(evaluations[-1].get('valid_loss'))}")
    if steps and steps[-1].get("tokens"):
        parts.append(f"{steps[-1]['tokens']:,} tokens")
    return "   ·   ".join(parts)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> _Numbers:
    """One field of all rows as an array; NaN where it is null or missing."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)
