"""Exchanges through shared memory: what messages give, nothing left behind, and messages where there is no such memory."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import spawn
from megatrain.transport import leftovers, shared_memory
from megatrain.transport.shared_memory import SLOT_BYTES, SLOTS, SMALLEST_BLOCK, SharedSlots, fits

ROWS = SMALLEST_BLOCK // 64  # 64 float32 columns: four times the smallest block


def numbers(seed: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exchange(ctx: ParallelContext, dtype: torch.dtype, folder: Path, hinder: bool) -> bool:
    """Many overlapping gathers and reductions, waited for in the opposite order; whether they went through shared files."""
    group, rank, size = ctx.dp.group, ctx.dp.rank, ctx.dp.size
    create, memory = SharedSlots.create, leftovers.FOLDER
    leftovers.FOLDER = folder
    if hinder and rank == 1:
        SharedSlots.create = staticmethod(refuse)
    try:
        for turn in range(5):
            part, whole = numbers(turn * 10 + rank, ROWS, dtype), numbers(1000 + turn * 10 + rank, ROWS * size, dtype)
            outputs = [torch.empty(ROWS * size, 64, dtype=dtype) for _ in range(SLOTS + 2)]
            mine = torch.empty(ROWS, 64, dtype=dtype)
            handles = [group.all_gather(output, part, blocking=False) for output in outputs]
            wide = torch.empty(ROWS, 64, dtype=torch.promote_types(dtype, torch.float32))
            handles.append(group.reduce_scatter(mine, whole, blocking=False))
            handles.append(group.reduce_scatter(wide, whole.clone(), blocking=False))
            for handle in reversed(handles):
                handle.wait()
            gathered = torch.cat([numbers(turn * 10 + r, ROWS, dtype) for r in range(size)])
            parts = [numbers(1000 + turn * 10 + r, ROWS * size, dtype)[rank * ROWS :][:ROWS] for r in range(size)]
            assert all(torch.equal(output, gathered) for output in outputs)
            assert torch.equal(wide, sum((part.to(wide.dtype) for part in parts[1:]), parts[0].to(wide.dtype)))
            assert torch.equal(mine, torch.stack(parts).sum(0) if size == 2 else sum(parts[1:], parts[0]))
    finally:
        SharedSlots.create, leftovers.FOLDER = staticmethod(create), memory
    return group._shared._slots is not None


def refuse(name: str, place: int, size: int) -> Path:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (4, torch.float64)])
def test_overlapping_exchanges(size, dtype, tmp_path):
    assert spawn(size, exchange, dtype, tmp_path, False) == [True] * size
    assert list(tmp_path.iterdir()) == []


def test_messages_serve_where_one_rank_has_no_room(tmp_path):
    assert spawn(2, exchange, torch.float32, tmp_path, True) == [False, False]
    assert list(tmp_path.iterdir()) == []


def test_what_fits():
    assert fits(1, SMALLEST_BLOCK) and fits(1, SLOT_BYTES)
    assert not fits(1, SMALLEST_BLOCK - 1) and not fits(2, SLOT_BYTES // 2 + 1)


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """Two ranks' sides of a group, in this process."""
    monkeypatch.setattr(leftovers, "FOLDER", tmp_path)
    files = [SharedSlots.create("group", place, 2) for place in range(2)]
    return [SharedSlots(place, 2, files, timeout_seconds=0.3) for place in range(2)]


def begin(side: SharedSlots) -> int:
    """A new exchange, its slot free to be written."""
    number = side.take()
    side.claim(number)
    return number


def test_a_rank_that_never_reads_is_waited_for_no_longer_than_the_limit(pair):
    for _ in range(SLOTS):
        pair[0].end(begin(pair[0]))
    with pytest.raises(TimeoutError, match=r"place 1 .* has not read exchange 0"):
        begin(pair[0])


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_limit(pair):
    number = begin(pair[0])
    pair[0].publish(number)
    with pytest.raises(TimeoutError, match=r"place 1 .* has not come to exchange 0"):
        pair[0].receive(number)


def test_a_clock_that_is_set_back_makes_no_wait_longer(pair, monkeypatch):
    """As between reading the clock and sleeping: the time to wake would lie an hour ahead."""
    real, said = time.time, []
    monkeypatch.setattr(shared_memory, "time", SimpleNamespace(**vars(time) | {"time": lambda: real() + 3600}))

    def wait():
        with pytest.raises(TimeoutError):
            pair[0].receive(begin(pair[0]), patient=True)
        said.append("in time")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(10)
    assert said == ["in time"]


def test_a_rank_that_has_ended_is_noticed_at_once_but_what_it_published_is_read(pair):
    pair[0]._timeout = 60
    for side in pair:
        side.publish(begin(side))
    pair[1].close()
    pair[0].receive(0)
    pair[0].end(0)
    number = begin(pair[0])
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"place 1 of the group has ended, and has not come to exchange 1"):
        pair[0].receive(number)
    assert time.monotonic() - start < 5


def test_exchanges_may_be_received_in_any_order(pair):
    numbers = [[begin(side) for _ in range(SLOTS)] for side in pair]
    for number in numbers[1]:
        pair[1].slot(1, number, 0, torch.empty(4)).fill_(number)
        pair[1].publish(number)
    for number in reversed(numbers[0]):
        pair[0].receive(number)
        assert pair[0].slot(1, number, 0, torch.empty(4)).tolist() == [number] * 4
        pair[0].end(number)


def test_where_there_is_no_room_it_is_said_and_nothing_stays_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(leftovers, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        SharedSlots.create("group", 0, 2)
    assert list(tmp_path.iterdir()) == []
