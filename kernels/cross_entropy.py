"""One rank's part of a cross-entropy over a split vocabulary: what each row of logits contributes, and its gradient, in place.

    forward    top = largest logit, total = sum of exp(x - top), label's logit
    backward   the logits become factor exp(x - top) - spread, and at the label what the caller says

The collectives between the two are in `parallel/vocabulary.py`. Statistics are in at least float32. The reference turns logits
into their exponentials at once, which spares the backward an exp and two passes; Triton's forward only reads, in one pass. Padding behind a
row's ids is read by neither, and Triton's loads go over it whole: rows of 50,304 begin at a multiple of 16 bytes, those of 50,257 do not.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatrain.kernels.dispatch import Kernels, jit, next_power, tl, use_numba, use_triton

BLOCK = 4096
"""Number of ids that a Triton program takes at a time."""
LOG2_E = math.log2(math.e)


def statistics_of(
    logits: torch.Tensor,
    local: torch.Tensor,
    here: torch.Tensor,
    *,
    ids: int | None = None,
    with_sum: bool = False,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Statistics of each row of logits [n, v_local]: its largest value, the sum of exp(x - largest), the logit of label `local` (0
    if not `here`), and with_sum the sum of its logits, else None: [n] each.

    ids: number of logits in a row, the rest is padding; None: all. `logits` are overwritten, for `gradient_of` alone to read.
    A rank that has no ids of a tiny vocabulary returns -inf and 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    top = torch.full((logits.shape[0],), -torch.inf, dtype=dtype, device=logits.device)
    total, label = torch.zeros_like(top), torch.zeros_like(top)
    added = torch.zeros_like(top) if with_sum else None
    width = logits.shape[1]
    ids = width if ids is None else ids
    if logits.shape[0] * ids == 0:
        return top, total, label, added
    if use_triton(kernels, logits.device):
        local, here = local.contiguous(), here.contiguous()
        _statistics_kernel[(logits.shape[0],)](
            logits, local, here, top, total, label, total if added is None else added, *logits.stride(), IDS=ids, WIDTH=width,
            WITH_SUM=with_sum, BLOCK=min(BLOCK, next_power(width)), num_warps=8,
        )  # fmt: skip
        return top, total, label, added
    if added is None and _by_numba(kernels, logits):
        label.copy_(logits.gather(1, local[:, None]).squeeze(1) * here)
        _numba().statistics(logits, ids, top, total)
        return top, total, label, added
    logits = logits[:, :ids]
    blocks = _row_blocks(logits)
    wide = None if dtype == logits.dtype else torch.empty_like(logits[blocks[0]], dtype=dtype)
    for block in blocks:
        x = logits[block]
        x = x if wide is None else wide[: len(x)].copy_(x)
        label[block] = x.gather(1, local[block, None]).squeeze(1) * here[block]
        if added is not None:
            added[block] = x.sum(1)
        top[block] = x.amax(1)
        x = x.sub_(top[block, None]).exp_() if wide is None else _exponentials_in_16_bits(x, top[block, None])
        total[block] = x.sum(1)
        if wide is not None:
            logits[block] = x
    return top, total, label, added


def gradient_of(
    logits: torch.Tensor,
    top: torch.Tensor,
    factor: torch.Tensor,
    spread: torch.Tensor | None,
    local: torch.Tensor,
    here: torch.Tensor,
    label: torch.Tensor,
    *,
    ids: int | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Turn logits [n, v_local], as `statistics_of` left them, into factor exp(x - top) - spread, with `label` at `local` if `here`.

    All other tensors: [n]. ids: as for `statistics_of`; padding becomes zero.
    """
    width = logits.shape[1]
    ids = width if ids is None else ids
    if logits.shape[0] * ids == 0:
        logits.zero_()  # a rank without ids: its rows are only padding
        return
    if use_triton(kernels, logits.device):
        of_rows = (top, factor, factor if spread is None else spread, local, here, label)
        _gradient_kernel[(logits.shape[0],)](
            logits, *(x.contiguous() for x in of_rows), *logits.stride(), IDS=ids, WIDTH=width,
            SPREAD=spread is not None, BLOCK=min(BLOCK, next_power(width)), num_warps=8,
        )  # fmt: skip
        return
    if _by_numba(kernels, logits):
        _numba().gradient(logits, ids, factor.float(), torch.zeros_like(top) if spread is None else spread.float())
    else:
        logits[:, ids:].zero_()
        logits = logits[:, :ids]
        logits.mul_(factor[:, None].to(logits.dtype))
        if spread is not None:
            logits.sub_(spread[:, None].to(logits.dtype))
    rows = torch.arange(logits.shape[0], device=logits.device)
    logits[rows, local] = torch.where(here, label.to(logits.dtype), logits[rows, local])  # scatter_ would copy all logits


def _by_numba(kernels: Kernels, logits: torch.Tensor) -> bool:
    return use_numba(kernels, logits) and logits.stride(1) == 1


def _numba() -> Any:
    from megatrain.kernels import cpu_softmax  # noqa: PLC0415  numba is optional

    return cpu_softmax


def _exponentials_in_16_bits(x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """exp(x - top), in place in float32, as good as 16 bits need: torch has exp2 of float32 on a CPU in a third of the time of exp.

    x - top is taken before the factor log2(e): it is exact, while the difference of two large products would be only their roundings.
    """
    return x.sub_(top).mul_(LOG2_E).exp2_()


def _row_blocks(rows: torch.Tensor) -> list[slice]:
    """Ranges of rows [n, width] whose float32 copies stay in a CPU's cache; one range on a GPU."""
    size = rows.shape[0] if rows.is_cuda else max(1, 2**19 // max(1, rows.shape[1]))
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _statistics_kernel(
    logits, local, here, top, total, label, added, stride_row, stride_column, IDS: tl.constexpr, WIDTH: tl.constexpr,
    WITH_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride_row
    offsets = tl.arange(0, BLOCK)
    highest = tl.full((), -float("inf"), tl.float32)
    exponentials = tl.full((), 0.0, tl.float32)
    plain = tl.full((), 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + offsets
        x = tl.load(line + at * stride_column, mask=at < WIDTH, other=-float("inf")).to(tl.float32)
        inside = at < IDS
        x = tl.where(inside, x, -float("inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        exponentials = exponentials * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
        if WITH_SUM:
            plain += tl.sum(tl.where(inside, x, 0.0), 0)
    tl.store(top + row, highest)
    tl.store(total + row, exponentials)
    if WITH_SUM:
        tl.store(added + row, plain)
    mine = tl.load(here + row)
    value = tl.load(line + tl.load(local + row) * stride_column).to(tl.float32)
    tl.store(label + row, tl.where(mine, value, 0.0))


@jit
def _gradient_kernel(
    logits, top, factor, spread, local, here, label, stride_row, stride_column, IDS: tl.constexpr, WIDTH: tl.constexpr,
    SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride_row
    offsets = tl.arange(0, BLOCK)
    highest, times = tl.load(top + row).to(tl.float32), tl.load(factor + row).to(tl.float32)
    column = tl.where(tl.load(here + row), tl.load(local + row), -1)
    value = tl.load(label + row).to(tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + offsets
        x = tl.load(line + at * stride_column, mask=at < WIDTH, other=0.0).to(tl.float32)
        g = tl.exp(x - highest) * times
        if SPREAD:
            g -= tl.load(spread + row).to(tl.float32)
        g = tl.where(at < IDS, tl.where(at == column, value, g), 0.0)
        tl.store(line + at * stride_column, g.to(logits.dtype.element_ty), mask=at < WIDTH)
