"""Quantiles and tails of the normal, Student's and the binomial distribution, of which intervals and tests are made.

Student's comes from the regularised incomplete beta function as a continued fraction (Press et al., Numerical Recipes, 3rd edition,
section 6.4); the normal from the standard library. Equal to scipy's, which the package does not need, to 1e-8 relative.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

_TINY = 1e-300
_TERMS = 10_000
NORMAL_FROM = 1e7
"""Degrees of freedom from which Student's distribution is the normal one to nine digits."""


def normal_quantile(probability: float) -> float:
    """The value below which a standard normal number lies with `probability`, within 0 and 1."""
    return NormalDist().inv_cdf(probability)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), the share of a beta distribution below x; a, b > 0."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _continued(x, a, b) / a
    return 1.0 - front * _continued(1.0 - x, b, a) / b


def _continued(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        change = 1.0
        for term in (even, odd):
            d = 1.0 / _away(1.0 + term * d)
            c = _away(1.0 + term / c)
            change = c * d
            value *= change
        if abs(change - 1.0) < 1e-15:
            break
    return value


def _away(number: float) -> float:
    """A number that can be divided by."""
    return number if abs(number) > _TINY else _TINY


def student_tail(t: float, freedom: float) -> float:
    """Probability that Student's t of `freedom` degrees of freedom is at least |t| away from 0, on both sides together."""
    if math.isinf(t):
        return 0.0
    if freedom >= NORMAL_FROM:
        return math.erfc(abs(t) / math.sqrt(2.0))
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2.0, 0.5)


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: float) -> float:
    """The value below which Student's t lies with `probability` (0.5 to 1); freedom > 0."""
    if freedom >= NORMAL_FROM:
        return normal_quantile(probability)
    wanted = 2.0 * (1.0 - probability)
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > wanted:
        low, high = high, 2.0 * high
    while high - low > 1e-13 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if student_tail(middle, freedom) > wanted else (low, middle)
    return 0.5 * (low + high)


def sign_mid_p(first: int, second: int) -> float:
    """Two-sided mid-p value of so many signs of two kinds where both are equally likely: twice the smaller tail, its last term halved.

    With a = min(first, second), m = first + second and X ~ binomial(m, 1/2): 2 P(X < a) + P(X = a) (Lancaster 1961; Fagerland, Lydersen
    and Laake 2013, doi:10.1186/1471-2288-13-91). 1 without signs.
    """
    signs, fewer = first + second, min(first, second)
    if first == second:
        return 1.0
    below = incomplete_beta(0.5, signs - fewer, fewer + 1.0)  # P(X <= a)
    here = math.exp(
        math.lgamma(signs + 1.0) - math.lgamma(fewer + 1.0) - math.lgamma(signs - fewer + 1.0) - signs * math.log(2.0)
    )
    return min(1.0, 2.0 * below - here)
