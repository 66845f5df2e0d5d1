"""Ranks as real processes (megatrain.testing.worker): results in order, errors, hangs, replacement."""

import importlib
import os
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from megatrain.parallel.mesh import MeshShape
from megatrain.testing import RankFailed, RankTraceback, spawn
from megatrain.testing.spawn import close_pools
from megatrain.transport.group import TransportError

SPAWN = importlib.import_module("megatrain.testing.spawn")
START = SPAWN.start_worker
"""As users have it; in tests processes are forks (conftest.py)."""


@dataclass(frozen=True)
class Place:
    rank: int
    tp: int
    tensor: torch.Tensor


def place(ctx, place_of_zero):
    tensor = place_of_zero.tensor.clone()
    if ctx.world.group is not None:
        ctx.world.group.all_reduce(tensor)
    return Place(ctx.world.rank, ctx.tp.rank, tensor)


def process(ctx):
    return os.getpid(), torch.get_num_threads()


def fail_on_one(ctx):
    if ctx.world.rank == 1:
        raise LookupError("the cause")
    ctx.world.group.barrier()


class Awkward(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


def fail_awkwardly(ctx):
    raise Awkward(1, 2)


def crash(ctx):
    if ctx.world.rank == 0:
        os._exit(7)
    ctx.world.group.barrier()


def hang(ctx):
    if ctx.world.rank == 1:
        time.sleep(100)
    ctx.world.group.barrier()


def return_early(ctx):
    """Rank 0 is done as soon as its message is on the way."""
    if ctx.world.rank == 0:
        ctx.world.group.send(torch.arange(100_000.0), 1)
        return 0.0
    time.sleep(0.3)
    received = torch.empty(100_000)
    ctx.world.group.recv(received, 0)
    return received[-1].item()


def test_results_come_in_rank_order_and_classes_of_test_files_travel():
    results = spawn(MeshShape(tp=2), place, Place(0, 0, torch.ones(2)))
    assert [(r.rank, r.tp, r.tensor.tolist()) for r in results] == [(0, 0, [2.0, 2.0]), (1, 1, [2.0, 2.0])]
    assert all(isinstance(result, Place) for result in results)
    assert spawn(1, place, Place(0, 0, torch.ones(1)))[0].tensor.tolist() == [1.0]


def test_processes_start_by_themselves(monkeypatch):
    monkeypatch.setattr(SPAWN, "start_worker", START)
    close_pools()
    try:
        assert [place.rank for place in spawn(2, place, Place(0, 0, torch.ones(2)))] == [0, 1]
    finally:
        close_pools()


def test_processes_live_on_and_have_one_thread_each():
    first, second = spawn(2, process), spawn(2, process)
    assert first == second
    assert len({pid for pid, _ in first} | {os.getpid()}) == 3
    assert spawn(3, process)[:2] == first  # a larger world has the processes of a smaller one
    assert [threads for _, threads in first] == [1, 1]


def test_the_first_failure_is_raised_and_the_pool_lives_on():
    before = spawn(2, process)
    start = time.monotonic()
    with pytest.raises(LookupError, match="the cause") as caught:
        spawn(2, fail_on_one)
    assert time.monotonic() - start < 10
    story = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert story.startswith("rank 1 of 2 failed first:\nTraceback")
    assert "in fail_on_one" in story and "then rank 0: TransportError: barrier on axis world" in story
    assert spawn(2, process) == before


def test_an_exception_that_cannot_travel_is_described():
    with pytest.raises(RankFailed, match=r"rank [01]: Awkward: 1 and 2"):
        spawn(2, fail_awkwardly)


def test_a_crashed_rank_is_named_and_replaced():
    before = spawn(2, process)
    with pytest.raises(RankFailed, match="the process of rank 0 ended with exit code 7"):
        spawn(2, crash)
    after = spawn(2, process)
    assert {pid for pid, _ in before}.isdisjoint(pid for pid, _ in after)


def test_a_hanging_rank_is_killed_and_its_stack_shown():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"spawned ranks still ran after 2 s(.|\n)*in hang"):
        spawn(2, hang, timeout_seconds=2)
    assert time.monotonic() - start < 10
    assert len(spawn(2, process)) == 2


def test_a_rank_that_returns_early_does_not_cut_off_its_messages():
    with_answer = spawn(2, return_early)
    assert with_answer == [0.0, 99_999.0]


def test_only_functions_of_files_can_be_sent():
    with pytest.raises(TypeError, match="top level of a"):
        spawn(2, lambda ctx: None)


def test_errors_of_the_transport_keep_their_type():
    with pytest.raises(TransportError, match="place 5"):
        spawn(2, wrong_place)


def wrong_place(ctx):
    ctx.world.group.send(torch.zeros(1), 5)
