"""Histograms that are counters: four bins an octave, fixed for ever, so that the histograms of any workers add up.

    bin b holds 2^(b/4) <= value < 2^((b+1)/4)

A value is found by its exponent and by comparing its mantissa with three constants, not by a logarithm, whose last bit differs between
machines.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping

AN_OCTAVE = 4
"""Bins between a value and its double."""
LOWEST, HIGHEST = -64, 256
"""Bins of 2^-16 and 2^64, which hold all values below and above as well."""
_MANTISSAS = (0.5, 0.5946035575013605, 0.7071067811865476, 0.8408964152537145)
"""2^-1, 2^(-3/4), 2^(-1/2), 2^(-1/4)"""


def bin_of(value: float) -> int:
    """The bin of a value; 0 and less is in LOWEST, infinity in HIGHEST. Raises ValueError for NaN."""
    if math.isnan(value):
        raise ValueError("NaN is in no bin of a histogram")
    if value <= 0:
        return LOWEST
    if math.isinf(value):
        return HIGHEST
    mantissa, exponent = math.frexp(value)
    return min(max(AN_OCTAVE * (exponent - 1) + bisect_right(_MANTISSAS, mantissa) - 1, LOWEST), HIGHEST)


def edge(number: int) -> float:
    """The smallest value of a bin."""
    octave, part = divmod(number, AN_OCTAVE)
    return math.ldexp(_MANTISSAS[part], octave + 1)


def quantile(bins: Mapping[int, int], share: float) -> float:
    """The value below which a share (0 to 1) of the values lies, even within a bin (in the logarithm); NaN without values.

    It is off by less than the width of a bin, 19%.
    """
    total = sum(bins.values())
    wanted = share * total
    below = 0
    for number in sorted(bins):
        if bins[number] and below + bins[number] >= wanted:
            return float(2.0 ** ((number + (wanted - below) / bins[number]) / AN_OCTAVE))
        below += bins[number]
    return math.nan
