"""`simulate`: run a function on every rank of a mesh, as threads of this process over groups in memory.

Cheap enough for hundreds of layouts, and exact: reductions are done in rank order, so every run gives the same bits. Nothing
outside the threads is touched: no random generator, default dtype, process group or environment variable.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing.failure import Failure, raise_first
from megatrain.transport.group import World
from megatrain.transport.threads import MemoryWorld


def mesh_of(shape: int | MeshShape) -> MeshShape:
    """The mesh for a world size: all ranks data-parallel. A MeshShape is returned as it is."""
    return MeshShape(dp=shape) if isinstance(shape, int) else shape


def simulate(
    shape: int | MeshShape,
    fn: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 60.0,
    wrap: Callable[[World], World] | None = None,
    in_turns: bool = True,
) -> list[Any]:
    """Call `fn(ctx, *args)` on every rank of `shape` at once and return the results in rank order.

    shape: a MeshShape, or a world size, which means that many data-parallel ranks. `ctx` is each rank's ParallelContext.
    timeout_seconds: limit of the whole call, and of each collective.
    in_turns: one rank computes at a time, until it waits in a collective: three times as fast as threads that compete for the
    interpreter. False where ranks wait for one another by other means (a threading.Barrier, a polling loop), or sleep.
    wrap: applied to each rank's World before its groups are made (`lambda world: RecordedWorld(world, recorder)`).

    Each rank is one thread with one intra-op thread, and runs its backward in the same thread. `args` are shared by all ranks, not copied.
    Raises the exception of the first rank to fail, caused by a `RankTraceback` that names the rank and lists the others;
    TimeoutError, with the stacks of the ranks still running, past the limit.
    """
    mesh = mesh_of(shape)
    worlds = MemoryWorld.create(mesh.world, timeout_seconds)
    results: list[Any] = [None] * mesh.world
    failures: list[Failure] = []

    def run(world: MemoryWorld) -> None:
        torch.set_num_threads(1)
        torch.autograd.set_multithreading_enabled(False)
        if in_turns:
            world.begin_turn()
        try:
            ctx = ParallelContext.build(wrap(world) if wrap else world, mesh)
            results[world.rank] = fn(ctx, *args)
            world.leave()
        except BaseException as error:
            failures.append(Failure.of(world.rank, error))  # before other ranks fail by it: order counts
            world.leave(error)

    threads = [threading.Thread(target=run, args=(w,), name=f"rank {w.rank}", daemon=True) for w in worlds]
    intra_op = torch.get_num_threads()
    try:
        for thread in threads:
            thread.start()
        _join(threads, worlds[0], timeout_seconds)
    finally:
        torch.set_num_threads(intra_op)  # later threads would start with the setting of these
    raise_first(failures, mesh.world)
    return results


def _join(threads: list[threading.Thread], world: MemoryWorld, timeout_seconds: float) -> None:
    """Wait for all threads. Raises TimeoutError with the stacks of those that do not end in time."""
    deadline = time.monotonic() + timeout_seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [thread for thread in threads if thread.is_alive()]
    if not late:
        return
    frames = sys._current_frames()
    stacks = [
        f"{thread.name} was in:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in late
        if thread.ident in frames
    ]
    world.fail(f"simulate ended after {timeout_seconds:g} s.")
    raise TimeoutError(
        f"{len(late)} of {world.size} simulated ranks still ran after {timeout_seconds:g} s\n" + "\n".join(stacks)
    )
