"""Bins of a histogram: their edges, and quantiles of them."""

import math
from collections import Counter

import pytest

from megatrain.corpus.report.bins import HIGHEST, LOWEST, bin_of, edge, quantile


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((1, 0), (1.18, 0), (1.19, 1), (1.5, 2), (2, 4), (1000, 39), (1024, 40), (0.5, -4), (0.999, -1)),
        *((0, LOWEST), (-3, LOWEST), (1e-9, LOWEST), (1e300, HIGHEST), (math.inf, HIGHEST)),
    ],
)
def test_a_value_is_in_its_bin(value, number):
    assert bin_of(value) == number


def test_an_edge_is_the_first_value_of_its_bin():
    assert [edge(number) for number in (0, 4, -4, 2)] == [1.0, 2.0, 0.5, math.sqrt(2)]
    for number in range(LOWEST + 1, HIGHEST + 1):
        assert bin_of(edge(number)) == number
        assert bin_of(math.nextafter(edge(number), 0)) == number - 1


def test_quantiles_lie_within_a_bin_of_the_values():
    bins = Counter(map(bin_of, range(1, 10_001)))
    assert quantile(bins, 0.5) == pytest.approx(5000, rel=0.03)
    assert quantile(bins, 0.9) == pytest.approx(9000, rel=0.03)
    assert quantile({4: 10}, 0.5) == 2**1.125
    assert quantile({4: 10}, 1.0) == edge(5)
    assert math.isnan(quantile({}, 0.5)) and math.isnan(quantile({3: 0}, 0.5))


def test_nan_is_in_no_bin():
    with pytest.raises(ValueError, match="NaN is in no bin"):
        bin_of(math.nan)
