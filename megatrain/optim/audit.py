"""The replica audit: copies of a tensor must be the same on all ranks that hold one, to the bit.

Copies start equal and receive equal updates, so a difference is a bug or a broken device, and it grows: BLOOM's norm weights drifted
apart over its tensor-parallel ranks for weeks, unseen, because losses hardly move. Compared are, each over its own axis:

    over dp x cp, of experts over edp (`ParamSpec.average_over`)    parameters (ZeRO stages 0 to 2)
    over the replicas of a shard (the same axis at stage 0)    masters and states, and at stage 3 parameters
    over tp and ep    parameters, masters and states of what is not cut over tp, or cut into fewer slices than the axis has ranks
    over a tied axis (`ends`)    the copies of tied embeddings, with masters and states

Each rank sends one 64-bit number a tensor: the sum of its 32-bit words, each times a random number that belongs to its position.
"""

from __future__ import annotations

from collections import defaultdict
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
    copies = sorted(_copies(flat, optimizer, ctx).items(), key=lambda of: of[0].name)  # in one order on all ranks
    problems = [problem for axis, of in copies for problem in _compare(axis, of)]
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


def _copies(flat: FlatParameters, optimizer: Optimizer, ctx: ParallelContext) -> dict[Axis, list[_Copy]]:
    """The tensors, or pieces of them, that this rank has and other ranks of an axis too."""
    found: dict[Axis, list[_Copy]] = defaultdict(list)
    for local in flat.buckets:
        if local.stage < 3:
            axis = getattr(ctx, local.bucket.spec.average_over)
            found[axis] += [_Copy("parameter", p.detach(), p) for p in local.bucket.parameters]
    for index, local in enumerate(flat.trained):
        for copy in _owned(flat, optimizer, index):
            if local.stage == 3 or copy.what != "parameter":
                found[local.replicas].append(copy)
            spec = copy.parameter.spec
            others = {"tp", spec.tied, None if spec.split is None else spec.split.axis} - {None}
            for axis in (getattr(ctx, str(name)) for name in others):
                if spec.copies(axis) > 1:
                    found[axis].append(copy)
    return found


def _owned(flat: FlatParameters, optimizer: Optimizer, index: int) -> Iterator[_Copy]:
    """Parameters, masters and states of a trained bucket in what this rank updates, piece by piece."""
    local, masters = flat.trained[index], optimizer.masters[index]
    kinds = {"parameter": local.own_weights, "master": masters.masters, "low half of": masters.low, **optimizer.states[index]}
    for parameter, _, at, count in local.bucket.ranges(local.own.start, local.own.stop):
        for what, data in kinds.items():
            if data is not None:
                yield _Copy(what, data[at : at + count], parameter)


def _compare(axis: Axis, copies: list[_Copy]) -> list[str]:
    """One line for every tensor whose copies differ between ranks of the axis with the same slice; the same on all of its ranks."""
    if axis.group is None or not copies:
        return []
    mine = torch.stack([digest(copy.data) for copy in copies])
    gathered = mine.new_empty(axis.size * len(copies))
    axis.group.all_gather(gathered, mine)
    table = axis.group.to_host(gathered).view(axis.size, -1).t().tolist()
    problems = []
    for copy, digests in zip(copies, table, strict=True):
        group = copy.parameter.spec.copies(axis)
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
