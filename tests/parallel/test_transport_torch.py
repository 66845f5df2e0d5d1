"""Groups of torch.distributed, without its connections: which are made, and how."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatrain.parallel import transport_torch
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.transport_torch import TorchWorld
from megatrain.parallel.transport_wrappers import RecordedWorld, Recorder


@pytest.fixture
def connect(monkeypatch):
    """connect(size): rank 0 of a world whose other ranks are not there, and whose calls do nothing; the groups it makes."""
    worlds, made, init, new = [], [], dist.init_process_group, dist.new_group
    monkeypatch.setattr(transport_torch, "open_store", lambda *_: FakeStore())
    monkeypatch.setattr(transport_torch, "meet_all", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda _backend, **given: made.append("all") or init("fake", **given))
    monkeypatch.setattr(dist, "new_group", lambda *ranks, **given: made.append(given["group_desc"]) or new(*ranks, **given))

    def connected(size):
        worlds.append(TorchWorld.connect(0, size, backend="gloo", rendezvous=("nowhere", 1)))
        return worlds[-1], made

    yield connected
    monkeypatch.setattr(transport_torch, "LINGER_SECONDS", 0.0)
    for world in worlds:
        world.close()


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        (MeshShape(tp=2, pp=2, dp=2), ["all", "tp", "dp", "pp", "pp 0>1", "pp 1>0"]),
        (MeshShape(tp=2), ["all"]),
        (MeshShape(pp=2), ["all", "pp 0>1", "pp 1>0"]),
    ],
)
def test_a_run_makes_each_communicator_once(connect, shape, groups):
    """Torch's own group of all ranks is the world's, for the start and for the axes."""
    world, made = connect(shape.world)
    world = RecordedWorld(world, Recorder())
    everyone = world.group("world", range(shape.world))
    ctx = ParallelContext.build(world, shape)
    assert made == groups
    assert ctx.world.group is everyone and everyone.inner.process_group is dist.group.WORLD
    for axis in (axis for axis in (ctx.tp, ctx.dp, ctx.dp_cp, ctx.pp, ctx.ends) if axis.size > 1):
        assert axis.group.name == axis.group.inner.name == axis.name
        assert axis.group.ranks == axis.ranks


def test_calls_are_told_by_the_axis_that_makes_them(connect):
    recorder = Recorder()
    ctx = ParallelContext.build(RecordedWorld(connect(2)[0], recorder), MeshShape(dp=2))
    for group in (ctx.dp.group, ctx.world.group, ctx.dp_cp.group, ctx.dp_cp.group):
        group.barrier()
    assert recorder.issued() == {"dp/0": 1, "world/0": 1, "dp_cp/0": 2}
    ctx.dp.group.close()
    assert ctx.dp_cp.group.inner.process_group is None
    assert dist.is_initialized(), "the group of all ranks goes with the world"
