"""Kneser-Ney discounts: three an order, estimated from the numbers n1 .. n4 of n-grams with adjusted counts 1 to 4.

Y = n1 / (n1 + 2 n2)     D1 = 1 - 2 Y n2/n1     D2 = 2 - 3 Y n3/n2     D3+ = 3 - 4 Y n4/n3      (Chen and Goodman 1999, section 3.2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DEFAULT_FALLBACK = (0.5, 1.0, 1.5)


class DiscountError(ValueError):
    """An order whose counts give no valid discounts; the message says why and what to do."""


@dataclass(frozen=True)
class Discounts:
    """The discounts of one order."""

    values: tuple[float, float, float]
    """Discounts for adjusted counts 1, 2, and 3 or more."""
    fallback: bool = False
    """Whether these are the fallback, as the text gives none."""

    def of(self, adjusted: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """The discount for each adjusted count; 0 for 0."""
        return np.array([0.0, *self.values])[np.minimum(adjusted, 3)]


def estimate(order: int, counts: Sequence[int], fallback: tuple[float, float, float] | None) -> Discounts:
    """The discounts of an order from counts [unused, n1, n2, n3, n4]; if these give none, `fallback`. Raises DiscountError without it."""
    _, n1, n2, n3, n4 = (int(n) for n in counts)
    reason = next((f"no {order}-gram has the adjusted count {j}" for j, n in ((1, n1), (2, n2), (3, n3)) if not n), "")
    if not reason:
        y = n1 / (n1 + 2 * n2)
        values = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        bad = next((j for j, d in enumerate(values, 1) if not 0 <= d <= j), None)
        if bad is None:
            return Discounts(values)
        reason = f"the discount of {order}-grams of adjusted count {bad} would be {values[bad - 1]:g}, not in [0, {bad}]"
    if fallback is None:
        raise DiscountError(
            f"{reason}, so Kneser-Ney discounts cannot be estimated: the text is too small, or it is made of sentences that repeat. "
            "Remove repeated lines, give more text or a lower --order, or take given discounts: --discount-fallback (0.5 1 1.5)."
        )
    return Discounts(fallback, fallback=True)


def parse_fallback(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    """--discount-fallback: one to three numbers, the last repeated; [] means the default. Raises ValueError for one out of range."""
    if values is None:
        return None
    if len(values) > 3:
        raise ValueError(f"--discount-fallback takes at most 3 numbers, and {len(values)} were given")
    padded = [*values, *[values[-1]] * (3 - len(values))] if values else list(DEFAULT_FALLBACK)
    for j, value in enumerate(padded, 1):
        if not 0 < value <= j:
            raise ValueError(f"--discount-fallback: discount {j} is {value:g}, and must lie in (0, {j}], such as {j / 2:g}")
    return padded[0], padded[1], padded[2]
