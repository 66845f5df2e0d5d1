"""The central theorem: the same seed and data give the same losses, gradients and weights under every layout."""

from itertools import combinations, product

import pytest
from layout_grid import LAYOUTS, SETTINGS, STEPS, compare, config_of, shape_of

from megatrain.testing import simulate, spawn
from megatrain.testing.layouts import covering
from megatrain.testing.trace import trace_run

POINTS = [(layout, *setting) for layout in LAYOUTS for setting in SETTINGS]
COVERING = [(layout, tuple(setting)) for layout, *setting in covering(POINTS, strength=2)]
"""Every two values of a setting, and every layout with every value."""
REST = [point for point in product(LAYOUTS, SETTINGS) if point not in COVERING]


def name(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("layout", "setting"), [*COVERING, *(pytest.param(*point, marks=pytest.mark.slow) for point in REST)], ids=name
)
def test_simulated_ranks_agree_with_one_process(layout, setting):
    compare(simulate(shape_of(layout, setting), trace_run, config_of(layout, setting), STEPS), layout, setting)


@pytest.mark.parametrize(("layout", "setting"), list(zip(LAYOUTS, covering(SETTINGS), strict=False)), ids=name)
def test_gloo_processes_agree_with_one_process(layout, setting):
    compare(spawn(shape_of(layout, setting), trace_run, config_of(layout, setting), STEPS), layout, setting)


def test_the_covering_set_holds_every_pair():
    points = [(layout, *setting) for layout, setting in COVERING]
    assert len(points) == len(set(points)) <= 30
    for columns in combinations(range(6), 2):
        wanted = len(LAYOUTS) * 2 if 0 in columns else 4
        assert len({tuple(point[i] for i in columns) for point in points}) == wanted
