"""Exchanges through shared memory: what messages give, nothing left behind, and messages where there is no such memory."""

from pathlib import Path

import pytest
import torch

from megatrain.parallel import transport_shared
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.transport_shared import SLOT_BYTES, SLOTS, SMALLEST_BLOCK, SharedSlots, fits
from megatrain.testing import spawn

ROWS = SMALLEST_BLOCK // 64  # 64 float32 columns: four times the smallest block


def numbers(seed: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exchange(ctx: ParallelContext, dtype: torch.dtype, hinder: bool) -> bool:
    """Many overlapping gathers and reductions, waited for in the opposite order; whether they went through shared memory."""
    group, rank, size = ctx.dp.group, ctx.dp.rank, ctx.dp.size
    create = SharedSlots.create
    if hinder and rank == 1:
        SharedSlots.create = staticmethod(refuse)
    try:
        for turn in range(5):
            part, whole = numbers(turn * 10 + rank, ROWS, dtype), numbers(1000 + turn * 10 + rank, ROWS * size, dtype)
            outputs = [torch.empty(ROWS * size, 64, dtype=dtype) for _ in range(SLOTS + 2)]
            mine = torch.empty(ROWS, 64, dtype=dtype)
            handles = [group.all_gather(output, part, blocking=False) for output in outputs]
            handles.append(group.reduce_scatter(mine, whole, blocking=False))
            for handle in reversed(handles):
                handle.wait()
            gathered = torch.cat([numbers(turn * 10 + r, ROWS, dtype) for r in range(size)])
            parts = [numbers(1000 + turn * 10 + r, ROWS * size, dtype)[rank * ROWS :][:ROWS] for r in range(size)]
            assert all(torch.equal(output, gathered) for output in outputs)
            assert torch.equal(mine, torch.stack(parts).sum(0) if size == 2 else sum(parts[1:], parts[0]))
    finally:
        SharedSlots.create = staticmethod(create)
    return group._shared is not None


def refuse(name: str, place: int) -> Path:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (4, torch.float64)])
def test_overlapping_exchanges(size, dtype):
    before = set(Path("/dev/shm").glob("megatrain-*"))
    assert spawn(size, exchange, dtype, False) == [True] * size
    assert set(Path("/dev/shm").glob("megatrain-*")) == before


def test_messages_serve_where_one_rank_has_no_room():
    assert spawn(2, exchange, torch.float32, True) == [False, False]


def test_what_fits():
    assert fits(1, SMALLEST_BLOCK) and fits(1, SLOT_BYTES)
    assert not fits(1, SMALLEST_BLOCK - 1) and not fits(2, SLOT_BYTES // 2 + 1)


def test_a_rank_that_never_reads_is_waited_for_no_longer_than_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(transport_shared, "_FOLDER", tmp_path)
    files = [SharedSlots.create("group", place) for place in range(2)]
    slots = SharedSlots(0, 2, files, timeout_seconds=0.2)
    for _ in range(SLOTS):
        slots.end(slots.begin(lambda: None))
    with pytest.raises(TimeoutError, match=r"place 1 .* exchange 0"):
        slots.begin(lambda: None)
