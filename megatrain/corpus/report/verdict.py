"""Says how far raters agree, in lines of text and as a list of the items on which they do not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from megatrain.corpus.report.agreement import (
    MISSING,
    Floats,
    Level,
    cohen_kappa,
    confusion,
    disagreements,
    fleiss_kappa,
    krippendorff_alpha,
    majorities,
    percent_agreement,
)
from megatrain.corpus.report.labelled import Labelled
from megatrain.files import printable

MOST_LABELS, MOST_PAIRS, WIDTH = 12, 10, 16
"""Labels of a printed matrix, pairs of raters, characters of a name."""


def verdict(given: Labelled, level: Level = "nominal") -> str:
    """The measures of agreement as lines of text, with a matrix of the labels."""
    codes, labels = given.codes, len(given.labels)
    counts = np.bincount(codes[codes != MISSING], minlength=labels)
    each = ", ".join(
        f"{_name(label)} {count:,}" for label, count in zip(given.labels[:MOST_LABELS], counts.tolist(), strict=False)
    )
    both = int(((codes != MISSING).sum(axis=1) > 1).sum())
    alpha = krippendorff_alpha(codes, given.values, level)
    fleiss, raters, items = fleiss_kappa(codes, labels)
    differ = disagreements(codes)
    tied = int((majorities(codes, labels)[differ] == MISSING).sum())
    lines = [
        f"{len(given.items):,} items, {len(given.raters)} raters, {int(counts.sum()):,} labels ({int((codes == MISSING).sum()):,} "
        f"missing): {each}{', ...' if labels > MOST_LABELS else ''}",
        f"  percent agreement     {100 * percent_agreement(codes, labels):.1f}%  of the pairs of labels of {both:,} items",
        _cohen(given),
        f"  Fleiss' kappa         {_measure(fleiss)}  of the {items:,} items with {raters} labels",
        f"  Krippendorff's alpha  {_measure(alpha)}  {level}",
        f"  disagreements         {len(differ):,} items, {tied:,} of them without a majority",
        *_matrix(given),
    ]
    return "\n".join([*lines, _advice(alpha)])


def _cohen(given: Labelled) -> str:
    pairs = list(itertools.combinations(range(len(given.raters)), 2))
    kappas = [cohen_kappa(given.codes[:, one], given.codes[:, two], len(given.labels)) for one, two in pairs]
    known = [kappa for kappa in kappas if not math.isnan(kappa)]
    mean = sum(known) / len(known) if known else math.nan
    if len(pairs) == 1:
        return f"  Cohen's kappa         {_measure(mean)}"
    rising = sorted(zip(kappas, pairs, strict=True), key=lambda pair: (math.isnan(pair[0]), pair[0]))[:MOST_PAIRS]
    shown = (f"{_name(given.raters[one])} and {_name(given.raters[two])} {_measure(kappa)}" for kappa, (one, two) in rising)
    return f"  Cohen's kappa         {_measure(mean)}  mean of {len(known)} pairs; the lowest: {', '.join(shown)}"


def _matrix(given: Labelled) -> Iterator[str]:
    """How often each two labels met: of two raters by who gave which, of more than two in all pairs, both ways."""
    labels = len(given.labels)
    total: Floats = np.zeros((labels, labels))
    for one, two in itertools.combinations(range(len(given.raters)), 2):
        total += confusion(given.codes[:, one], given.codes[:, two], labels)
    two_raters = len(given.raters) == 2
    total = total if two_raters else total + total.T
    names = [_name(label) for label in given.labels[:MOST_LABELS]]
    width = max(7, *map(len, names))
    if two_raters:
        yield f"items by label of {_name(given.raters[0])} (rows) and {_name(given.raters[1])} (columns)"
    else:
        yield "pairs of labels of one item, counted both ways"
    yield "  " + " " * width + "".join(f" {name:>{width}}" for name in names)
    for name, row in zip(names, total.tolist(), strict=False):
        yield f"  {name:<{width}}" + "".join(f" {int(number):>{width},}" for number in row[:MOST_LABELS])
    if labels > MOST_LABELS:
        yield f"  and {labels - MOST_LABELS} labels more"


def _advice(alpha: float) -> str:
    """The reading of alpha that Krippendorff (Content Analysis, 2004, p. 241) recommends."""
    if math.isnan(alpha):
        return "All labels that can be compared are the same, so chance would agree as well: no measure but percent agreement."
    if alpha >= 0.8:
        return "alpha is 0.8 or more: the labels can be relied on (Krippendorff)."
    if alpha >= 0.667:
        return "alpha is between 0.667 and 0.8: good for tentative conclusions alone (Krippendorff)."
    return "alpha is below 0.667: too low to rely on. Read the disagreements, sharpen the instructions, and label anew."


def disagreement_lines(given: Labelled) -> str:
    """A line of JSON for each item on which raters differ: item, majority (null: a tie), labels by rater. Most divided first."""
    codes = given.codes
    majority = majorities(codes, len(given.labels)).tolist()

    def agreeing(item: int) -> float:
        return percent_agreement(codes[item : item + 1], len(given.labels))

    order = sorted(disagreements(codes).tolist(), key=lambda item: (agreeing(item), item))
    return "".join(_line({**_labelled(given, item, majority), "labels": _by_rater(given, item)}) for item in order)


def majority_lines(given: Labelled) -> str:
    """A line of JSON for each item: item, majority (null: a tie), number of labels."""
    majority = majorities(given.codes, len(given.labels)).tolist()
    count = (given.codes != MISSING).sum(axis=1).tolist()
    return "".join(_line({**_labelled(given, item, majority), "raters": count[item]}) for item in range(len(given.items)))


def _labelled(given: Labelled, item: int, majority: Sequence[int]) -> dict[str, object]:
    return {"item": given.items[item], "majority": None if majority[item] == MISSING else given.labels[majority[item]]}


def _by_rater(given: Labelled, item: int) -> dict[str, str]:
    row = zip(given.raters, given.codes[item].tolist(), strict=True)
    return {rater: given.labels[code] for rater, code in row if code != MISSING}


def _line(values: dict[str, object]) -> str:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def _measure(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _name(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 3]}..."
