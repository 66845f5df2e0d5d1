"""A link that connects at its first message and holds the caller until the other side comes, as NCCL's do: no schedule may hang on it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.parallel import mesh
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.pipeline_parallel import Stage, run_schedule
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.simulator import ScheduleError
from megatrain.parallel.simulator import simulate as on_paper
from megatrain.testing import simulate
from megatrain.transport.group import World
from megatrain.transport.wrappers import Wrapper

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(CHUNKS)), stages=st.integers(2, 16), more=st.integers(0, 2), micro_batches=st.integers(1, 40)
)
def test_on_paper_open_links_never_deadlock_and_lazy_ones_do_with_few_micro_batches(name, stages, more, micro_batches):
    chunks = CHUNKS[name] + (more if name == "interleaved" else 0)
    schedule = Schedule(name, stages, chunks, micro_batches)
    assert on_paper(schedule).makespan > 0
    if name == "gpipe" or micro_batches < stages:
        with pytest.raises(ScheduleError, match="deadlocks: stage 0 waits for stage"):
            on_paper(schedule, lazy_links=True)


def test_a_lazy_link_holds_a_stage_until_the_other_comes():
    """Stage 0 posts the receive of its first gradient before forward 1, and is held until stage 1 has made it, at 4."""
    timeline = on_paper(Schedule("1f1b", 2, 1, 2), lazy_links=True)
    clock = [[(e.instruction.kind, e.start, e.end) for e in events] for events in timeline.stages]
    assert clock == [
        [("forward", 0, 1), ("forward", 4, 5), ("backward", 5, 7), ("backward", 8, 10)],
        [("forward", 1, 2), ("backward", 2, 4), ("forward", 5, 6), ("backward", 6, 8)],
    ]


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8, 9])
def test_links_open_in_an_order_that_ends(stages):
    """Every rank comes to its links one after the other, and is held at each until the other comes to the same one."""
    shape = MeshShape(pp=stages)
    left = [[link for link in shape.links(rank) if link is not None] for rank in range(stages)]
    while any(left):
        heads = [links[0] for links in left if links]
        meeting = {link for link in heads if heads.count(link) == 2}
        assert meeting, f"held: {left}"
        left = [links[1:] if links and links[0] in meeting else links for links in left]


class LazyGroup(Wrapper):
    """The first message of a group of two holds its sender and its receiver until both have come."""

    def __init__(self, inner):
        super().__init__(inner)
        self.connected = len(inner.ranks) != 2

    def barrier(self):
        self.inner.barrier()

    def _around(self, operation, larger, start, blocking):
        if operation in ("send", "recv") and not self.connected:
            self.inner.barrier()
            self.connected = True
        handle = start()
        if blocking:
            handle.wait()
        return handle


class LazyWorld(World):
    def __init__(self, inner):
        self.inner, self.rank, self.size = inner, inner.rank, inner.size

    def group(self, name, ranks):
        return LazyGroup(self.inner.group(name, ranks))

    def close(self):
        self.inner.close()


def run(ctx: ParallelContext, name: str, micro_batches: int) -> float:
    schedule = Schedule(name, ctx.pp.size, CHUNKS[name], micro_batches)
    stage = Stage(
        ctx,
        [lambda hidden, micro_batch, *_: (micro_batch if hidden is None else hidden) * 2.0] * schedule.chunks,
        lambda hidden, _micro_batch: (hidden.sum(), {}, None),
        torch.empty_like,
    )
    batches = [torch.full((2,), float(m + 1)) for m in range(micro_batches)]
    return float(run_schedule(stage, schedule, batches, 1.0).by_name["loss"])


@pytest.mark.parametrize("name", sorted(CHUNKS))
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_mesh_opens_its_links_so_that_no_schedule_hangs(name, micro_batches):
    losses = simulate(MeshShape(pp=3), run, name, micro_batches, wrap=LazyWorld, timeout_seconds=20.0)
    virtual, total = 3 * CHUNKS[name], sum(range(1, micro_batches + 1))
    assert max(losses) == 2.0 * total * 2.0**virtual and sorted(losses)[:2] == [0.0, 0.0]


def test_links_that_are_not_opened_hang(monkeypatch):
    """What the test above is worth."""
    real = mesh._links

    def closed(world, shape, device):
        sends, receives = real(world.inner, shape, device)
        lazy = {id(link.group): LazyGroup(link.group) for link in (*sends.values(), *receives.values())}
        return tuple(
            {to: mesh.Link(lazy[id(link.group)], link.other) for to, link in links.items()} for links in (sends, receives)
        )

    monkeypatch.setattr(mesh, "_links", closed)
    with pytest.raises((TimeoutError, RuntimeError)):
        simulate(MeshShape(pp=2), run, "gpipe", 2, wrap=LazyWorld, timeout_seconds=2.0)
