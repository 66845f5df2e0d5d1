"""Buckets: every parameter once, in backward order, one kind each, cut into equal shards."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.parallel.flat import ALIGNMENT, FlatBuffers, Unit, make_buckets, usual_size
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.watch import traffic

TWO = {"dp_cp": 2}


def parameter(name, *shape, follows=False, dtype=torch.float32, device="cpu", **spec):
    return Parameter(torch.zeros(shape, dtype=dtype, device=device), ParamSpec(name, shape, **spec), follows=follows)


def layer(number, **spec):
    name = f"layers.{number}"
    return Unit(
        (
            parameter(f"{name}.norm", 8, decay=False),
            parameter(f"{name}.q", 8, 8, **spec),
            parameter(f"{name}.k", 4, 8, follows=True, **spec),
            parameter(f"{name}.q_bias", 8, decay=False),
            parameter(f"{name}.k_bias", 4, decay=False, follows=True),
            parameter(f"{name}.down", 8, 32, **spec),
        )
    )


def names(bucket):
    return [p.spec.name for p in bucket.parameters]


def test_backward_order_with_norms_and_biases_at_the_end():
    head = Unit((parameter("final_norm", 8, decay=False), parameter("head", 16, 8)))
    buckets = make_buckets([layer(0), layer(1), head], TWO, largest=1, by_unit=False)
    assert [names(b) for b in buckets] == [
        ["head"],
        ["layers.1.down"],
        ["layers.1.q", "layers.1.k"],  # behind one another, whatever the direction
        ["layers.0.down"],
        ["layers.0.q", "layers.0.k"],
        ["final_norm", *(f"layers.{i}.{name}" for i in (1, 0) for name in ("q_bias", "k_bias", "norm"))],
    ]
    assert [b.unit for b in buckets] == [2, 1, 1, 0, 0, None]
    assert [b.decay for b in buckets] == [True] * 5 + [False]


def test_units_share_a_bucket_up_to_its_size_but_not_at_stage_3():
    units = [layer(0), layer(1), layer(2)]
    together = make_buckets(units, TWO, largest=1000, by_unit=False)
    assert [len(names(b)) for b in together] == [7, 2, 9]
    assert [b.unit for b in together] == [0, 0, None]  # complete when the last of them is
    apart = make_buckets(units, TWO, largest=1000, by_unit=True)
    assert [(len(names(b)), b.unit) for b in apart] == [(3, 2), (3, 1), (3, 0), (9, None)]


def test_a_shared_parameter_has_a_bucket_to_itself():
    tokens = parameter("embedding.tokens", 16, 8)
    units = [Unit((tokens, parameter("positions", 4, 8))), layer(0), Unit((parameter("final_norm", 8, decay=False), tokens))]
    buckets = make_buckets(units, TWO, largest=10**6, by_unit=False)
    assert [names(b) for b in buckets if tokens in set(b.parameters)] == [["embedding.tokens"]]
    assert [b.unit for b in buckets if tokens in set(b.parameters)] == [None]  # its gradient is complete with the chunk's
    tied = make_buckets([Unit((parameter("embedding.tokens", 16, 8, tied="ends"),)), layer(0)], TWO, 10**6, by_unit=False)
    assert ["embedding.tokens"] in [names(b) for b in tied]


def test_frozen_parameters_come_last_and_apart():
    units = [layer(0, trainable=False), layer(1)]
    buckets = make_buckets(units, TWO, largest=10**6, by_unit=False)
    assert [b.spec.trainable for b in buckets] == [True, True, False]
    assert names(buckets[2]) == ["layers.0.down", "layers.0.q", "layers.0.k"]


def test_chunks_have_buckets_of_their_own():
    second = Unit(layer(1).parameters, chunk=1)
    assert [b.chunk for b in make_buckets([layer(0), second], TWO, 10**6, by_unit=False)] == [1, 1, 0, 0]


def test_different_dtypes_cannot_share_a_buffer():
    unit = Unit((parameter("a", 2), parameter("b", 2, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match=r"one dtype .*bfloat16.*float32"):
        make_buckets([unit], TWO, 10, by_unit=False)


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=6),
    parts=st.integers(1, 9),
    largest=st.integers(1, 1000),
    by_unit=st.booleans(),
)
def test_every_element_has_one_place_and_one_owner(sizes, parts, largest, by_unit):
    units = [
        Unit(tuple(parameter(f"{i}.{j}", n, decay=decay) for j, (n, decay) in enumerate(unit))) for i, unit in enumerate(sizes)
    ]
    buckets = make_buckets(units, {"dp_cp": parts}, largest, by_unit)
    assert sorted(n for b in buckets for n in names(b)) == sorted(p.spec.name for u in units for p in u.parameters)
    for bucket in buckets:
        assert bucket.size % (parts * ALIGNMENT) == 0 and bucket.part * parts == bucket.size
        assert len({(p.spec.decay, p.spec.trainable) for p in bucket.parameters}) == 1
        owned = {p: [] for p in bucket.parameters}
        for rank in range(parts):
            for p, first, at, count in bucket.ranges(rank * bucket.part, (rank + 1) * bucket.part):
                assert at >= 0 and at + count <= bucket.part
                owned[p] += range(first, first + count)
        assert all(elements == list(range(p.numel())) for p, elements in owned.items())
        if largest > 300 or len(bucket.parameters) == 1:
            continue
        assert sum(p.numel() for p in bucket.parameters) <= largest or not bucket.decay


@pytest.mark.parametrize(
    ("elements", "stage", "sizes"),
    [
        (40 * 10**9, 0, [8_000_000, 8_000_000, 64_000_000, 1_024_000_000]),
        (40 * 10**9, 3, [8_000_000, 8_000_000, 64_000_000, 1_024_000_000]),
        (1_400_000_000, 1, [8_000_000, 8_000_000, 64_000_000, 175_000_000]),
        (1_400_000_000, 2, [8_000_000, 8_000_000, 43_750_000, 43_750_000]),
        (124_000_000, 1, [8_000_000, 8_000_000, 15_500_000, 15_500_000]),
        (124_000_000, 2, [8_000_000] * 4),
    ],
)
def test_buckets_grow_with_the_number_of_replicas(elements, stage, sizes):
    assert [usual_size(elements, ranks, stage) for ranks in (1, 8, 64, 1024)] == sizes


@pytest.mark.parametrize(("given", "buckets"), [(None, 8), (2**22, 32)])
def test_a_rank_takes_the_usual_size_unless_one_is_given(given, buckets):
    """128 matrices of 2^20 elements: an eighth of them is 16.8M."""
    unit = Unit(tuple(parameter(f"{i}", 2**20, device="meta") for i in range(128)))
    ctx = replace(ParallelContext.single("meta"), dp_cp=Axis("dp_cp", 64))
    flat = FlatBuffers([unit], ctx, 1, given)
    assert len(flat.buckets) == buckets


@pytest.mark.parametrize(("stage", "expected"), [(0, 8), (1, 4 + 2), (2, 3 * 4 + 2), (3, 3 * (4 + 2 * 2))])
def test_bytes_over_the_data_axis(stage, expected):
    """Of the table in zero.py: BF16 weights, float32 gradients, 3 micro-batches, 4 ranks."""
    shards, replicas = (4, 1) if stage else (1, 4)
    assert traffic(1000, shards, replicas, stage, 3, 2, 4).total == expected * 1000 * 3 // 4


@pytest.mark.parametrize(("stage", "within"), [(1, 4 + 2), (2, 3 * 4 + 2), (3, 3 * (4 + 2 * 2))])
def test_bytes_within_a_node_and_between_nodes(stage, within):
    """16 ranks: 4 of a node share the shards, 4 nodes have replicas."""
    assert traffic(1000, 4, 4, stage, 3, 2, 4) == (within * 1000 * 3 // 4, 2 * 4 * 1000 // 4 * 3 // 4)
