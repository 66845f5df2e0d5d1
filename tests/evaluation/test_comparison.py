"""Two models on the same items: literal values, refusals, honesty about few items, and false alarms computed exactly."""

import math
from bisect import bisect_left
from functools import cache

import numpy as np
import pytest
from scipy import stats

from megatrain.evaluation.comparison import (
    PairedDifference,
    UnpairedError,
    among_all,
    compare_means,
    compare_proportions,
    compare_sums,
    pairing,
)
from megatrain.evaluation.distributions import sign_mid_p


def answers(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + lost) + [False] * (gained + neither)
    second = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return first, second


def test_mcnemar_and_tango() -> None:
    found = compare_proportions(*answers(both=1, lost=1, gained=7, neither=12))
    assert (found.first, found.second, found.value) == pytest.approx((2 / 21, 8 / 21, 6 / 21))
    assert found.p == pytest.approx((2 * 9 - 8) / 2**8, abs=1e-12)  # 1 or 8 ways of 2^8 to have none or one lost
    assert found.seen


def test_tango_ends_where_the_score_statistic_is_196() -> None:
    for lost, gained, items in ((1, 7, 21), (0, 0, 50), (3, 90, 200), (0, 5, 5), (0, 1, 1)):
        found = compare_proportions(*answers(0, lost, gained, items - lost - gained))
        swapped = compare_proportions(*answers(0, gained, lost, items - lost - gained))
        assert (found.low, found.high) == pytest.approx((-swapped.high, -swapped.low), abs=1e-9)
        for end in (found.low, found.high):
            if abs(end) > 1 - 1e-6:
                continue
            # the nuisance probability by brute force: the likelihood of (lost, gained, rest) given the difference
            grid = np.linspace(max(0.0, -end), (1 - end) / 2, 200_001)[1:-1]
            likelihood = lost * np.log(grid) + gained * np.log(grid + end) + (items - lost - gained) * np.log1p(-2 * grid - end)
            rare = float(grid[np.nanargmax(likelihood)])
            deviation = (gained - lost - items * end) / math.sqrt(items * (2 * rare + end * (1 - end)))
            assert abs(deviation) == pytest.approx(1.96, abs=2e-3)


@cache
def alarms_of(number: int) -> float:
    """Probability of p < 0.05 where so many items differ."""
    fewest = bisect_left(range(number // 2 + 1), True, key=lambda fewer: sign_mid_p(fewer, number - fewer) >= 0.05) - 1
    return 2 * float(stats.binom.cdf(fewest, number, 0.5)) if fewest >= 0 else 0.0


@pytest.mark.parametrize("items", [50, 200, 2000])
@pytest.mark.parametrize("differing", [0.005, 0.02, 0.1, 0.3, 0.6, 0.9])
def test_false_alarms_of_mcnemar_are_under_6_percent(items: int, differing: float) -> None:
    """Exactly: over how many items differ, and how many of them either model alone has right. (6.5% if all of 50 differ.)"""
    numbers = np.arange(items + 1)
    alarms = float(stats.binom.pmf(numbers, items, differing) @ [alarms_of(number) for number in numbers.tolist()])
    assert alarms < 0.06
    assert alarms > 0.03 or items * differing < 10


def test_means_are_scipys_paired_t() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0.5, 0.2, 300)
    after = before + rng.normal(0.02, 0.1, 300)
    found = compare_means(before, after)
    assert found.p == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=0.05)
    interval = stats.ttest_rel(after, before).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert found.detectable == pytest.approx(2.8 * found.stderr, rel=0.01)
    clustered = compare_means(before, after, clusters=np.arange(300) // 3)
    assert clustered.units == 100


def test_few_items_cannot_prove_much() -> None:
    assert compare_means([0.0] * 4, [1.0] * 4).p == 2**-3
    assert compare_means([0.0] * 4, [1.0, 1.0, 1.0, 0.9]).p == 2**-3
    assert compare_means([0.0] * 9, [1.0] * 9).p == 2**-8
    one = compare_means([0.0], [1.0])
    assert (one.p, one.low, one.high, one.detectable) == (1.0, -math.inf, math.inf, math.inf)
    assert compare_proportions([False], [True]).p == 0.5
    assert compare_proportions([False], [True]).detectable == 1.0


def test_equal_models_are_equal() -> None:
    scores = [0.1, 0.5, 1.0, 0.0]
    assert (compare_means(scores, scores).p, compare_means(scores, scores).value) == (1.0, 0.0)
    same = compare_proportions([True] * 50, [True] * 50)
    assert (same.p, same.value) == (1.0, 0.0)
    assert same.low == -same.high
    assert 0.05 < same.high < 0.1  # nothing seen in 50 items is not nothing
    assert same.detectable > 0.0
    statistics = np.ones((5, 2))
    found = compare_sums(statistics, statistics, lambda sums: sums[:, 0] / sums[:, 1])
    assert (found.p, found.low, found.high) == (1.0, 0.0, 0.0)


def test_sums_agree_with_means_where_both_apply() -> None:
    rng = np.random.default_rng(3)
    before, after = rng.random(120), rng.random(120) + 0.08
    stacked = [np.stack((scores, np.ones(120)), axis=1) for scores in (before, after)]
    sums = compare_sums(*stacked, lambda sums: sums[:, 0] / sums[:, 1], resamples=2000)
    means = compare_means(before, after)
    assert (sums.value, sums.stderr) == (pytest.approx(means.value), pytest.approx(means.stderr, rel=0.05))
    assert sums.p == pytest.approx(means.p, abs=0.01)
    assert sums == compare_sums(*stacked, lambda sums: sums[:, 0] / sums[:, 1], resamples=2000)
    assert compare_sums(*stacked, lambda sums: sums[:, 0] / sums[:, 1], clusters=np.arange(120) // 2).units == 60


def test_a_swap_of_few_items_has_the_exact_p_value() -> None:
    first = np.array([[0.0, 1.0]] * 20)
    second = first.copy()
    second[:4, 0] = 1.0
    found = compare_sums(first, second, lambda sums: sums[:, 0] / sums[:, 1], resamples=2000)
    assert found.p == pytest.approx(2 / 2**4, abs=0.01)


def test_pairing_puts_items_in_order() -> None:
    assert pairing(["a", "b", "c"], ["c", "a", "b"]).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("first", "second", "tasks", "words"),
    [
        (
            ["a", "b", "c"],
            ["b", "c", "d", "e"],
            ("", ""),
            r"of 3 and 4 items, 2 of them the same: 1 only in the first \['a'\], 2 only in the second \['d', 'e'\]",
        ),
        (["a", "a"], ["a"], ("", ""), "1 and 0 items have the id of another one"),
        (["a"], ["a"], ("f0", "e1"), "different tasks: hash 'f0' and 'e1'"),
        ([], [], ("", ""), "of 0 and 0 items"),
    ],
)
def test_what_cannot_be_paired(first: list[str], second: list[str], tasks: tuple[str, str], words: str) -> None:
    with pytest.raises(UnpairedError, match=words):
        pairing(first, second, *tasks)


def test_scores_that_cannot_be_compared() -> None:
    with pytest.raises(UnpairedError, match=r"shapes \(2,\) and \(1,\)"):
        compare_means([0.0, 1.0], [1.0])
    with pytest.raises(UnpairedError, match=r"shapes \(0,\) and \(0,\)"):
        compare_proportions([], [])
    with pytest.raises(ValueError, match=r"item 1 of 2 has 1\.0 and nan"):
        compare_means([0.0, 1.0], [1.0, math.nan])
    with pytest.raises(ValueError, match="right or wrong is 1 or 0"):
        compare_proportions([0.5], [1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="infinite or undefined loss"):
        compare_sums(np.ones((2, 2)), np.array([[1.0, math.inf], [1.0, 1.0]]), lambda sums: sums[:, 0])
    with pytest.raises(UnpairedError, match=r"\(2, 3\) and \(2, 4\)"):
        compare_sums(np.zeros((2, 3)), np.zeros((2, 4)), lambda sums: sums[:, 0])


def test_p_values_of_many_comparisons() -> None:
    assert among_all([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert among_all([0.9, 0.02]) == pytest.approx([0.9, 0.04])
    assert (among_all([0.04]), among_all([])) == ([0.04], [])


def test_verdicts() -> None:
    seen = PairedDifference(0.50, 0.60, 0.10, 0.04, 0.16, 0.03, 0.0012, 0.085, 200, "McNemar's mid-p")
    tail = "(95%: +4 to +16; p = 0.0012, McNemar's mid-p, 200 units)."
    assert seen.verdict("old", "new", unit=100) == f"new is better than old: new less old is +10 {tail}"
    assert seen.verdict("old", "new", unit=100, lower_is_better=True) == f"old is better than new: new less old is +10 {tail}"
    unseen = PairedDifference(0.50, 0.52, 0.02, -0.04, 0.08, 0.03, 0.5, 0.085, 200, "paired t")
    assert unseen.verdict("old", "new", unit=100) == (
        "No difference can be told: new differs by +2 from old (95%: -4 to +8; p = 0.5, paired t, 200 units). With these items, a "
        "difference of 8.5 would be seen four times in five."
    )
    same = PairedDifference(0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.1, 20, "swapped answers")
    assert "new gives exactly as much as old" in same.verdict("old", "new")
    alone = compare_means([0.0], [1.0])
    assert (
        alone.verdict("old", "new")
        == "Nothing can be told of old and new: one unit says nothing of others. Evaluate more items."
    )
