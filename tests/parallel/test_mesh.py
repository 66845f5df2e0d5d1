"""The mesh is arithmetic: checked for up to 16,384 ranks without a process."""

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.parallel.mesh import AXES, MeshShape, ParallelContext
from megatrain.testing import simulate
from megatrain.transport.group import Group, World

LARGEST = 16_384


@st.composite
def shapes(draw, largest=LARGEST):
    sides, room = {}, largest
    for axis in draw(st.permutations(["tp", "cp", "dp", "pp"])):
        sides[axis] = draw(st.integers(1, min(room, 64)) | st.integers(1, room))
        room //= sides[axis]
    replicas = sides["dp"] * sides["cp"]
    divisors = [n for n in range(1, min(replicas, 256) + 1) if replicas % n == 0]
    return MeshShape(**sides, ep=draw(st.sampled_from(divisors)), zero_ranks=draw(st.sampled_from([None, *divisors])))


def expected_size(shape, axis, rank):
    replicas = shape.dp * shape.cp
    if axis == "ends":
        return len({0, shape.pp - 1}) if shape.coordinates(rank)["pp"] in (0, shape.pp - 1) else 1
    sizes = {"edp": replicas // shape.ep, "dp_cp": replicas, "world": shape.world}
    sizes["shards"] = shape.zero_ranks or replicas
    sizes["replicas"] = replicas // sizes["shards"]
    sizes["edp_shards"] = sizes["shards"] // shape.ep if sizes["shards"] % shape.ep == 0 else 1
    sizes["edp_replicas"] = sizes["edp"] // sizes["edp_shards"]
    return sizes[axis] if axis in sizes else getattr(shape, axis)


class CountingWorld(World):
    """Makes groups that can do nothing but be connected."""

    def __init__(self, rank, size):
        self.rank, self.size, self.made, self.names = rank, size, [], []

    def group(self, name, ranks):
        self.made.append(tuple(ranks))
        self.names.append(name)
        idle = object.__new__(Idle)
        idle.name = name
        return idle


class Idle(Group):
    all_reduce = all_gather = reduce_scatter = all_to_all = broadcast = barrier = None

    def send(self, tensor, to):
        """A link is connected by one number."""
        assert tensor.shape == (1,)

    recv = send


Idle.__abstractmethods__ = frozenset()


@given(shapes(), st.data())
def test_coordinates_and_rank_are_inverse(shape, data):
    rank = data.draw(st.integers(0, shape.world - 1))
    place = shape.coordinates(rank)
    assert shape.rank_at(**place) == rank
    assert all(0 <= place[axis] < getattr(shape, axis) for axis in place)


def test_every_rank_has_its_own_place_among_16384():
    shape = MeshShape(tp=8, cp=4, dp=32, pp=16)
    assert shape.world == LARGEST
    assert len({tuple(shape.coordinates(rank).items()) for rank in range(LARGEST)}) == LARGEST


@settings(max_examples=40, deadline=None)
@given(shapes(1024), st.sampled_from(AXES))
def test_groups_of_an_axis_partition_the_world(shape, axis):
    seen = set()
    for rank in range(shape.world):
        if rank in seen:
            continue
        group = shape.ranks_along(axis, rank)
        assert rank in group and len(group) == expected_size(shape, axis, rank)
        assert list(group) == sorted(set(group))
        assert seen.isdisjoint(group)
        seen.update(group)
        for member in (group[0], group[-1], group[len(group) // 2]):
            assert shape.ranks_along(axis, member) == group
    assert seen == set(range(shape.world))


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_a_rank_makes_few_groups_and_sits_in_each(shape, data):
    rank = data.draw(st.integers(0, shape.world - 1))
    world = CountingWorld(rank, shape.world)
    ctx = ParallelContext.build(world, shape)
    links = shape.links(rank)
    assert len(world.made) <= 15 + (2 + (shape.ep > 1)) * (shape.zero_ranks is not None)
    of_axes = world.made[: -len(links) or None]
    assert len(of_axes) == len(set(of_axes)) and all(rank in ranks for ranks in world.made)
    assert sum(len(ranks) == 1 for ranks in of_axes) <= (shape.pp > 2), "only `ends` may stand by"
    for name in AXES:
        axis = getattr(ctx, name)
        assert axis.name == name and axis.size == len(axis.ranks) == expected_size(shape, name, rank)
        assert axis.ranks[axis.rank] == rank
        assert (axis.group is None) == (axis.size == 1)


@pytest.mark.parametrize(
    ("shape", "made"),
    [
        (MeshShape(tp=2, pp=2, dp=2), ["world", "tp", "dp", "pp", "pp 0>1", "pp 1>0"]),
        (MeshShape(tp=2, dp=2), ["world", "tp", "dp"]),
        (MeshShape(tp=8), ["world"]),
        (MeshShape(dp=8), ["world"]),
        (MeshShape(pp=2), ["world", "pp 0>1", "pp 1>0"]),
        (MeshShape(cp=2, dp=4, ep=4), ["world", "cp", "dp", "ep", "edp"]),
    ],
)
def test_axes_of_the_same_ranks_are_one_group_under_their_own_names(shape, made):
    world = CountingWorld(0, shape.world)
    ctx = ParallelContext.build(world, shape)
    assert world.names == made
    groups = {name: getattr(ctx, name).group for name in AXES if getattr(ctx, name).size > 1}
    assert {name: group.name for name, group in groups.items()} == {name: name for name in groups}


def test_16384_ranks_make_as_many_distinct_groups_as_the_axes_have():
    shape = MeshShape(tp=8, cp=2, dp=64, pp=16, ep=8)
    assert shape.world == LARGEST
    for axis in AXES:
        if axis in ("world", "ends"):
            continue
        distinct = {shape.ranks_along(axis, rank)[0] for rank in random.Random(0).sample(range(LARGEST), 512)}
        assert len(distinct) <= LARGEST // expected_size(shape, axis, 0)
    first = {shape.ranks_along("tp", rank) for rank in range(LARGEST)}
    assert len(first) == LARGEST // 8


def test_tensor_parallel_ranks_are_neighbours_and_stages_far_apart():
    shape = MeshShape(tp=2, cp=2, dp=2, pp=2, ep=2)
    assert shape.ranks_along("tp", 5) == (4, 5)
    assert shape.ranks_along("cp", 5) == (5, 7)
    assert shape.ranks_along("dp", 5) == (1, 5)
    assert shape.ranks_along("pp", 5) == (5, 13)
    assert shape.ranks_along("dp_cp", 5) == (1, 3, 5, 7)
    assert shape.ranks_along("ep", 5) == (5, 7)
    assert shape.ranks_along("edp", 5) == (1, 5)
    assert shape.ranks_along("shards", 5) == (1, 3, 5, 7) and shape.ranks_along("replicas", 5) == (5,)
    assert shape.ranks_along("ends", 5) == (5, 13)
    assert [MeshShape(tp=2, pp=3).ranks_along("ends", rank) for rank in (1, 3, 5)] == [(1, 5), (3,), (1, 5)]


@given(stages=st.integers(1, 64), other=st.sampled_from([1, 3]))
def test_both_ranks_of_a_link_make_it_at_the_same_place(stages, other):
    """And every rank makes as many: torch tells groups of the same ranks apart by how many a process has made before."""
    shape = MeshShape(tp=other, pp=stages)
    ranks = shape.ranks_along("pp", shape.world - 1)
    made = [shape.links(rank) for rank in ranks]
    assert len({len(links) for links in made}) == 1 and len(made[0]) <= 6
    for stage, links in enumerate(made):
        for place, link in enumerate(links):
            assert link is None or (stage in link and made[link[0]][place] == made[link[1]][place] == link)
    wanted = {(s, (s + d) % stages) for s in range(stages) for d in (1, -1)} if stages > 1 else set()
    assert {link for links in made for link in links if link} == wanted
    groups = set()
    for rank in range(shape.world):
        world = CountingWorld(rank, shape.world)
        ParallelContext.build(world, shape)
        groups.add(len(world.made))
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("inner", "outer", "of"),
    [("ep", "edp", "dp_cp"), ("shards", "replicas", "dp_cp"), ("edp_shards", "edp_replicas", "edp")],
)
@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_experts_and_shards_divide_the_replicas(inner, outer, of, shape, data):
    rank = data.draw(st.integers(0, shape.world - 1))
    different, copies, whole = (set(shape.ranks_along(axis, rank)) for axis in (inner, outer, of))
    assert different & copies == {rank}
    assert different | copies <= whole
    assert len(different) * len(copies) == len(whole)
    if inner == "edp_shards":
        assert different <= set(shape.ranks_along("shards", rank)), "what stays within a node does so for experts"


def test_the_copies_of_an_expert_share_shards_within_a_node():
    """8 data ranks, two experts in turn, nodes of 4: an expert has two shards, on two ranks of a node, and two replicas of each."""
    shape = MeshShape(dp=8, ep=2, zero_ranks=4)
    assert [shape.ranks_along("edp", rank) for rank in (0, 5)] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [shape.ranks_along("edp_shards", rank) for rank in (0, 3, 5)] == [(0, 2), (1, 3), (5, 7)]
    assert [shape.ranks_along("edp_replicas", rank) for rank in (0, 3, 5)] == [(0, 4), (3, 7), (1, 5)]
    parts = [ParallelContext.build(CountingWorld(rank, 8), shape).part("edp") for rank in range(8)]
    assert parts == [0, 0, 2, 2, 1, 1, 3, 3]
    alone = MeshShape(dp=8, ep=4, zero_ranks=2)  # no two ranks of a node have the same expert
    assert alone.ranks_along("edp_shards", 5) == (5,) and alone.ranks_along("edp_replicas", 5) == (1, 5)


def test_ranks_of_a_node_share_the_shards_and_each_writes_a_part():
    """tp 2 x dp 4, two data ranks a node of four: shards stay within the node, the two parts of a shard are its replicas'."""
    shape = MeshShape(tp=2, dp=4, zero_ranks=2)
    assert [shape.ranks_along("shards", rank) for rank in (0, 3, 4, 7)] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert [shape.ranks_along("replicas", rank) for rank in (0, 3, 4, 7)] == [(0, 4), (3, 7), (0, 4), (3, 7)]
    parts = [ParallelContext.build(CountingWorld(rank, 8), shape).part("dp_cp") for rank in range(8)]
    assert parts == [0, 0, 2, 2, 1, 1, 3, 3]
    whole = [ParallelContext.build(CountingWorld(rank, 8), MeshShape(tp=2, dp=4)).part("dp_cp") for rank in range(8)]
    assert whole == [0, 0, 1, 1, 2, 2, 3, 3]


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match=r"rank 8 is not in a world of 8 ranks \(0..7\)"):
        MeshShape(tp=8).coordinates(8)
    with pytest.raises(ValueError, match="unknown axis 'xp'; axes are tp, cp"):
        MeshShape(tp=8).ranks_along("xp", 0)
    with pytest.raises(ValueError, match=r"mesh of 4 ranks .* world of 6 ranks"):
        ParallelContext.build(CountingWorld(0, 6), MeshShape(tp=4))
    with pytest.raises(ValueError, match=r"expert_parallel_size=3 must divide .* 4"):
        ParallelContext.build(CountingWorld(0, 4), MeshShape(dp=4, ep=3))
    with pytest.raises(ValueError, match=r"zero_ranks=3 must divide .* 4"):
        ParallelContext.build(CountingWorld(0, 4), MeshShape(dp=4, zero_ranks=3))


def test_a_single_process_has_axes_without_groups():
    ctx = ParallelContext.single()
    for name in AXES:
        axis = getattr(ctx, name)
        assert (axis.name, axis.size, axis.rank, axis.ranks, axis.group) == (name, 1, 0, (0,), None)
    assert ctx.device == torch.device("cpu")


def test_groups_talk_to_the_ranks_that_the_arithmetic_says():
    shape = MeshShape(tp=2, cp=2, dp=2, pp=1, ep=2)

    def sums(ctx):
        totals = {}
        for name in AXES:
            axis, mine = getattr(ctx, name), torch.tensor([float(ctx.world.rank)])
            if axis.group is not None:
                axis.group.all_reduce(mine)
            totals[name] = mine.item()
        return totals

    for rank, totals in enumerate(simulate(shape, sums)):
        assert totals == {axis: float(sum(shape.ranks_along(axis, rank))) for axis in AXES}


def test_a_context_of_16384_ranks_is_built_in_no_time():
    start = time.perf_counter()
    ParallelContext.build(CountingWorld(12_345, LARGEST), MeshShape(tp=8, cp=4, dp=32, pp=16))
    assert time.perf_counter() - start < 1
