"""Shards shared by some of the replicas (parallel.zero_ranks): the numbers of one process, equal copies, and the bytes of the formula."""

from dataclasses import replace

import pytest
import torch
from zero_grid import STEPS, config_of, reference

from megatrain.testing import simulate
from megatrain.testing.agree import agree
from megatrain.testing.trace import mesh_shape, trace_run

ONE, ZB = ("1f1b", 1, 1), ("zb_h1", 1, 2)


def shared(stage, schedule=ONE, tp=(1, False), micro_batches=3, zero_ranks=2, **parallel):
    """The config and the mesh of four replicas, of which so many share the shards."""
    config = config_of((stage, schedule, tp, 4, micro_batches, True, "none", 500))
    config = replace(config, parallel=replace(config.parallel, zero_ranks=zero_ranks, **parallel))
    return config, mesh_shape(config, 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("schedule", "tp"), [(ONE, (1, False)), (ONE, (2, True)), (ZB, (1, False))], ids=str)
def test_two_by_two_replicas_agree_with_one_process(stage, schedule, tp):
    config, shape = shared(stage, schedule, tp)
    for trace in simulate(shape, trace_run, config, STEPS):
        agree(reference(True, "fp64"), trace)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_overlap_the_numbers_are_the_same_to_the_bit(stage):
    with_overlap, without = (simulate(s, trace_run, c, STEPS)[3] for c, s in (shared(stage), shared(stage, overlap=False)))
    assert with_overlap.losses == without.losses and with_overlap.grad_norms == without.grad_norms
    assert all(torch.equal(with_overlap.weights[name], without.weights[name]) for name in without.weights)
