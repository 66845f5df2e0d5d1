"""Draws each step of the worked example, a b a c a b: docs/images/ngram.png.

python docs/benchmarks/ngram_picture.py --output docs/images/ngram.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.ngram.discounts import Discounts
from megatrain.ngram.estimate import interpolate, unigrams
from megatrain.ngram.grams import count_part, parts_of
from megatrain.ngram.tables import Tables
from megatrain.ngram.text import number_text

TEXT = b"a b a c a b\n"
GIVEN = Discounts((0.5, 1.0, 1.5), fallback=True)


def draw(path: Path) -> None:
    """Counts, what is taken from them, and where it goes."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "text").write_bytes(TEXT)
        corpus = number_text([work / "text"], work)
        parts = parts_of(corpus.counts, 1 << 20)
        tables = Tables(corpus, 2, parts, [count_part(corpus.ids, part, 2, work) for part in parts], work)
        words = unigrams(tables, GIVEN, 0)
        tables.find_prefixes(2, 1 << 20)
        interpolate(tables, 2, words, GIVEN, 0, 1 << 20)
        (files,) = (tables.files(part) for part in parts)
        first, last = files.column(2, "first").read(), files.column(2, "suffix").read()
        raw, mass, scale = files.column(2, "raw").read(), tables.whole(2, "u").read(), tables.whole(2, "scale").read()
        spelled = [word.decode() for word in corpus.vocabulary.words.to_pylist()]
        figure = Figure(figsize=(12, 7.5), dpi=100, layout="constrained")
        (one, two), (three, four) = figure.subplots(2, 2)
        bigrams = [f"{spelled[a]} {spelled[b]}" for a, b in zip(first, last, strict=True)]
        _bars(one, bigrams, [raw], ["raw count"], "1  bigrams, and how often each occurs")
        known = [n for n in range(len(spelled)) if tables.adjusted[n]]
        _bars(
            two,
            [spelled[n] for n in known],
            [tables.raw[known], tables.adjusted[known]],
            ["occurrences", "distinct words before it: the adjusted count"],
            "2  a word counts by how many words it follows",
            stacked=False,
        )
        gamma = float(GIVEN.of(tables.adjusted[known].astype(np.uint32)).sum() / tables.adjusted.sum())
        left = words.probability[known] - gamma / (len(spelled) - 1)
        _bars(
            three,
            [spelled[n] for n in known] + ["<unk>"],
            [np.append(left, 0), np.full(len(known) + 1, gamma / (len(spelled) - 1))],
            ["(adjusted - discount) / 6", f"gamma / 5 = {gamma / 5:g}: for every word, an unknown one too"],
            "3  unigrams: the discounts are spread over all words",
        )
        below = words.probability[last]
        _bars(
            four,
            [f"p({spelled[b]} | {spelled[a]})" for a, b in zip(first, last, strict=True)],
            [mass, scale * below],
            ["(count - discount) / count of the context", "gamma(context) x p of the unigram"],
            "4  bigrams: what is taken goes to the shorter n-gram",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _bars(
    axes: Axes, names: list[str], values: list[np.ndarray], labels: list[str], title: str, *, stacked: bool = True
) -> None:
    """Bars on or beside one another, with their heights."""
    at, under = np.arange(len(names)), np.zeros(len(names))
    width = 0.7 if stacked else 0.7 / len(values)
    for number, (heights, label) in enumerate(zip(values, labels, strict=True)):
        bottom = under if stacked else 0
        bars = axes.bar(at + (0 if stacked else (number - 0.5) * width), heights, width, bottom=bottom, label=label)
        if not stacked or number == len(values) - 1:
            totals = under + heights if stacked else heights
            axes.bar_label(bars, [f"{value:.4g}" for value in totals], fontsize=8)
        under = under + heights
    axes.set_xticks(at, names, fontsize=9)
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8)
    axes.margins(y=0.25)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
