"""Quantiles and tails, against scipy's."""

import math

import pytest
from scipy import stats

from megatrain.evaluation.distributions import normal_quantile, sign_mid_p, student_quantile, student_tail


@pytest.mark.parametrize("freedom", [1.0, 2.0, 3.7, 9.0, 49.0, 1999.0, 1e5, 5e6, 1e9])
def test_student_is_scipys(freedom: float) -> None:
    for probability in (0.6, 0.8, 0.975, 0.9999):
        wanted = stats.t.ppf(probability, freedom)
        assert student_quantile(probability, freedom) == pytest.approx(wanted, rel=1e-8)
    for t in (0.0, 0.1, 1.0, -2.5, 30.0):
        assert student_tail(t, freedom) == pytest.approx(
            2 * stats.t.sf(abs(t), freedom), rel=1e-6 if abs(t) < 9 else 1e-3, abs=1e-300
        )
    assert student_tail(math.inf, freedom) == 0.0


def test_normal() -> None:
    assert normal_quantile(0.975) == pytest.approx(1.959963984540054, abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(1, 0), (5, 9), (40, 0), (500, 560), (100_900, 100_000), (0, 1100)])
def test_signs_are_scipys_binomial(first: int, second: int) -> None:
    signs, fewer = first + second, min(first, second)
    wanted = 2 * stats.binom.cdf(fewer, signs, 0.5) - stats.binom.pmf(fewer, signs, 0.5)
    assert sign_mid_p(first, second) == pytest.approx(wanted, rel=1e-6, abs=1e-300)
    assert sign_mid_p(second, first) == sign_mid_p(first, second)


def test_as_many_signs_of_both_kinds_say_nothing() -> None:
    assert [sign_mid_p(number, number) for number in (0, 1, 33, 10**6)] == [1.0] * 4
