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

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from megatrain.optim.optimizer import Optimizer
from megatrain.optim.state_watch import StateWatch, kinds
from megatrain.parallel import rng
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Parameter
from megatrain.parallel.zero import FlatParameters
from megatrain.transport.consensus import gather_texts, lowest

_KEY = rng.key(0, "audit")
_BLOCK = 1 << 20
_SHOWN = 8


class Blame(NamedTuple):
    """A line of an audit: who is to blame, and for which tensors."""

    text: str
    ranks: tuple[int, ...]
    """World ranks to blame."""
    tensors: tuple[str, ...]
    """Names of tensors that are not as they must be there."""
    own: bool = True
    """Whether it is certain that these ranks are to blame."""


class AuditError(RuntimeError):
    """An audit has found a fault; the same is raised on every rank of the world at once."""

    def __init__(self, what: str, found: Sequence[Blame], advice: str) -> None:
        super().__init__(what, found, advice)
        self._what, self._found, self._advice = what, found, advice

    def __str__(self) -> str:
        shown = "".join(f"\n  {blame.text}" for blame in self._found[:_SHOWN])
        more = f"\n  and {len(self._found) - _SHOWN} more" if len(self._found) > _SHOWN else ""
        return f"{self._what}:{shown}{more}\n{self._advice}"

    @property
    def ranks(self) -> list[int]:
        """World ranks to blame: those of which it is certain, if there are any."""
        certain = [blame for blame in self._found if blame.own]
        return sorted({rank for blame in certain or self._found for rank in blame.ranks})

    @property
    def tensors(self) -> list[str]:
        """The first tensors that are not as they must be."""
        return list(dict.fromkeys(tensor for blame in self._found[:_SHOWN] for tensor in blame.tensors))


class ReplicaError(AuditError):
    """State has changed by itself, or copies of a tensor differ between ranks."""


class _Copy(NamedTuple):
    """Something that other ranks of an axis hold too."""

    what: str
    data: torch.Tensor
    parameter: Parameter


class _Difference(NamedTuple):
    """Copies of a tensor that are not the same."""

    name: str
    what: str
    most: list[int]
    """World ranks that hold what most of them hold."""
    others: list[list[int]]
    """World ranks that hold something else, those with the same together."""

    def blame(self, hosts: Sequence[str]) -> Blame:
        """The difference as a line; hosts: of each rank."""
        odd = ", ".join(map(named, self.others))
        places = ", ".join(f"rank {rank} on {hosts[rank]}" for ranks in self.others for rank in ranks[:_SHOWN])
        text = f"{self.what}: {odd} drifted from {named(self.most)} ({places})"
        return Blame(text, tuple(rank for ranks in self.others for rank in ranks), (self.name,), own=False)


def audit(
    flat: FlatParameters, optimizer: Optimizer, ctx: ParallelContext, watch: StateWatch | None = None, *, copies: bool = True
) -> None:
    """Compare every copy with those of the other ranks, and look what `watch` has seen (collective over the world).

    copies: whether to compare copies of parameters, masters and states; else only what `watch` has seen in the steps since the last time.
    Raises ReplicaError on every rank, which names the first tensors that differ, and the ranks whose copy is not that of most.
    """
    flat.settle()
    held = _copies(flat, optimizer, ctx) if copies else defaultdict(list)
    for parameter, remembered in watch.used() if watch is not None else ():
        held[getattr(ctx, parameter.spec.average_over)].append(_Copy("in some step, parameter", remembered, parameter))
    in_order = sorted(held.items(), key=lambda of: of[0].name)  # in one order on all ranks
    differences = [difference for axis, of in in_order for difference in _compare(axis, of)]
    changed = watch.changed() if watch is not None else []
    if lowest(bool(differences or changed), ctx.world.group, ctx.device) is None:
        return
    host = socket.gethostname()
    hosts = gather_texts(host, ctx.world.group, ctx.device)
    rank = ctx.world.rank
    blames = [
        Blame(f"{what} {name} changed by itself on rank {rank} ({host}) before the update of step {step}", (rank,), (name,))
        for what, name, step in changed
    ]
    blames += [difference.blame(hosts) for difference in differences]
    raise ReplicaError(
        "state of the run is not what it must be to the bit",
        sorted(gather_blames(blames[:_SHOWN], ctx), key=lambda blame: not blame.own),
        "Go back to a checkpoint from before (checkpoint.resume=PATH), and look for a broken device on the ranks named; "
        "`megatrain verify` tells whether it is the program.",
    )


def gather_blames(blames: Sequence[Blame], ctx: ParallelContext) -> list[Blame]:
    """The lines of all ranks, on every rank, each only once (collective over the world)."""
    texts = gather_texts(json.dumps(blames), ctx.world.group, ctx.device)
    rows = (row for text in texts for row in json.loads(text))
    return list(dict.fromkeys(Blame(text, tuple(ranks), tuple(tensors), own) for text, ranks, tensors, own in rows))


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
    local = flat.trained[index]
    held = {"parameter": local.own_weights, **kinds(optimizer, index)}
    for parameter, _, at, count in local.bucket.ranges(local.own.start, local.own.stop):
        for what, data in held.items():
            yield _Copy(what, data[at : at + count], parameter)


def _compare(axis: Axis, copies: list[_Copy]) -> list[_Difference]:
    """The tensors whose copies differ between ranks of the axis with the same slice; the same on all of its ranks."""
    if axis.group is None or not copies:
        return []
    mine = torch.stack([digest(copy.data) for copy in copies])
    gathered = mine.new_empty(axis.size * len(copies))
    axis.group.all_gather(gathered, mine)
    table = axis.group.to_host(gathered).view(axis.size, -1).t().tolist()
    differences = []
    for copy, digests in zip(copies, table, strict=True):
        group = copy.parameter.spec.copies(axis)
        for first in range(0, axis.size, group):
            holders = holders_of(axis, digests, range(first, first + group))
            if len(holders) > 1:
                name = copy.parameter.spec.name
                differences.append(_Difference(name, f"{copy.what} {name}, axis {axis.name}", holders[0], holders[1:]))
    return differences


def holders_of(axis: Axis, values: Sequence[object], places: Iterable[int]) -> list[list[int]]:
    """World ranks that hold the same value, together, most of them first; values: by place along the axis."""
    holders: dict[object, list[int]] = {}
    for place in places:
        holders.setdefault(values[place], []).append(axis.ranks[place])
    return sorted(holders.values(), key=len, reverse=True)


def named(ranks: Sequence[int]) -> str:
    """Ranks as text: `rank 3`, `ranks 0, 1`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


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
