"""Intervals of proportions, means, ratios and averages: literal values, and honesty about small samples."""

import math

import numpy as np
import pytest

from megatrain.evaluation.intervals import Estimate, exponential, macro_average, mean, proportion, ratio, scaled, with_stderr


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [  # Newcombe 1998, Statist. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (1, 1, 0.2065, 1.0),
        (0, 10, 0.0, 0.2775),
    ],
)
def test_wilson(right: int, items: int, low: float, high: float) -> None:
    found = proportion(right, items)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert (found.value, found.units) == (right / items, items)
    assert proportion(items - right, items).low == pytest.approx(1 - found.high, abs=1e-12)


@pytest.mark.parametrize(("right", "items"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_proportion(right: int, items: int) -> None:
    with pytest.raises(ValueError, match=f"{right} of {items} items is no proportion"):
        proportion(right, items)


def test_mean_without_bounds_is_students() -> None:
    found = mean([1.0, 2.0, 4.0, 9.0], bounds=None)
    assert (found.value, found.stderr) == pytest.approx((4.0, math.sqrt(38 / 3) / 2))
    assert found.high - found.value == pytest.approx(3.182446305284263 * found.stderr, rel=1e-9)  # t(0.975, 3)
    assert found.low == pytest.approx(8.0 - found.high)


def test_mean_within_bounds_is_wilsons_to_the_quantile() -> None:
    zeros_and_ones = mean([1.0] * 30 + [0.0] * 10)
    wilson = proportion(30, 40)
    assert zeros_and_ones.low == pytest.approx(wilson.low, abs=8e-3)
    assert zeros_and_ones.low < wilson.low < wilson.high < zeros_and_ones.high
    many = mean([1.0] * 30_000 + [0.0] * 10_000)
    assert (many.low, many.high) == pytest.approx((proportion(30_000, 40_000).low, proportion(30_000, 40_000).high), abs=1e-6)
    shifted = mean(np.array([0.2, 0.5, 0.9]) * 100, bounds=(0.0, 100.0))
    assert shifted.high == pytest.approx(100 * mean([0.2, 0.5, 0.9]).high)


def test_clusters_are_the_units() -> None:
    scores = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    found = mean(scores, clusters=["a", "a", "a", "b", "b", "b", "c", "c"])
    # (sum of squared cluster sums of x - 1/2) = 1.5^2 + 1.5^2 + 0 = 4.5
    assert (found.units, found.stderr) == (3, pytest.approx(math.sqrt(4.5 * 3 / 2) / 8))
    alone = mean(scores)
    assert found.high - found.low > alone.high - alone.low
    assert mean(scores, clusters=range(8)) == Estimate(**{**vars(alone), "method": "mean, Student, clustered"})


def test_one_item_and_items_that_do_not_differ() -> None:
    assert (mean([0.5]).low, mean([0.5]).high) == pytest.approx((proportion(1, 2).low, proportion(1, 2).high), abs=0.1)
    assert mean([0.0]).high == proportion(0, 1).high
    assert mean([1.0] * 20).low == pytest.approx(proportion(20, 20).low)
    assert mean([1.0] * 20, clusters=[0] * 20).low == pytest.approx(proportion(1, 1).low)
    assert mean([3.0], bounds=None).high == math.inf
    assert mean([3.0, 3.0], bounds=None).high == 3.0
    assert math.isnan(mean([0.5]).stderr)


def test_an_interval_stays_within_the_range_and_holds_the_value() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        items = int(rng.integers(1, 20))
        scores = np.round(rng.beta(0.2, 0.3, items), 1)
        found = mean(scores, clusters=rng.integers(0, 4, items).tolist())
        assert 0.0 <= found.low <= found.value <= found.high <= 1.0
        assert found.low < found.high


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "at least one number"),
        ([[1.0]], r"shape \(1, 1\)"),
        ([0.0, math.nan], r"item 1 of 2 is nan \(1 such items\)"),
        ([0.0, math.inf], "item 1 of 2 is inf"),
        ([0.0, 1.5], "a score of 0 to 1.5 is out of its bounds 0 to 1"),
    ],
)
def test_values_that_have_no_mean(values: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mean(values)


def test_rounding_is_no_score_out_of_bounds() -> None:
    found = mean([1.0 + 1e-12, 1.0, -1e-12])
    assert found.low < found.value < found.high <= 1.0


def test_clusters_of_other_items() -> None:
    with pytest.raises(ValueError, match="2 items, but clusters of 3"):
        mean([0.0, 1.0], clusters="abc")


def test_ratio_weighs_by_the_denominator() -> None:
    found = ratio([10.0, 20.0, 90.0], [10.0, 10.0, 30.0])
    without = np.array([110 / 40, 100 / 40, 30 / 20])
    stderr = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert (found.value, found.stderr, found.units) == (2.4, pytest.approx(stderr), 3)
    assert found.low * found.high == pytest.approx(2.4**2)
    assert ratio([5.0, 5.0, 2.0], [1.0, 1.0, 1.0], clusters="aab").units == 2
    assert ratio([1.0, 2.0, 0.0], [1.0, 1.0, 0.0]) == ratio([1.0, 2.0], [1.0, 1.0])  # nothing predicted, nothing said


def test_ratio_of_uneven_documents_has_few_degrees_of_freedom() -> None:
    even = ratio([1.0, 2.0] * 20, [1.0] * 40)
    assert even.high / even.value == pytest.approx(math.exp(2.0226909 * even.stderr / even.value), rel=1e-6)  # t(0.975, 39)
    book = ratio([1.0, 2.0] * 20 + [3000.0], [1.0] * 40 + [1000.0])
    assert book.high / book.value > math.exp(3.0 * book.stderr / book.value)


def test_ratio_of_one_document_and_of_infinite_loss() -> None:
    assert (ratio([3.0], [2.0]).low, ratio([3.0], [2.0]).high) == (0.0, math.inf)
    lost = ratio([1.0, math.inf], [1.0, 1.0])
    assert (lost.value, lost.high, exponential(lost).value) == (math.inf, math.inf, math.inf)


@pytest.mark.parametrize(
    ("above", "below"),
    [([], []), ([1.0], [0.0]), ([-1.0], [1.0]), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [math.inf])],
)
def test_what_has_no_ratio(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match=r"have no ratio|must be"):
        ratio(above, below)


def test_units_of_an_estimate() -> None:
    found = scaled(Estimate(1.0, 0.5, 1.5, 0.25, 9, "x"), 100.0)
    assert found == Estimate(100.0, 50.0, 150.0, 25.0, 9, "x")
    grown = exponential(Estimate(1.0, 0.0, 2.0, 0.5, 9, "x"))
    assert (grown.value, grown.low, grown.high, grown.stderr) == pytest.approx((math.e, 1.0, math.e**2, 0.5 * math.e))


def test_macro_average_is_as_lopsided_as_its_tasks() -> None:
    one, two = Estimate(0.9, 0.6, 1.0, 0.1, 10, "x"), Estimate(0.5, 0.1, 0.9, 0.2, 10, "x")
    found = macro_average([one, two])
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.7 - 0.25, 0.7 + math.sqrt(0.17) / 2))
    assert found.stderr == pytest.approx(math.sqrt(0.05) / 2)
    with pytest.raises(ValueError, match="at least one"):
        macro_average([])


def test_a_known_standard_error() -> None:
    assert with_stderr(1.0, 0.5, 99, None, "x", freedom=2.0).high == pytest.approx(1.0 + 4.30265273 * 0.5)  # t(0.975, 2)
    found, wilson = with_stderr(40.0, 2.0, 10**9, (0.0, 100.0), "x"), proportion(240, 600)  # 0.4 * 0.6 / 600 = 0.02^2
    assert (found.low, found.high) == pytest.approx((100 * wilson.low, 100 * wilson.high), abs=1e-9)
