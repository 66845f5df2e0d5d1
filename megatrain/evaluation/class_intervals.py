"""Intervals of the scores of a confusion matrix.

Accuracy, precision and recall are proportions (Wilson). F1 of a class is 2J / (1 + J) of the proportion J = hits / (items that have the
class or are said to have it), so its interval is that of J, transformed (Hand, Christen and Kirielle 2021, "F*", arXiv:2008.00103).
Macro F1 is the mean of those; its interval is put together from theirs, with the correlation that misses give (an item of class i answered
as j is counted in both), and moved by the second-order bias of F1, which is downwards in every class and so does not average out. The
bootstrap's percentiles cover 85% for ten classes at 50 items, this 90 to 95%.

Kappa, MCC, alpha, micro and weighted F1 take the score form of `intervals` around a bootstrap standard error, resampled by a multinomial
draw over the cells of the matrix, which is the same as drawing items and does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.evaluation.confusion import SCORES, Confusion, Margins, Score, class_f1, macro_f1
from megatrain.evaluation.intervals import (
    NORMAL,
    Estimate,
    Floats,
    proportion,
    score_form,
    with_stderr,
)
from megatrain.evaluation.resampling import CELLS, SumScore, jackknife_estimate

Integers = npt.NDArray[np.integer[Any]]
RANGES = {"kappa": (-1.0, 1.0), "mcc": (-1.0, 1.0), "alpha": (-1.0, 1.0)}
"""Ranges of the scores whose range is not 0 to 1."""
RESAMPLES = 10_000


def class_estimates(confusion: Confusion, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Each score of `SCORES` with its interval, for items that are independent."""
    items = int(confusion.counts.sum())
    margins = confusion.margins
    found = {"accuracy": proportion(int(margins.hits.sum()), items), "macro_f1": macro_estimate(confusion)}
    others = [name for name in SCORES if name not in found]
    draws = resampled_scores(confusion, [SCORES[name] for name in others], resamples, seed)
    grown = np.sqrt(items / (items - 1.0)) if items > 1 else np.nan
    for name, scores in zip(others, draws, strict=True):
        stderr = float(scores.std() * grown)
        bounds = RANGES.get(name, (0.0, 1.0))
        found[name] = with_stderr(float(SCORES[name](margins)), stderr, items, bounds, "bootstrap over items, score form")
    return {name: found[name] for name in SCORES}


def clustered_class_estimates(
    confusion: Confusion, labels: Sequence[str], predictions: Sequence[str | None], clusters: Sequence[Hashable]
) -> dict[str, Estimate]:
    """As `class_estimates`, where items belong to clusters: a jackknife of whole clusters. Raises ValueError as `Confusion.of`."""
    statistics = item_margins(confusion.classes, labels, predictions)
    return {
        name: jackknife_estimate(statistics, score_of_sums(score), RANGES.get(name, (0.0, 1.0)), clusters)
        for name, score in SCORES.items()
    }


def per_class_estimates(confusion: Confusion) -> dict[str, dict[str, Estimate]]:
    """precision, recall and f1 of each class, by its name; a class without predictions or items has the interval 0 to 1 there."""
    margins, f1 = confusion.margins, _f1_estimates(confusion)
    found = {}
    for at, name in enumerate(confusion.classes):
        hits = int(margins.hits[at])
        of = {"precision": int(margins.predicted[at]), "recall": int(margins.support[at])}
        scores = {
            score: proportion(hits, items) if items else Estimate(0.0, 0.0, 1.0, float("nan"), 0, "Wilson")
            for score, items in of.items()
        }
        found[name] = {**scores, "f1": f1[at]}
    return found


def _f1_estimates(confusion: Confusion) -> list[Estimate]:
    margins = confusion.margins
    counted = margins.support + margins.predicted[:-1]
    errors = np.sqrt(_f1_covariance(confusion).diagonal())
    found = []
    for hits, both, stderr in zip(margins.hits.tolist(), counted.tolist(), errors.tolist(), strict=True):
        items = both - hits
        if not items:
            found.append(Estimate(0.0, 0.0, 1.0, float("nan"), 0, "F* of Wilson"))
            continue
        low, high = (2.0 * end / (1.0 + end) for end in score_form(hits / items, items, NORMAL))
        found.append(Estimate(2.0 * hits / both, low, high, stderr, int(items), "F* of Wilson"))
    return found


def _f1_covariance(confusion: Confusion) -> Floats:
    """[k, k] covariance of the classes' F1, by the delta method; 0 for a class that does not occur."""
    margins, size = confusion.margins, len(confusion.classes)
    hits, f1 = margins.hits, class_f1(margins)
    counted = margins.support + margins.predicted[:-1]
    safe = np.maximum(counted, 1.0)
    cells = confusion.counts[:, :size].astype(np.float64)
    covariance = np.outer(f1 / safe, f1 / safe) * (cells + cells.T)
    own = (4.0 * (1.0 - f1) ** 2 * hits + f1**2 * (counted - 2.0 * hits)) / safe**2
    np.fill_diagonal(covariance, own)
    return covariance


def macro_estimate(confusion: Confusion) -> Estimate:
    """Macro F1 with its interval, in closed form (`macro_average` with correlations: Zou and Donner 2008)."""
    classes, covariance, size = _f1_estimates(confusion), _f1_covariance(confusion), len(confusion.classes)
    spread = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    correlation = np.divide(covariance, spread, out=np.zeros((size, size)), where=spread > 0.0)
    np.fill_diagonal(correlation, 1.0)
    below, above = np.array([(one.value - one.low, one.high - one.value) for one in classes]).T
    margins = confusion.margins
    items = np.maximum(1.0, margins.support + margins.predicted[:-1] - margins.hits)
    share = margins.hits / items
    bias = float((2.0 * share * (1.0 - share) / ((1.0 + share) ** 3 * items)).mean())
    value = float(macro_f1(margins))
    low = value + bias - float(np.sqrt(below @ correlation @ below)) / size
    high = value + bias + float(np.sqrt(above @ correlation @ above)) / size
    stderr = float(np.sqrt(covariance.sum())) / size
    total = int(confusion.counts.sum())
    return Estimate(value, min(value, max(0.0, low)), max(value, min(1.0, high)), stderr, total, "F* of Wilson, correlated")


def resampled_scores(confusion: Confusion, scores: Sequence[Score], resamples: int = RESAMPLES, seed: int = 0) -> list[Floats]:
    """[resamples] of each score, of as many items drawn from the matrix with putting back."""
    rows, columns = np.nonzero(confusion.counts)
    weights = confusion.counts[rows, columns]
    items, rng = int(weights.sum()), np.random.default_rng(seed)
    block = max(1, CELLS // (len(weights) + 3 * len(confusion.classes)))
    found: list[list[Floats]] = [[] for _ in scores]
    for start in range(0, resamples, block):
        drawn = rng.multinomial(items, weights / items, size=min(block, resamples - start))
        margins = cell_margins(drawn, rows, columns, len(confusion.classes))
        for kept, score in zip(found, scores, strict=True):
            kept.append(score(margins))
    return [np.concatenate(kept) for kept in found]


def cell_margins(drawn: Integers, rows: Integers, columns: Integers, classes: int) -> Margins:
    """Margins of matrices given by their cells: counts [b, c] of the labels [c] and predictions [c] (`classes`: no class)."""
    weights = drawn.astype(np.float64)
    truth, given = np.eye(classes)[rows], np.eye(classes + 1)[columns]
    return Margins(weights @ (truth * given[:, :-1]), weights @ truth, weights @ given)


def item_margins(classes: Sequence[str], labels: Sequence[str], predictions: Sequence[str | None]) -> Floats:
    """[n, 3k + 1] hits, support and predictions of each item, whose sums `margins_of` reads."""
    places = {name: at for at, name in enumerate(classes)}
    rows = np.array([places[label] for label in labels], dtype=np.intp)
    columns = np.array(
        [len(classes) if text is None else places.get(text, len(classes)) for text in predictions], dtype=np.intp
    )
    truth, given = np.eye(len(classes))[rows], np.eye(len(classes) + 1)[columns]
    return np.concatenate((truth * given[:, :-1], truth, given), axis=1)


def score_of_sums(score: Score) -> SumScore:
    """A score [b] of sums [b, 3k + 1] of `item_margins`."""
    return lambda sums: score(margins_of(sums))


def margins_of(sums: Floats) -> Margins:
    """Margins of sums [..., 3k + 1] of `item_margins`."""
    size = (sums.shape[-1] - 1) // 3
    return Margins(sums[..., :size], sums[..., size : 2 * size], sums[..., 2 * size :])
