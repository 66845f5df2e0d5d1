"""A grid of cases, thinned for the short run of the tests: every few values together, and the other cells marked `slow`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

from megatrain.testing.layouts import covering


def thinned(*axes: Iterable[Any], strength: int = 2) -> list[Any]:
    """For `parametrize`: cells of the product of `axes` that hold every `strength` values together, and the rest as `slow`."""
    values = [list(axis) for axis in axes]
    grid = list(product(*(range(len(axis)) for axis in values)))
    few = set(covering(grid, strength))
    cells = ((cell, [axis[i] for axis, i in zip(values, cell, strict=True)]) for cell in grid)
    return [pytest.param(*cell, marks=[] if at in few else pytest.mark.slow) for at, cell in cells]
