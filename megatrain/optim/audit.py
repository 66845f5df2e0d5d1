"""The replica audit: what several ranks hold copies of must be the same on all of them, to the bit.

Copies start equal and receive equal updates, so a difference is a bug or a broken device, and it grows: BLOOM's norm weights drifted
apart over its tensor-parallel ranks for weeks, unseen, because losses hardly move. What is compared, each over its own axis:

    over dp x cp    parameters (ZeRO stages 0 to 2)
    over the replicas of a shard (dp x cp at stage 0)    masters and states, and at stage 3 parameters
    over tp         parameters, masters and states of what is not cut, or cut into fewer slices than there are ranks
    over a tied axis (`ends`)    the copies of tied embeddings, with masters and states

Each rank sends one 64-bit number a tensor: the sum of its 32-bit words, each times a random number that belongs to its position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatrain.optim.optimizer import Optimizer
from megatrain.parallel import rng
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Parameter
from megatrain.parallel.zero import FlatParameters
from megatrain.transport.consensus import gather_texts, lowest

_KEY = rng.key(0, "audit")
_BLOCK = 1 << 20
_SHOWN = 8


class ReplicaError(RuntimeError):
    """Copies of a tensor differ between ranks; raised on every rank of the world at once."""


class _Copy(NamedTuple):
    """Something that other ranks of an axis hold too."""

    what: str
    data: torch.Tensor
    parameter: Parameter


def audit(flat: FlatParameters, optimizer: Optimizer, ctx: ParallelContext) -> None:
    """Compare every copy with those of the other ranks (collective over the world).

    Raises ReplicaError on every rank, which names the first tensors that differ, and the ranks whose copy is not that of most.
    """
    flat.settle()
    problems = _compare(ctx.dp_cp, list(_everywhere(flat)), whole=True)
    problems += _compare(flat.replicas, list(_over_replicas(flat, optimizer)), whole=True)
    problems += _compare(ctx.tp, list(_over_tensor_ranks(flat, optimizer, ctx)))
    for name in sorted({b.spec.tied for held in flat.trained for b in held.bucket.parameters if b.spec.tied is not None}):
        tied = [copy for copy in _owned(flat, optimizer) if copy.parameter.spec.tied == name]
        problems += _compare(getattr(ctx, name), tied, whole=True)
    if lowest(bool(problems), ctx.world.group, ctx.device) is None:
        return
    texts = gather_texts("\n".join(problems[:_SHOWN]), ctx.world.group, ctx.device)
    found = list(dict.fromkeys(line for text in texts for line in text.split("\n") if line))
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise ReplicaError(
        "copies that must be equal to the bit differ between ranks:\n  "
        + "\n  ".join(found[:_SHOWN])
        + more
        + "\nGo back to a checkpoint from before (checkpoint.resume=PATH), and look for a broken device on the ranks named; "
        "`megatrain verify` tells whether it is the program."
    )


def _everywhere(flat: FlatParameters) -> Iterator[_Copy]:
    """What every rank of the data axis holds."""
    if flat.stage < 3:
        yield from (_Copy("parameter", p.detach(), p) for held in flat.held for p in held.bucket.parameters)


def _over_replicas(flat: FlatParameters, optimizer: Optimizer) -> Iterator[_Copy]:
    """What every rank that owns the same shard holds, and not every other one."""
    return (copy for copy in _owned(flat, optimizer) if flat.stage == 3 or copy.what != "parameter")


def _over_tensor_ranks(flat: FlatParameters, optimizer: Optimizer, ctx: ParallelContext) -> Iterator[_Copy]:
    """What more than one rank of tp holds."""
    return (copy for copy in _owned(flat, optimizer) if copy.parameter.spec.copies(ctx.tp.size) > 1)


def _owned(flat: FlatParameters, optimizer: Optimizer) -> Iterator[_Copy]:
    """Parameters, masters and states in what this rank updates, piece by piece."""
    for index, held in enumerate(flat.trained):
        masters = optimizer.masters[index]
        kinds = {"parameter": held.own_weights, "master": masters.masters, "low half of": masters.low}
        kinds |= {kind: pieces[index] for kind, pieces in optimizer.states.items()}
        for parameter, _, at, count in held.bucket.segments(held.own.start, held.own.stop):
            for what, data in kinds.items():
                if data is not None:
                    yield _Copy(what, data[at : at + count], parameter)


def _compare(axis: Axis, copies: list[_Copy], whole: bool = False) -> list[str]:
    """One line for every tensor whose copies differ along the axis; the same on all of its ranks.

    whole: every rank of the axis holds the same; else those whose slice is the same do.
    """
    if axis.group is None or not copies:
        return []
    mine = torch.stack([digest(copy.data) for copy in copies])
    gathered = mine.new_empty(axis.size * len(copies))
    axis.group.all_gather(gathered, mine)
    table = axis.group.to_host(gathered).view(axis.size, -1).t().tolist()
    problems = []
    for copy, digests in zip(copies, table, strict=True):
        group = axis.size if whole else copy.parameter.spec.copies(axis.size)
        for first in range(0, axis.size, group):
            places = range(first, first + group)
            problem = _odd_ones(axis, digests, places)
            if problem:
                problems.append(f"{copy.what} {copy.parameter.spec.name}, axis {axis.name}: {problem}")
    return problems


def _odd_ones(axis: Axis, digests: list[int], places: range) -> str:
    """Which ranks hold something else than most; "" where all hold the same."""
    holders: dict[int, list[int]] = {}
    for place in places:
        holders.setdefault(digests[place], []).append(axis.ranks[place])
    if len(holders) == 1:
        return ""
    most, *others = sorted(holders.values(), key=len, reverse=True)
    odd = ", ".join(f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}" for ranks in others)
    return f"{odd} drifted from rank{'s' if len(most) > 1 else ''} {', '.join(map(str, most))}"


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit number of the bits of a tensor and their places: int64 scalar on its device."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.numel() % 4:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)])
    words = raw.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _BLOCK):
        part = words[start : start + _BLOCK]
        total += (part.long() * rng.bits(_KEY, start, part.numel(), device=tensor.device).long()).sum()
    return total
