"""Two models on the same items: the difference with its interval, whether it could be chance, and what could have been seen.

Paired, for two models find the same items hard, and what they share cancels out (Miller 2024, arXiv:2411.00640, section 4).

| score | p-value | interval of the difference |
|---|---|---|
| right or wrong | McNemar's mid-p over the items that one alone has right (Fagerland 2013) | Tango's score interval (1998) |
| mean of a score | paired t over items or clusters, no less than signs allow | Student, the same standard error |
| F1, BLEU, chrF, bits per byte: sums | swapping answers at random (Riezler and Maxwell 2005) | Student, paired bootstrap's standard error |

False alarms at p < 0.05 are under 6% in simulation at 50, 200 and 2,000 items, also where nearly all items are equal
(tests/evaluation/test_coverage.py). Test and interval are two computations and may differ where p is within a hair of 0.05; the
verdict is the test's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatrain.evaluation.distributions import normal_quantile, sign_mid_p, student_quantile, student_tail
from megatrain.evaluation.intervals import NORMAL, SIDE, Floats, cluster_sums, spread_freedom
from megatrain.evaluation.resampling import RESAMPLES, SumScore, bootstrap_stderr, swap_p

POWER = normal_quantile(0.8)
LEVEL = 0.05
SHOWN = 3
"""Items named in an error, at most."""


class UnpairedError(ValueError):
    """Two results are not of the same items."""


@dataclass(frozen=True)
class PairedDifference:
    """The second model's score less the first's, on the same items."""

    first: float
    second: float
    value: float
    low: float
    high: float
    stderr: float
    p: float
    """Probability of a difference at least as large where there is none; 1 where nothing can be said."""
    detectable: float
    """The smallest true difference that would be seen four times in five (80% power) at p < 0.05, with so many items as these."""
    units: int
    """Independent units: items, or clusters."""
    test: str

    @property
    def seen(self) -> bool:
        """Whether the difference is more than chance would explain (p < 0.05)."""
        return self.p < LEVEL

    def verdict(
        self, first: str = "the first", second: str = "the second", unit: float = 1.0, lower_is_better: bool = False
    ) -> str:
        """The comparison in a sentence; unit: what scores are multiplied by to be read, such as 100 for percent."""
        if self.units < 2:
            return f"Nothing can be told of {first} and {second}: one unit says nothing of others. Evaluate more items."
        value, low, high, least = (unit * number for number in (self.value, self.low, self.high, self.detectable))
        between = f"(95%: {low:+.3g} to {high:+.3g}; p = {self.p:.2g}, {self.test}, {self.units} units)"
        if not self.seen:
            same = "gives exactly as much as" if value == 0.0 else f"differs by {value:+.3g} from"
            return (
                f"No difference can be told: {second} {same} {first} {between}. With these items, a difference of {least:.2g} would be "
                "seen four times in five."
            )
        better = second if (value > 0.0) != lower_is_better else first
        worse = first if better is second else second
        return f"{better} is better than {worse}: {second} less {first} is {value:+.3g} {between}."


def among_all(p_values: Sequence[float]) -> list[float]:
    """p-values of comparisons made together, such that one below 0.05 is no more likely by chance than for one alone (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1 and so on, none below the one before; right however they depend on each other.
    """
    found, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found


def pairing(first: Sequence[str], second: Sequence[str], first_task: str = "", second_task: str = "") -> npt.NDArray[np.intp]:
    """[n] places in `second` of the items (ids) of `first`. Raises UnpairedError unless both are the same items of one task (its hash)."""
    if first_task != second_task:
        raise UnpairedError(
            f"the two results are of different tasks: hash {first_task!r} and {second_task!r}. Evaluate both alike."
        )
    places = {item: at for at, item in enumerate(second)}
    own = set(first)
    if len(own) != len(first) or len(places) != len(second):
        raise UnpairedError(
            f"{len(first) - len(own)} and {len(second) - len(places)} items have the id of another one. Give each its own."
        )
    lost = [item for item in first if item not in places]
    new = [item for item in second if item not in own]
    if lost or new or not first:
        raise UnpairedError(
            f"the two results are of {len(first)} and {len(second)} items, {len(own) - len(lost)} of them the same: {len(lost)} only in "
            f"the first {lost[:SHOWN]}, {len(new)} only in the second {new[:SHOWN]}. Evaluate both with the same limit and seed."
        )
    return np.array([places[item] for item in first], dtype=np.intp)


def compare_proportions(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
    """Compare two models by whether each has each item right ([n], [n])."""
    before, after = _pair(first, second)
    if not np.isin((before, after), (0.0, 1.0)).all():
        raise ValueError("right or wrong is 1 or 0 for each item; other scores are compared by `compare_means`.")
    items, gained, lost = len(before), int((after > before).sum()), int((after < before).sum())
    value = (gained - lost) / items
    # The share of items that differ, with one more item that does and one that does not, for none seen is not none at all.
    differing = (gained + lost + 1.0) / (items + 2.0)
    return PairedDifference(
        first=float(before.mean()),
        second=float(after.mean()),
        value=value,
        low=-_tango(lost, gained, items),
        high=_tango(gained, lost, items),
        stderr=math.sqrt(max(0.0, (gained + lost) / items - value * value) / items),
        p=sign_mid_p(gained, lost),
        detectable=min(1.0, (NORMAL + POWER) * math.sqrt(differing / items)),
        units=items,
        test="McNemar's mid-p",
    )


def _tango(gained: int, lost: int, items: int) -> float:
    """Upper end of Tango's interval of (gained - lost) / items: where the score statistic is 1.96 (Tango 1998, Statist. Med. 17:891)."""
    low, high = (gained - lost) / items, 1.0
    while high - low > 1e-12:
        middle = 0.5 * (low + high)
        a, b, c = 2.0 * items, -gained - lost + (2.0 * items - gained + lost) * middle, -lost * middle * (1.0 - middle)
        rare = (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a)
        variance = items * (2.0 * rare + middle * (1.0 - middle))
        far = items * middle - (gained - lost)
        low, high = (middle, high) if far * far < NORMAL * NORMAL * variance else (low, middle)
    return high


def compare_means(first: npt.ArrayLike, second: npt.ArrayLike, clusters: Sequence[Hashable] | None = None) -> PairedDifference:
    """Compare two models by their scores of each item ([n], [n]): paired t, over clusters where given.

    t takes differences for nearly normal. Where a few of them make most of the spread, its degrees of freedom are those that `ratio` has;
    and with d units that differ, no test of their signs gives less than 2^(1-d), and neither does this one. What no test can know is
    a large difference too rare to be among the items.
    """
    before, after = _pair(first, second)
    gaps = after - before
    value = float(gaps.mean())
    sums = cluster_sums(gaps[:, None], clusters)[:, 0]
    spread = cluster_sums((gaps - value)[:, None], clusters)[:, 0]
    units, differing = len(sums), int(np.count_nonzero(sums))
    if units < 2:
        stderr, p, half, detectable = math.nan, 1.0, math.inf, math.inf
    else:
        stderr = math.sqrt(float(spread @ spread) * units / (units - 1)) / len(gaps)
        freedom = spread_freedom(spread)
        p = max(_t_tail(value, stderr, freedom), 2.0 ** (1 - differing)) if differing else 1.0
        half, detectable = student_quantile(SIDE, freedom) * stderr, _detectable(stderr, freedom)
    clustered = "" if clusters is None else " over clusters"
    return PairedDifference(
        float(before.mean()),
        float(after.mean()),
        value,
        value - half,
        value + half,
        stderr,
        p,
        detectable,
        units,
        f"paired t{clustered}",
    )


def compare_sums(
    first: Floats,
    second: Floats,
    score: SumScore,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Compare two models by a score of sums, such as BLEU, from their statistics of each item ([n, k], [n, k]).

    The p-value has 10 swaps for each resample.
    """
    if first.shape != second.shape or not len(first):
        raise UnpairedError(
            f"statistics of the shapes {first.shape} and {second.shape} are not of the same items. Give both models' of each item."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(
            "statistics that are not finite have no sums to compare: a model gave an item an infinite or undefined loss."
        )
    before, after = cluster_sums(first, clusters), cluster_sums(second, clusters)
    width, units = before.shape[1], len(before)
    start, end = (float(score(sums.sum(axis=0)[None])[0]) for sums in (before, after))
    if np.array_equal(before, after):
        stderr = 0.0 if units > 1 else math.nan
    else:
        together = np.concatenate((before, after), axis=1)
        stderr = bootstrap_stderr(together, lambda sums: score(sums[:, width:]) - score(sums[:, :width]), resamples, seed)
    half = student_quantile(SIDE, units - 1.0) * stderr if units > 1 else math.inf
    p = swap_p(before, after, score, 10 * resamples, seed)
    detectable = _detectable(stderr, units - 1.0) if units > 1 else math.inf
    return PairedDifference(
        start, end, end - start, end - start - half, end - start + half, stderr, p, detectable, units, "swapped answers"
    )


def _t_tail(value: float, stderr: float, freedom: float) -> float:
    if value == 0.0:
        return 1.0
    return student_tail(value / stderr, freedom) if stderr > 0.0 else 0.0


def _detectable(stderr: float, freedom: float) -> float:
    """(t at 97.5% + t at 80%) standard errors."""
    return (student_quantile(SIDE, freedom) + student_quantile(0.8, freedom)) * stderr


def _pair(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Floats, Floats]:
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise UnpairedError(
            f"scores of the shapes {before.shape} and {after.shape} are not of the same items. Give one number for each item and model."
        )
    bad = ~(np.isfinite(before) & np.isfinite(after))
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"scores must be numbers: item {at} of {len(before)} has {before[at]} and {after[at]} ({int(bad.sum())} such items)."
        )
    return before, after
