"""Draws what a GLM reads and sees, and what it gains: docs/images/glm.png and, from the runs of glm_context.py, glm_context.png.

python docs/benchmarks/glm_picture.py --output docs/images/glm.png
python docs/benchmarks/glm_picture.py --runs runs/glm_context --output docs/images/glm_context.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.data.draws import Draws
from megatrain.data.samples.infilling import InfillingText, Rules, Sentinels, fill_blanks
from megatrain.data.samples.spans import Spans
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.records.rows import read_metrics

WORDS = ["def", "area", "(", "width", ",", "height", ")", ":", "return", "width", "*", "height"]
IDS = Sentinels(cls=100, eos=101, mask=102, gmask=103, smask=104, sop=105, eop=106, noise=107)
NAMES = {IDS.cls: "[CLS]", IDS.mask: "[MASK]", IDS.sop: "<sop>", IDS.eop: "<eop>"}
BLANKS = Spans(np.array([4, 9]), np.array([3, 1]))
"""width , height; and return."""


def example() -> InfillingText:
    """A line of code with two blanks, as a batch has it."""
    text = np.array([IDS.cls, *range(len(WORDS))])
    return fill_blanks(Draws(2), text, BLANKS, IDS.mask, IDS, Rules())


def word(token: int) -> str:
    """A token as it is shown."""
    return NAMES.get(token) or WORDS[token]


def draw_step(path: Path) -> None:
    """Mask, tokens, targets and positions of one text."""
    laid = example()
    size = len(laid)
    figure = Figure(figsize=(13, 8.5), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1.1])
    _mask(above, laid, size)
    _rows(below, laid, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _mask(axes: Axes, laid: InfillingText, size: int) -> None:
    mask = AttentionMask(prefix=torch.tensor([laid.sep]))
    seen = mask.allowed(torch.arange(size), torch.arange(size))[0].numpy()
    part = np.where(np.arange(size)[:, None] < laid.sep, 1, 2)
    axes.imshow(np.where(seen, part, 0), cmap="Blues", vmin=0, vmax=3)
    labels = [word(int(token)) for token in laid.tokens]
    axes.set_xticks(range(size), labels, rotation=60, ha="right")
    axes.set_yticks(range(size), labels)
    axes.axhline(laid.sep - 0.5, color="black", linewidth=0.8)
    axes.axvline(laid.sep - 0.5, color="black", linewidth=0.8)
    axes.set_title(
        "which keys (columns) each query (row) sees: part A all of A, part B all of A and what comes before in B", fontsize=11
    )


def _rows(axes: Axes, laid: InfillingText, size: int) -> None:
    rows = {
        "tokens": [word(int(token)) for token in laid.tokens],
        "targets": [word(int(t)) if w else "" for t, w in zip(laid.targets, laid.weights, strict=True)],
        "position in the text": [str(p) for p in laid.positions],
        "position in the blank": [str(p) for p in laid.block_positions],
    }
    table = axes.table(list(rows.values()), rowLabels=list(rows), loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for (row, column), cell in table.get_celld().items():
        cell.set_height(0.2)
        if column >= laid.sep:
            cell.set_facecolor("#cfe3f5" if row != 1 else "#f9e2b0")
    axes.axis("off")
    axes.set_title("one training sample: the loss counts where there is a target", fontsize=11)


def draw_curves(runs: Path, path: Path) -> None:
    """Validation loss of both contexts, each seed."""
    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for folder in sorted(runs.glob("*_[0-9]")):
        variant, seed = folder.name.split("_")
        rows = read_metrics(folder / "metrics.jsonl")[1]
        style = {"both": "-", "left": "--"}[variant]
        axes.plot(
            [r["step"] for r in rows], [r["valid_loss"] for r in rows], style, label=f"{variant}, seed {seed}", color=f"C{seed}"
        )
    axes.set(
        xlabel="step", ylabel="held-out loss on blanks, nats a target", title="seeing both sides of a blank, or the left alone"
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Draw one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the runs of glm_context.py")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.runs is None:
        draw_step(options.output)
    else:
        draw_curves(options.runs, options.output)


if __name__ == "__main__":
    main()
