"""Layers are dealt out so that the slowest rank has as little to do as possible, and none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.assembly import ranges_of, split_layers, work_of_stages
from megatrain.config.load import from_dict
from megatrain.parallel.schedules import Schedule
from megatrain.runtime.flops import forward_flops


def homes_of(name, stages, chunks):
    schedule = Schedule(name, stages, chunks, 1)
    return [schedule.home(virtual)[0] for virtual in range(schedule.virtual_stages)]


@pytest.mark.parametrize(
    ("homes", "layers", "last", "expected"),
    [
        ([0, 1, 2, 3], 8, 0.0, [2, 2, 2, 2]),
        ([0, 1, 2, 3], 9, 0.0, [3, 2, 2, 2]),
        ([0, 1, 2, 3], 9, 1.5, [3, 3, 2, 1]),
        ([0, 1, 2, 3], 11, 2.0, [4, 3, 3, 1]),
        ([0, 1], 4, 10.0, [3, 1]),
        ([0, 1, 1, 0], 8, 2.0, [2, 3, 2, 1]),
        ([0], 5, 3.0, [5]),
    ],
)
def test_by_hand(homes, layers, last, expected):
    assert split_layers(homes, layers, 1.0, 0.0, last) == expected


@given(
    shape=st.sampled_from([("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb_v", 2)]),
    stages=st.integers(1, 8),
    more=st.integers(0, 40),
    first=st.floats(0, 5),
    last=st.floats(0, 5),
)
def test_every_layer_lies_somewhere_and_ranks_are_even(shape, stages, more, first, last):
    homes = homes_of(shape[0], stages, shape[1])
    layers = len(homes) + more
    counts = split_layers(homes, layers, 1.0, first, last)
    assert sum(counts) == layers and min(counts) >= 1
    assert [layer for piece in ranges_of(counts) for layer in piece] == list(range(layers))
    extra = [first * (v == 0) + last * (v == len(homes) - 1) for v in range(len(homes))]
    ranks = [sum(counts[v] + extra[v] for v, home in enumerate(homes) if home == rank) for rank in range(stages)]
    movable = [rank for rank in range(stages) if any(counts[v] > 1 for v, home in enumerate(homes) if home == rank)]
    assert all(ranks[rank] <= min(ranks) + 1 + 1e-9 for rank in movable), "moving a layer would not help"


def test_too_few_layers_are_refused():
    with pytest.raises(ValueError, match="3 layers cannot be split over 4 virtual stages"):
        split_layers([0, 1, 2, 3], 3, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("schedule", "chunks", "layers"), [("1f1b", 1, [3, 2]), ("interleaved", 2, [3, 2]), ("zb_v", 2, [2, 3])]
)
def test_the_work_of_a_stage_is_its_layers_and_at_one_the_head(schedule, chunks, layers):
    config = from_dict(
        {
            "model": {"num_layers": 5, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 101},
            "parallel": {"pipeline_parallel_size": 2, "virtual_pipeline_size": chunks, "schedule": schedule},
        }
    )
    block, head = forward_flops(config.model, 101)
    heads = [0, 1] if schedule != "zb_v" else [1, 0]
    assert work_of_stages(config, 101) == [block * n + head * own for n, own in zip(layers, heads, strict=True)]
