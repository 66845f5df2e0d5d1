"""The central theorem: the same seed and data give the same losses, gradients and weights under every layout."""

import pytest
from layout_grid import LAYOUTS, SETTINGS, STEPS, compare, config_of, shape_of

from megatrain.testing import simulate, spawn
from megatrain.testing.layouts import covering
from megatrain.testing.trace import trace_run

COVERING = covering(SETTINGS)


def name(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("setting", COVERING, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_simulated_ranks_agree_with_one_process(layout, setting):
    compare(simulate(shape_of(layout, setting), trace_run, config_of(layout, setting), STEPS), layout, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s not in COVERING], ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_simulated_ranks_agree_with_one_process_in_the_rest_of_the_grid(layout, setting):
    compare(simulate(shape_of(layout, setting), trace_run, config_of(layout, setting), STEPS), layout, setting)


@pytest.mark.parametrize(("layout", "setting"), list(zip(LAYOUTS, COVERING, strict=False)), ids=name)
def test_gloo_processes_agree_with_one_process(layout, setting):
    compare(spawn(shape_of(layout, setting), trace_run, config_of(layout, setting), STEPS), layout, setting)


def test_the_covering_set_holds_every_triple():
    assert len(COVERING) < len(SETTINGS)
    for columns in ((0, 1, 2), (0, 1, 3), (1, 2, 4), (2, 3, 4)):
        assert len({tuple(s[i] for i in columns) for s in COVERING}) == 8
