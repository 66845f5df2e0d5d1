"""One micro-batch computed twice, and by every replica: a device that miscalculates is found, and named, before its numbers spread.

A wrong product in a forward or backward pass becomes part of the sum of all ranks' gradients, where nobody can see it. But it can be made
again: every so many steps (train.audit_compute_every) all replicas take the first micro-batch of the first of them, twice, and nothing is
reduced:

    rank 0, rank 1 (stages of replica 0)     run, run again      the same loss, activations and gradients, to the bit?
    rank 2, rank 3 (stages of replica 1)     run, run again      ... and the same as replica 0?

A rank whose results differ although it was given the same activations and gradients is to blame; the others only follow. The gradients
of the step are used up by then and weights are only read, so that the run's numbers stay the same to the bit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import xxhash

from megatrain.assembly import DTYPES
from megatrain.data.loader import batch_places
from megatrain.kernels.dispatch import require
from megatrain.models.batch import MicroBatch
from megatrain.optim.audit import AuditError, Blame, digest, gather_blames, holders_of, named
from megatrain.parallel.flat import LocalBucket
from megatrain.parallel.mesh import Axis, Done
from megatrain.parallel.pipeline_parallel import Chunk, Executed, run_schedule
from megatrain.runtime.rounding import kind_of
from megatrain.training import SMALLEST_WEIGHT, Run, global_weights, schedule_of, stage_of, to_micro_batches
from megatrain.transport.consensus import lowest
from megatrain.transport.group import Handle


class ComputeError(AuditError):
    """The same computation gave different results."""


class _Item(NamedTuple):
    """A tensor that a rank has made, or was given by another one, in the order of time."""

    what: str
    given: bool
    digest: torch.Tensor


@dataclass(frozen=True)
class _Deaf(Axis):
    """The ranks that share a bucket's shards: gradients are looked at and go nowhere, weights are gathered as ever."""

    of: Axis = field(default_factory=lambda: Axis("shards"))
    look: Callable[[torch.Tensor], None] = lambda _: None

    def start_gather_into(self, output: torch.Tensor, x: torch.Tensor) -> Handle:
        """Begin to gather weights."""
        return self.of.start_gather_into(output, x)

    def start_scatter_sum_into(self, _output: torch.Tensor, x: torch.Tensor) -> Handle:
        """Look at this rank's gradients of a whole bucket."""
        self.look(x)
        return Done()


def repeatable(run: Run) -> bool:
    """Whether the same computation gives the same bits on this device: on a GPU additions come in any order, unless that is forbidden."""
    return run.ctx.device.type == "cpu" or run.config.train.deterministic


def recompute(run: Run) -> None:
    """Compute the first micro-batch of the next step twice, and compare (collective over the world; between two steps).

    Raises ComputeError on every rank, which names the ranks to blame, their hosts, and what differs.
    """
    world = run.ctx.world
    micro_batches = _micro_batches(run)
    first, second = (_once(run, micro_batches) for _ in range(2))
    digests, again = (torch.stack([item.digest for item in of]) for of in (first, second))
    unequal = world.to_host(digests != again).tolist()
    wrong = [item for item, other in zip(first, unequal, strict=True) if other]
    blames = _found(world.rank, wrong, "gives other bits the second time")
    blames += _beside_replicas(run, first, digests)
    blames += _beside_all(run, micro_batches)
    if lowest(bool(blames), world.group, run.ctx.device) is None:
        return
    found = gather_blames(blames, run.ctx)
    raise ComputeError(
        f"the first micro-batch of step {run.step + 1}, computed again, is not the same to the bit",
        [blame for blame in found if blame.own] or found,
        "Take the device or host that is named out of the job (`megatrain doctor` tries it) and go on from the last checkpoint.",
    )


def _micro_batches(run: Run) -> list[MicroBatch]:
    """The first micro-batch of the next step on the first replica; every rank reads it."""
    loader, consumed = run.loader, run.consumed_samples
    places = batch_places(loader.batch_size(consumed), loader.micro_batch_size, 0, loader.dp_size)[:1]
    micro_batches = run.prepare(to_micro_batches(loader.compose(loader.samples, consumed, places), run))
    totals = global_weights(run, micro_batches)
    scale = run.loss_scale.scale / totals.sum().clamp_min(SMALLEST_WEIGHT)
    return [replace(m, totals=totals, scale=scale) for m in micro_batches]


def _once(run: Run, micro_batches: list[MicroBatch]) -> list[_Item]:
    """Forward and backward of the micro-batches, and of all that is made and given a digest; gradients of the run are forgotten."""
    items: list[_Item] = []
    stage = stage_of(run)
    chunks = [
        _listening(items, number, chunk, run.chunks[number].head is not None) for number, chunk in enumerate(stage.chunks)
    ]
    with _deaf(run, items):
        run.flat.zero_grad()
        schedule = schedule_of(run.config, len(micro_batches))
        executed = run_schedule(replace(stage, chunks=chunks, observe=None), schedule, micro_batches, micro_batches[0].scale)
        run.flat.reduce()
    items.append(_Item("loss and statistics", given=False, digest=digest(executed.sums)))
    return items


def _listening(items: list[_Item], number: int, chunk: Chunk, last: bool) -> Chunk:
    """A chunk of whose activations and their gradients digests are taken. last: whether the head follows it."""

    def note(what: str, given: bool, tensor: torch.Tensor) -> None:
        items.append(_Item(f"{what} of chunk {number}", given, digest(tensor)))

    def listen(x: torch.Tensor | None, of: Any, sums: Executed, postponed: Any) -> torch.Tensor:
        if x is not None:
            note("input", True, x)
            if x.requires_grad:
                x.register_hook(partial(note, "gradient of the input", False))
        made = chunk(x, of, sums, postponed)
        note("output", False, made)
        if made.requires_grad:
            made.register_hook(partial(note, "gradient of the output", not last))
        return made

    return listen


@contextmanager
def _deaf(run: Run, items: list[_Item]) -> Iterator[None]:
    """Let gradients stay where they are made, and take digests of each parameter's, while the body runs."""

    def look(local: LocalBucket, gradients: torch.Tensor) -> None:
        for parameter, gradient in local.bucket.views(gradients):
            items.append(_Item(f"gradient of {parameter.spec.name}", given=False, digest=digest(gradient)))

    kept = [(local, local.shards, local.replicas) for local in run.flat.trained]
    try:
        for local, shards, _ in kept:
            local.shards = _Deaf(shards.name, shards.size, shards.rank, shards.ranks, of=shards, look=partial(look, local))
            local.replicas = Axis("replicas")
        yield
    finally:
        for local, shards, replicas in kept:
            local.shards, local.replicas = shards, replicas


def _found(rank: int, wrong: Sequence[_Item], what: str) -> list[Blame]:
    """A line on tensors of this rank that differ, if there are any. It only follows if what it was given differs first."""
    if not wrong:
        return []
    names = list(dict.fromkeys(item.what for item in wrong))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    text = f"rank {rank} on {socket.gethostname()} {what} in {', '.join(names[:3])}{more}"
    return [Blame(text, (rank,), tuple(names[:3]), own=not wrong[0].given)]


def _beside_replicas(run: Run, items: Sequence[_Item], digests: torch.Tensor) -> list[Blame]:
    """A line on what this rank has made otherwise than most replicas of its kind with the same place in the model (collective).

    Left out where replicas need not add up in the same order: in an all-reduce over more than two GPUs, and between experts.
    """
    ctx, axis = run.ctx, run.ctx.dp
    if axis.group is None or ctx.ep.size > 1 or (ctx.device.type != "cpu" and max(ctx.tp.size, ctx.cp.size) > 2):
        return []
    mine = torch.cat([torch.tensor([_number_of(kind_here(run))], device=ctx.device), digests])
    gathered = mine.new_empty(axis.size * len(mine))
    axis.group.all_gather(gathered, mine)
    kinds, *columns = axis.group.to_host(gathered).view(axis.size, -1).t().tolist()
    alike = [place for place in range(axis.size) if kinds[place] == kinds[axis.rank]]
    wrong, most = [], []
    for item, column in zip(items, columns, strict=True):
        first, *others = holders_of(axis, column, alike)
        if any(ctx.world.rank in ranks for ranks in others):
            wrong.append(item)
            most = first
    return _found(ctx.world.rank, wrong, f"gives other bits than {named(most)}")


def _beside_all(run: Run, micro_batches: list[MicroBatch]) -> list[Blame]:
    """Whether this rank has read other tokens than most (collective over the world)."""
    world = run.ctx.world
    if world.group is None:
        return []
    mine = digest(torch.cat([m.tokens.flatten() for m in micro_batches]))[None]
    gathered = mine.new_empty(world.size)
    world.group.all_gather(gathered, mine)
    most, *others = holders_of(world, world.group.to_host(gathered).tolist(), range(world.size))
    here = f"rank {world.rank} on {socket.gethostname()} has read other tokens than {named(most)}"
    return [Blame(here, (world.rank,), ("tokens",)) for ranks in others if world.rank in ranks]


def _number_of(kind: str) -> int:
    """A number of 63 bits that stands for a kind."""
    return int(xxhash.xxh3_64_intdigest(kind.encode())) >> 1


def kind_here(run: Run) -> str:
    """The causes of how this rank rounds, as text."""
    train = run.config.train
    return kind_of(run.ctx.device, require(train.kernels, run.ctx.device, DTYPES[train.precision]))
