"""Global gradient norm: every logical element counted once, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from megatrain.parallel.collectives import all_reduce, to_host
from megatrain.parallel.flat import Segment
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Part
from megatrain.parallel.zero import FlatParameters
from megatrain.transport.host import to_device

BLOCK = 2**18
"""Elements whose squares are added up at a time on a CPU: 2 MiB in float64."""
ROW = 4096
"""Elements of float32 whose squares a CPU adds up in float32."""


def _counts(segment: Segment, flat: FlatParameters, ctx: ParallelContext) -> bool:
    """Whether this rank is the one, of those that own these elements, that counts them."""
    return flat.replicas.rank == 0 and segment.parameter.spec.owned(ctx)


def _squares(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares, good to 1e-6 whatever their size, of pieces of the tensors [n]: (float64 [pieces], which tensor each is of, on
    the CPU: int64 [pieces]).

    On a GPU each number is widened as it is read. torch on a CPU makes a float64 copy of what it takes such a norm of, which lasts ten
    times as long as the sum: there rows of float32 are summed in float32, and in float64 the rest, in blocks.
    """
    numbers: list[int] = []
    row_numbers: list[int] = []
    pieces: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for number, x in enumerate(tensors):
        whole = len(x) // ROW * ROW if x.dtype == torch.float32 and x.device.type == "cpu" else 0
        if whole:
            rows.append(x[:whole].view(-1, ROW))
            row_numbers += [number] * (whole // ROW)
        rest = [x] if x.is_cuda else x[whole:].split(BLOCK)
        numbers += [number] * len(rest)
        pieces += rest
    norms = [torch.stack(torch._foreach_norm(pieces, 2, torch.float64)), *([_row_norms(rows)] if rows else [])]
    return torch.cat(norms).square(), torch.tensor(numbers + row_numbers)


def _row_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [rows, ROW] each -> norms of all rows, float64; of rows with squares that are no float32, from float64."""
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in tensors]).double()
    narrow = (norms > 1e-15) & (norms < 1e18)
    if not narrow.all():
        counts = [len(rows) for rows in tensors]
        for rows, mine, of in zip(tensors, norms.split(counts), narrow.split(counts), strict=True):
            if not of.all():
                wide = ~of & rows.any(1)  # zeros, as an embedding has many of, are no small numbers
                mine[wide] = torch.linalg.vector_norm(rows[wide], dim=1, dtype=torch.float64)
    return norms


def local_squared_norm(flat: FlatParameters, ctx: ParallelContext) -> torch.Tensor:
    """This rank's share of the squared gradient norm: float64 scalar, to be summed over the world.

    A rank looks at the gradients that it owns. Of ranks that own the same elements (replicas of a shard, copies over tp) the
    first one counts them; padding is zero. The others multiply by zero, which leaves NaN for a copy that is not finite: no rank
    may update what another one skips.
    """
    segments = list(flat.segments())
    if not segments:
        return torch.zeros((), dtype=torch.float64, device=ctx.device)
    counts = torch.tensor([float(_counts(s, flat, ctx)) for s in segments], dtype=torch.float64)
    squares, owners = _squares([s.gradient for s in segments])
    (mine,) = to_device([counts[owners]], ctx.device)
    return (squares * mine).sum()


def clip_divisor(norm: torch.Tensor, clip_grad: float) -> torch.Tensor:
    """What to divide gradients by so that their norm is at most `clip_grad` (0: never clip): at least 1; float64 scalar tensor.

    As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps curves comparable.
    """
    if clip_grad == 0:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / clip_grad).clamp_min(1.0)


PARTS: tuple[Part, ...] = get_args(Part)
"""Of a model, for reports."""


def part_norms(flat: FlatParameters, ctx: ParallelContext, loss_scale: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Part -> (norm of its gradients, norm of its weights), over the whole model (collective over the world; before the update)."""
    segments = [s for s in flat.segments() if _counts(s, flat, ctx)]
    parts = torch.tensor([PARTS.index(s.parameter.spec.part) for s in segments], dtype=torch.int64)
    both = torch.zeros(2, len(PARTS), dtype=torch.float64, device=ctx.device)
    if segments:
        for kind, tensors in enumerate(([s.gradient for s in segments], [s.weight for s in segments])):
            squares, owners = _squares(tensors)
            mine = (parts[owners] == torch.arange(len(PARTS))[:, None]).to(ctx.device)  # [parts, n]
            both[kind] = squares.where(mine, 0.0).sum(1)
    gradients, weights = all_reduce(both, ctx.world).sqrt()
    rows = to_host(torch.stack([gradients / loss_scale, weights], 1), ctx.world).tolist()
    return {part: (gradient, weight) for part, (gradient, weight) in zip(PARTS, rows, strict=True) if weight > 0}
