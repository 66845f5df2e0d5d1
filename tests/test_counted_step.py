"""What a step launches and moves on a GPU is a budget: whoever adds a pass over the activations is told."""

from dataclasses import replace

import pytest
from counted_step import config_of, costs, counted_step

from megatrain.kernels.dispatch import triton

pytestmark = pytest.mark.skipif(triton is None, reason="only Linux has Triton")
LAYERS = {"124m": (23, 2234, 14, 3108), "8b shape": (15, 1949, 14, 4582), "1.3b": (23, 1508, 14, 2619)}
"""Of a layer and micro-batch: launches and MB of passes over activations, then of products and attention."""
ENDS = {"124m": (67, 11337), "8b shape": (62, 7902), "1.3b": (67, 4098)}
"""Of embedding, final norm, head and loss: launches and MB, without products."""
UPDATES = {"124m": 30, "8b shape": 30, "1.3b": 30}
"""Bytes a parameter."""
PARAMETERS = {"124m": 7_087_872, "8b shape": 218_112_000, "1.3b": 50_358_272}
"""Of a layer."""


@pytest.mark.parametrize("shape", LAYERS)
def test_a_layer_and_the_ends_stay_within_their_budgets(shape):
    found = costs(shape)
    layer, ends = found.layer, found.ends
    counted = layer.passes, megabytes(layer.passed), layer.products, megabytes(layer.multiplied)
    assert all(mine <= allowed for mine, allowed in zip(counted, LAYERS[shape], strict=True)), (counted, found.moved)
    counted = ends.passes, megabytes(ends.passed)
    assert all(mine <= allowed for mine, allowed in zip(counted, ENDS[shape], strict=True)), counted
    assert found.update.passed / PARAMETERS[shape] < UPDATES[shape] + 0.01


def test_a_site_of_dropout_is_a_launch_and_4_bytes_an_element_each_way():
    """Behind the embedding, attention and the MLP; the mask, its words and its keys are never in memory.

    Without biases: that of attention's output has a pass for its gradient where dropout stands before the next norm.
    """
    given = config_of("124m", 1, 1)
    plain, dropping = (replace(given, model=replace(given.model, bias=False, dropout=p)) for p in (0.0, 0.1))
    (without, _), (found, _) = counted_step(plain), counted_step(dropping)
    assert found.launches - without.launches == {"dropout_kernel": 6} and not without.launches - found.launches
    moved, elements, rows = sum((found.moved - without.moved).values()), 32 * 1024 * 768, 32
    assert moved == 6 * (4 * elements + 8 * rows), "and the sequences' places"


def megabytes(count):
    return -(-count // 10**6)
