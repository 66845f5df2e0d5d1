"""Bootstrap standard errors and swaps: against what is known of means, in bounded memory, the same for a seed."""

import tracemalloc

import numpy as np
import pytest

from megatrain.evaluation.distributions import student_tail
from megatrain.evaluation.intervals import Floats, mean
from megatrain.evaluation.resampling import UNITS, bootstrap_scores, bootstrap_stderr, jackknife_estimate, swap_p


def average(sums: Floats) -> Floats:
    return np.asarray(sums[:, 0] / sums[:, 1])


def scored(values: Floats) -> Floats:
    return np.stack((values, np.ones(len(values))), axis=1)


@pytest.mark.parametrize("items", [2, 7, 300, 3 * UNITS + 5])
def test_the_standard_error_of_a_mean(items: int) -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, items)
    found = bootstrap_stderr(scored(values), average, resamples=4000, seed=1)
    assert found == pytest.approx(values.std(ddof=1) / np.sqrt(items), rel=0.05)


def test_jackknife_of_a_mean_is_exact() -> None:
    values = np.random.default_rng(0).beta(2, 2, 30)
    found, wanted = jackknife_estimate(scored(values), average, (0.0, 1.0)), mean(values)
    assert (found.value, found.stderr, found.low) == pytest.approx((wanted.value, wanted.stderr, wanted.low))
    clusters = list(range(10)) * 3
    grouped = jackknife_estimate(scored(values), average, (0.0, 1.0), clusters)
    assert (grouped.stderr, grouped.units) == (pytest.approx(mean(values, clusters).stderr), 10)
    one = jackknife_estimate(scored(values[:1]), average, (0.0, 1.0))
    assert 0.0 < one.low < one.value < one.high < 1.0
    with pytest.raises(ValueError, match="no items have no score"):
        jackknife_estimate(np.zeros((0, 2)), average, (0.0, 1.0))


def test_one_unit_has_no_spread() -> None:
    assert np.isnan(bootstrap_stderr(scored(np.ones(1)), average))


def test_a_seed_gives_the_same_numbers_and_as_many_as_asked() -> None:
    statistics = scored(np.arange(1000.0))
    first = bootstrap_scores(statistics, average, resamples=2500, seed=3)
    assert first.shape == (2500,)
    assert first.tolist() == bootstrap_scores(statistics, average, resamples=2500, seed=3).tolist()
    assert first.tolist() != bootstrap_scores(statistics, average, resamples=2500, seed=4).tolist()


def test_memory_is_bounded() -> None:
    statistics = np.ones((UNITS, 2))
    tracemalloc.start()
    bootstrap_scores(statistics, average, resamples=4000)  # 128 MB if at once
    swap_p(statistics, statistics + np.eye(UNITS, 2), average, resamples=4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


def test_swaps_count_exactly() -> None:
    first, second = np.zeros(9), np.zeros(9)
    second[:3] = [1.0, 2.0, 3.0]
    # signs of 1, 2, 3: only the two that agree in all have a sum of 6; those that leave out 1 have 4.
    assert swap_p(scored(first), scored(second), average, resamples=20_000) == pytest.approx(2 / 8, abs=0.01)
    second[0] = -1.0  # 4: of the eight sums 6, 4, 2, 0 and their negatives four are as large
    assert swap_p(scored(first), scored(second), average, resamples=20_000) == pytest.approx(4 / 8, abs=0.01)


def test_many_units_are_swapped_in_bundles() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(10 * UNITS)
    second = first + rng.normal(0.003, 0.3, len(first))
    gaps = second - first
    wanted = student_tail(gaps.mean() / (gaps.std() / np.sqrt(len(gaps))), 1e9)
    assert 0.01 < wanted < 0.5
    assert swap_p(scored(first), scored(second), average) == pytest.approx(wanted, rel=0.2)


def test_a_score_that_is_no_number_proves_nothing() -> None:
    zeros = np.zeros((3, 2))
    with np.errstate(all="ignore"):
        assert swap_p(zeros, np.eye(3, 2), lambda sums: sums[:, 0] / (0.0 * sums[:, 1])) == 1.0


def test_swapping_equal_items_says_nothing() -> None:
    assert swap_p(scored(np.arange(5.0)), scored(np.arange(5.0)), average) == 1.0
