"""Groups of torch.distributed, without its connections: which are made, and how."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.transport import processes
from megatrain.transport.processes import Rendezvous, TorchWorld
from megatrain.transport.wrappers import RecordedWorld, Recorder


class FakeNCCL:
    """As torch's, which is there in builds for CUDA alone."""

    class Options:
        def __init__(self, is_high_priority_stream=False):
            self.is_high_priority_stream = is_high_priority_stream
            self._timeout = timedelta(minutes=10)


@pytest.fixture
def connect(monkeypatch):
    """connect(size): rank 0 of a world whose other ranks are not there, and whose calls do nothing.

    And the groups that it makes: name, limit, and what the backend is told.
    """
    worlds, made, init, new = [], [], dist.init_process_group, dist.new_group
    monkeypatch.setattr(processes, "open_store", lambda *_: FakeStore())
    for step in ("require_own", "claim_rank", "meet_all"):
        monkeypatch.setattr(processes, step, lambda *_: None)

    def init_fake(backend, pg_options, **given):
        made.append(("all", given["timeout"], pg_options))
        monkeypatch.setattr(dist, "get_backend", lambda *_: backend)
        init("fake", **given)

    def new_fake(*ranks, pg_options, **given):
        made.append((given["group_desc"], given["timeout"], pg_options))
        return new(*ranks, backend="fake", **given)

    monkeypatch.setattr(dist, "init_process_group", init_fake)
    monkeypatch.setattr(dist, "new_group", new_fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU 0"))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNCCL, raising=False)

    def connected(size, backend="gloo"):
        worlds.append(TorchWorld.connect(0, size, backend=backend, rendezvous=Rendezvous(("nowhere", 1)), timeout_seconds=77.0))
        return worlds[-1], made

    yield connected
    monkeypatch.setattr(processes, "LINGER_SECONDS", 0.0)
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
    assert [name for name, *_ in made] == groups
    assert [options for *_, options in made] == [None] * len(groups), "gloo takes none"
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


def test_nccl_has_a_stream_of_high_priority_for_each_group(connect):
    """Torch warns where the limits differ, and writes into the options: they are no two groups'."""
    world, made = connect(8, "nccl")
    ParallelContext.build(world, MeshShape(tp=2, pp=2, dp=2))
    assert [name for name, *_ in made] == ["all", "tp", "dp", "pp", "pp 0>1", "pp 1>0"]
    assert len({id(options) for *_, options in made}) == 6
    for _, limit, options in made:
        assert options.is_high_priority_stream
        assert limit == options._timeout == timedelta(seconds=77)


def test_nccl_adds_in_the_dtype_that_it_is_given_and_a_wider_output_is_filled_from_it(connect, monkeypatch):
    calls = []

    def reduce_scatter(output, whole, op, group, async_op):
        calls.append((output.dtype, output.data_ptr() == whole.data_ptr(), op))
        output.fill_(3)

    monkeypatch.setattr(processes, "_reduce_scatter_single", reduce_scatter)
    group = connect(2, "nccl")[0].group("dp", (0, 1))
    output, whole = torch.zeros(4), torch.ones(8, dtype=torch.bfloat16)
    group.reduce_scatter(output, whole, blocking=False).wait()
    assert calls == [(torch.bfloat16, True, dist.ReduceOp.SUM)], "into this rank's part of what is sent"
    assert output.tolist() == [3.0] * 4


@pytest.mark.gpu
def test_nccl_takes_the_options(tmp_path):
    world = TorchWorld.connect(0, 1, backend="nccl", rendezvous=Rendezvous(tmp_path / "meet"), device="cuda:0")
    try:
        group, other, x = world.group("world", (0,)), world.group("dp", (0,)), torch.ones(3, device="cuda:0")
        for made in (group, other):
            made.all_reduce(x)
            assert made.process_group._get_backend(x.device).options.is_high_priority_stream
        assert group.to_host(x).tolist() == [1.0, 1.0, 1.0]
    finally:
        world.close()
