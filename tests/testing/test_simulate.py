import random
import threading
import time

import numpy as np
import pytest
import torch

from megatrain.parallel.mesh import MeshShape
from megatrain.testing import RankTraceback, simulate


def test_results_come_in_rank_order_with_the_arguments_given():
    def place(ctx, scale, offset):
        return scale * ctx.world.rank + offset, ctx.tp.rank, ctx.dp.rank

    assert simulate(MeshShape(tp=2, dp=2), place, 10, 1) == [(1, 0, 0), (11, 1, 0), (21, 0, 1), (31, 1, 1)]
    assert simulate(3, lambda ctx: (ctx.dp.size, ctx.tp.size)) == [(3, 1)] * 3
    assert simulate(1, lambda ctx: ctx.world.group) == [None]


def test_nothing_global_is_touched():
    def work(ctx):
        x = torch.ones(32, 32, requires_grad=True)
        total = (x @ x).sum()
        total.backward()
        ctx.dp.group.all_reduce(total.detach())
        return torch.get_num_threads(), torch.is_grad_enabled()

    def state():
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.autograd.is_multithreading_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.distributed.is_initialized(),
            threading.active_count(),
        )

    before = state()
    with torch.no_grad():
        assert simulate(4, work) == [(1, True)] * 4
    assert state() == before


def test_backward_runs_in_the_ranks_own_thread():
    def work(ctx):
        seen = []
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda grad: seen.append(threading.current_thread().name))
        x.sum().backward()
        return seen, torch.autograd.is_multithreading_enabled()

    assert simulate(2, work) == [(["rank 0"], False), (["rank 1"], False)]


def test_the_first_failure_is_raised_and_the_others_told():
    def fail(ctx):
        if ctx.world.rank == 2:
            raise LookupError("the cause")
        ctx.world.group.barrier()

    with pytest.raises(LookupError, match="the cause") as caught:
        simulate(3, fail)
    story = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert story.startswith("rank 2 of 3 failed first:\nTraceback")
    assert "LookupError: the cause" in story
    assert "then rank 0: TransportError: rank 2 died: LookupError: the cause" in story
    assert "then rank 1: TransportError" in story


def test_a_failing_thread_count_is_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        simulate(2, lambda ctx: 1 // 0)
    assert torch.get_num_threads() == before


def test_a_rank_that_never_ends_is_shown_where_it_is():
    release = threading.Event()

    def loop(ctx):
        if ctx.world.rank == 1:
            release.wait(20)

    with pytest.raises(TimeoutError, match=r"1 of 2 simulated ranks still ran after 0.2 s\nrank 1 was in:(.|\n)*release.wait"):
        simulate(2, loop, timeout_seconds=0.2, in_turns=False)
    release.set()


def test_hundreds_of_layouts_are_cheap():
    start = time.perf_counter()
    for _ in range(200):
        simulate(MeshShape(tp=2, dp=2), lambda ctx: ctx.tp.group.all_reduce(torch.ones(8)))
    assert time.perf_counter() - start < 10


def test_many_small_collectives_are_cheap():
    def work(ctx):
        x = torch.ones(16)
        for _ in range(2000):
            ctx.dp.group.all_reduce(x, "max")

    start = time.perf_counter()
    simulate(4, work)
    assert time.perf_counter() - start < 10
