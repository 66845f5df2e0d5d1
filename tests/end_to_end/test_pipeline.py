"""The central theorem under pipelines: every schedule, any stages, chunks and micro-batches, with the other dimensions."""

import time
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from pipeline_grid import COVERING, FLOAT32, GLOO, POINTS, STEPS, compare, config_of, shape_of

from megatrain.assembly import layer_pieces
from megatrain.testing import Disagreement, simulate, spawn
from megatrain.testing.trace import trace_run

V_SHAPED = (("zb_v", 2), 2, 4, True, 11, (1, False), 1)
UNEVEN = (("1f1b", 1), 4, 4, True, 11, (1, False), 1)


def name(point):
    return "-".join(str(part).replace(" ", "").strip("()") for part in point)


SIMULATED = [point for point in COVERING if point not in GLOO]
"""The rest runs on gloo processes, which is the harder way; --all simulates it too."""


@pytest.mark.parametrize("point", SIMULATED, ids=name)
def test_simulated_pipelines_agree_with_one_process(point):
    compare(simulate(shape_of(point), trace_run, config_of(point), STEPS), point)


REST = [point for point in POINTS if point not in SIMULATED]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(60))  # a test for each point would take every session seconds to collect
def test_simulated_pipelines_agree_with_one_process_in_the_rest_of_the_grid(part):
    for point in REST[part::60]:
        compare(simulate(shape_of(point), trace_run, config_of(point), STEPS), point)


@pytest.mark.parametrize("point", GLOO, ids=name)
def test_gloo_pipelines_agree_with_one_process(point):
    compare(spawn(shape_of(point), trace_run, config_of(point), STEPS), point)


@pytest.mark.parametrize("point", FLOAT32, ids=name)
def test_pipelines_agree_in_float32_too(point):
    compare(simulate(shape_of(point), trace_run, config_of(point, "fp32"), STEPS), point, "fp32")


def test_the_covering_set_holds_every_pair():
    assert len(set(COVERING)) == len(COVERING) < 40 and len({point[0] for point in GLOO}) == 5
    for columns in combinations(range(len(POINTS[0])), 2):
        wanted = {tuple(point[c] for c in columns) for point in POINTS}
        assert {tuple(point[c] for c in columns) for point in COVERING} == wanted


@pytest.mark.parametrize("split", [(1, 1, 1, 8), (5, 1, 4, 1), (2, 3, 3, 3)])
def test_a_split_by_hand_agrees(split):
    config = config_of(UNEVEN)
    config = replace(config, parallel=replace(config.parallel, layer_split=split))
    compare(simulate(shape_of(UNEVEN), trace_run, config, STEPS), UNEVEN)
    assert [len(piece) for piece in layer_pieces(config, 29)[0]] == list(split)


def test_a_tied_gradient_that_is_not_summed_is_caught(monkeypatch):
    monkeypatch.setattr("megatrain.parallel.zero.FlatParameters._sum_tied", lambda self: None)
    with pytest.raises(Disagreement, match=r"grad|embedding"):
        compare(simulate(shape_of(UNEVEN), trace_run, config_of(UNEVEN), STEPS), UNEVEN)


def embeddings(ctx, config):
    kept = []
    trace_run(ctx, config, STEPS, prepare=lambda run: kept.extend(run.flat.parameters))
    return [(p.spec.tied, p.detach().clone()) for p in kept if p.spec.name == "embedding.tokens"]


def test_tied_embeddings_on_two_stages_stay_bit_identical():
    first, *middle, last = simulate(shape_of(UNEVEN), embeddings, config_of(UNEVEN))
    assert middle == [[], []]
    assert [tied for tied, _ in (*first, *last)] == ["ends", "ends"]
    assert torch.equal(first[0][1], last[0][1])


def test_tied_embeddings_on_one_stage_are_one_parameter():
    first, second = simulate(shape_of(V_SHAPED), embeddings, config_of(V_SHAPED))
    assert [tied for tied, _ in first] == [None] and second == []


@pytest.mark.parametrize("schedule", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2)], ids=name)
def test_losses_of_a_pipeline_reach_every_rank(schedule):
    point = (schedule, 2, 3, False, 8, (2, True), 1)
    traces = simulate(shape_of(point), trace_run, config_of(point), STEPS)
    assert len({tuple(trace.losses) for trace in traces}) == 1 and all(loss > 0 for loss in traces[0].losses)


def test_a_layer_built_twice_is_refused_on_all_ranks(monkeypatch):
    monkeypatch.setattr("megatrain.assembly.ranges_of", lambda counts: [range(4), range(3, 8)])
    point = (("1f1b", 1), 2, 2, True, 8, (1, False), 1)
    with pytest.raises(ValueError, match=r"built 9 layers .* model\.num_layers=8"):
        simulate(shape_of(point), trace_run, config_of(point), STEPS)


def fail_in_layer_5(ctx, config):
    def watch(run):
        for chunk in run.chunks:
            for block in chunk.stack.blocks:
                if block.attention.qkv.weights[0].spec.name == "layers.5.attention.query.weight":
                    block.mlp.register_forward_hook(fail)

    def fail(*_):
        raise ZeroDivisionError("layer 5 divides by zero")

    trace_run(ctx, config, STEPS, prepare=watch)


@pytest.mark.parametrize("run", [simulate, spawn])
def test_a_failure_on_one_stage_ends_all_ranks_with_its_error_first(run):
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="layer 5 divides by zero"):
        run(shape_of(UNEVEN), fail_in_layer_5, config_of(UNEVEN))
    assert time.monotonic() - began < 50  # and not until the limit of 60 s
