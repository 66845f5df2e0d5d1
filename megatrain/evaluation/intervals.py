"""How much a score says beyond its items: 95% intervals of proportions, means, ratios and what sums of statistics give.

An evaluation's items are a sample of all that could have been asked, and the interval is about those (Miller 2024, "Adding Error Bars to
Evals", arXiv:2411.00640). Items that belong together (questions about one passage, sentences of one document) are a cluster: the
clusters are the independent units, their sums are what varies.

A normal interval, value +- 1.96 standard errors, covers too little where items are few or scores near the end of their range
(arXiv:2503.01747). What is used instead, each with 93 to 97% coverage in simulation at 50, 200 and 2,000 units (tests/evaluation/
test_coverage.py; docs/metrics.md has the figures):

- proportions: Wilson's score interval (Wilson 1927);
- all other scores with a range, such as token F1, kappa or BLEU: the same score form, at the number of items that a proportion of the
  same value would need for the same standard error, n' = v (1 - v) / stderr^2 (Korn and Graubard 1998 for surveys), and Student's
  quantile in place of the normal one. For zeros and ones it is Wilson's interval to the quantile;
- ratios of sums without an upper end, such as bits per byte: jackknife and Student's quantile on the logarithm, with the degrees of
  freedom that so uneven units are worth.

Percentiles of the bootstrap were tried and left: 85% for macro F1 of ten classes at 50 items, 93% for kappa.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatrain.evaluation.distributions import normal_quantile, student_quantile

Floats = npt.NDArray[np.float64]
SIDE = 0.975
"""Each end of a 95% interval is the quantile of this probability."""
NORMAL = normal_quantile(SIDE)
ROUNDING = 1e-9
"""A score may be so far out of its bounds."""


@dataclass(frozen=True)
class Estimate:
    """A score, and the 95% interval of what it would be over all that could have been asked."""

    value: float
    low: float
    high: float
    stderr: float
    """Standard error, in the score's unit."""
    units: int
    """Independent units it is of: items, or clusters of items."""
    method: str
    """How the interval was made, in words."""


def proportion(right: int, items: int) -> Estimate:
    """Share of items, with Wilson's interval: (p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    All right or all wrong give an interval, too: 0 of 10 is 0 to 0.28. stderr: sqrt(p (1-p)/n). Raises ValueError without items.
    """
    if not 0 <= right <= items or items < 1:
        raise ValueError(f"{right} of {items} items is no proportion. There must be at least one item.")
    share = right / items
    low, high = score_form(share, items, NORMAL)
    return Estimate(share, low, high, math.sqrt(share * (1.0 - share) / items), items, "Wilson")


def score_form(value: float, items: float, quantile: float) -> tuple[float, float]:
    """Ends of the score interval of a value within 0 and 1 that is worth a proportion of `items` items."""
    if math.isinf(items):
        return value, value
    square = quantile * quantile / items
    middle = (value + square / 2.0) / (1.0 + square)
    half = math.sqrt(max(0.0, value * (1.0 - value)) * square + square * square / 4.0) / (1.0 + square)
    return min(value, max(0.0, middle - half)), max(value, min(1.0, middle + half))


def mean(
    values: npt.ArrayLike, clusters: Sequence[Hashable] | None = None, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> Estimate:
    """Mean of a score of each item ([n]), clustered if `clusters` says what each item belongs to.

    bounds: the least and greatest value that a score can have; None: without ends, for which the interval is value +- Student's quantile
    times the standard error. The standard error is sqrt(G / (G-1) sum over clusters of (sum of (x - mean))^2) / n, for G clusters;
    without clusters the usual s / sqrt(n).

    With one unit, or units that do not differ, nothing is known of the spread: with bounds the interval is that of a proportion of so
    many units, without them it is infinite (one unit) or empty. Raises ValueError for no items and for values that are not numbers or
    out of bounds.
    """
    scores = _numbers(values, "values")
    if bounds is not None and (scores.min() < bounds[0] - ROUNDING or scores.max() > bounds[1] + ROUNDING):
        raise ValueError(
            f"a score of {scores.min():g} to {scores.max():g} is out of its bounds {bounds[0]:g} to {bounds[1]:g}. Give `bounds`."
        )
    value = float(scores.mean())
    sums = cluster_sums((scores - value)[:, None], clusters)[:, 0]
    units = len(sums)
    stderr = math.sqrt(float(sums @ sums) * units / (units - 1)) / len(scores) if units > 1 else math.nan
    clustered = "" if clusters is None else ", clustered"
    return with_stderr(value, stderr, units, bounds, f"mean, Student{clustered}")


def with_stderr(
    value: float, stderr: float, units: int, bounds: tuple[float, float] | None, method: str, freedom: float | None = None
) -> Estimate:
    """The interval of a value whose standard error is known; `nan` where it is not (one unit). See `mean`.

    freedom: degrees of freedom of the standard error, units - 1 if None.
    """
    freedom = float(max(1, units - 1)) if freedom is None else freedom
    quantile = student_quantile(SIDE, freedom)
    if bounds is None:
        half = math.inf if math.isnan(stderr) else quantile * stderr
        return Estimate(value, value - half, value + half, stderr, units, method)
    low, width = bounds[0], bounds[1] - bounds[0]
    share, spread = min(1.0, max(0.0, (value - low) / width)), stderr / width
    known = spread > 1e-12 and share * (1.0 - share) > 0.0  # false for nan
    # No score within bounds varies more than zeros and ones do, so no value is worth fewer items than there are units.
    items = share * (1.0 - share) / (spread * spread) if known else float(units)
    ends = score_form(share, items, quantile if known else NORMAL)
    return Estimate(value, low + width * ends[0], low + width * ends[1], stderr, units, method)


def ratio(numerators: npt.ArrayLike, denominators: npt.ArrayLike, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Sum of numerators over sum of denominators of items ([n], [n]), both not negative: nats per token, bits per byte.

    The standard error is the jackknife's over units, sqrt((G-1)/G sum d^2) with d the ratio without a unit less the ratio; the interval
    is exp(log(value) +- t stderr / value). Long documents weigh more, so that the standard error rests on fewer than G units: its degrees
    of freedom are min(G - 1, 3 (sum d^2)^2 / sum d^4), which are G for units whose d are normal (Satterthwaite 1946). One unit: from 0 to
    infinity. Raises ValueError for negative numbers, no items and a sum of denominators of 0.
    """
    tops, bottoms = _numbers(numerators, "numerators", infinite=True), _numbers(denominators, "denominators")
    if len(tops) != len(bottoms) or tops.min() < 0.0 or bottoms.min() < 0.0 or not bottoms.sum() > 0.0:
        raise ValueError(
            f"{len(tops)} numerators (least {tops.min():g}) over {len(bottoms)} denominators (least {bottoms.min():g}, sum "
            f"{bottoms.sum():g}) have no ratio. Give as many of both, none negative, and a sum above 0."
        )
    sums = cluster_sums(np.stack((tops, bottoms), axis=1), clusters)
    sums = sums[sums[:, 1] > 0.0] if not sums[sums[:, 1] == 0.0, 0].any() else sums
    units, (top, bottom) = len(sums), sums.sum(axis=0)
    value, method = float(top / bottom), "ratio of sums, jackknife" + ("" if clusters is None else ", clustered")
    if math.isinf(value) or value == 0.0 or units == 1:
        ends = (0.0, math.inf) if units == 1 and not math.isinf(value) else (value, value)
        return Estimate(value, *ends, math.nan, units, method)
    without = np.divide(top - sums[:, 0], bottom - sums[:, 1], out=np.full(units, value), where=bottom - sums[:, 1] > 0.0)
    moved = without / value - (without / value).mean()
    relative = math.sqrt((units - 1) / units * float(moved @ moved))
    grown = math.exp(min(700.0, student_quantile(SIDE, spread_freedom(moved)) * relative))
    return Estimate(value, value / grown, value * grown, value * relative, units, method)


def spread_freedom(moved: Floats) -> float:
    """Degrees of freedom of a standard error that is made of units' deviations [G], at least 2: min(G - 1, 3 (sum d^2)^2 / sum d^4).

    They are about G for normal deviations, and few where some are far larger than others.
    """
    squares = (moved / np.abs(moved).max()) ** 2 if moved.any() else np.ones(len(moved))
    return max(1.0, min(len(moved) - 1.0, 3.0 * float(squares.sum()) ** 2 / float(squares @ squares)))


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, such as the perplexity of nats per token; the standard error by the delta method. Too large is infinite."""
    value, low, high = (
        math.exp(number) if number < 700.0 else math.inf for number in (estimate.value, estimate.low, estimate.high)
    )
    return replace(estimate, value=value, low=low, high=high, stderr=value * estimate.stderr)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in another unit: times a positive factor."""
    return replace(
        estimate,
        value=factor * estimate.value,
        low=factor * estimate.low,
        high=factor * estimate.high,
        stderr=factor * estimate.stderr,
    )


def macro_average(estimates: Sequence[Estimate]) -> Estimate:
    """Plain mean of the scores of independent tasks, each counting the same.

    Its interval is made of theirs, so that it is as lopsided as they are: mean - sqrt(sum (value - low)^2) / T, and alike above (Zou and
    Donner 2008, doi:10.1002/sim.3095). It is about these tasks and more items of them, not about other tasks. Raises ValueError for none.
    """
    if not estimates:
        raise ValueError("the average of no task cannot be said. Give at least one.")
    number = len(estimates)
    value = sum(one.value for one in estimates) / number
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in estimates)) / number
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in estimates)) / number
    stderr = math.sqrt(sum(one.stderr**2 for one in estimates)) / number
    return Estimate(value, value - below, value + above, stderr, number, "mean of independent tasks")


def cluster_sums(statistics: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    """[G, k] sums of the items' statistics [n, k] in each cluster, in the order in which clusters appear; the items themselves if None.

    Raises ValueError if there is not one cluster for each item.
    """
    if clusters is None:
        return statistics
    if len(clusters) != len(statistics):
        raise ValueError(f"{len(statistics)} items, but clusters of {len(clusters)}. Name the cluster of each item.")
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)
    sums: Floats = np.zeros((len(numbers), statistics.shape[1]))
    np.add.at(sums, places, statistics)
    return sums


def _numbers(values: npt.ArrayLike, name: str, infinite: bool = False) -> Floats:
    """[n] numbers, at least one. Raises ValueError."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"{name} must be a list of at least one number; they have the shape {numbers.shape}.")
    bad = np.isnan(numbers) if infinite else ~np.isfinite(numbers)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"{name} must be numbers: item {at} of {len(numbers)} is {numbers[at]} ({int(bad.sum())} such items).")
    return numbers
