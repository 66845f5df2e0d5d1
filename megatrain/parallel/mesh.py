"""Ranks <-> axes: where this rank sits on the mesh, and the groups it belongs to.

The world is a box with one side per dimension of parallelism, tensor parallel fastest and pipeline slowest:

    rank = tp + tp_size * (cp + cp_size * (dp + dp_size * pp))

so the ranks of one tensor-parallel group are neighbours (one node), and pipeline stages are far apart (few bytes). Expert
parallelism divides dp x cp instead of multiplying the world: expert ranks are the fastest part of the data ranks.

Four ranks with tp=2, dp=2:                tp ->
                                      dp   0  1
                                       v   2  3      tp groups (0,1) (2,3); dp groups (0,2) (1,3)

Everything above `ParallelContext.build` is integer arithmetic, checked without processes for 16,384 ranks. A rank makes only
the groups it belongs to: axes that multiply the world (tp, cp, dp, pp), that divide it (ep, edp; shards, replicas) or that
combine others (dp_cp where gradients are summed, world), `ends` (first and last stage, where tied embeddings lie), and a link
in each direction to the stages before and behind it on the ring; those of size 1 cost nothing. Axes over the same ranks (dp and
dp_cp without context parallelism, pp and ends of two stages, tp and world of a world of tp) are one group under several names:
each rank calls them in one order, from one thread. Links are groups of their own even there, since the two ranks of one come to
it in orders that differ. Something is sent over a link as soon as it is made: NCCL connects at the first message, holds the host
until the other side comes, and a schedule has its two stages come to a link in whatever order it likes (`simulator.py`, lazy_links).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatrain.transport.group import Group, Handle, ReduceOp, World
from megatrain.transport.host import Reading


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh, seen from this rank. An axis of size 1 has no group and its collectives return their input."""

    name: str
    size: int = 1
    rank: int = 0
    """This rank's place along the axis, 0 <= rank < size."""
    ranks: tuple[int, ...] = (0,)
    """World ranks along the axis, in order of place."""
    group: Group | None = None

    def all_reduce(self, x: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        """Reduce `x` over the axis in place and return it; any shape, contiguous."""
        if self.group is not None:
            self.group.all_reduce(x, op)
        return x

    def start_all_reduce(self, x: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Begin to sum `x` over the axis in place; it may be used once the handle has been waited for."""
        return x, Done() if self.group is None else self.group.all_reduce(x, blocking=False)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """All rows of `x` [n/t, ...] -> [n, ...], without a gradient."""
        output, handle = self.start_gather(x)
        handle.wait()
        return output

    def start_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Begin to gather [n/t, ...] to [n, ...] along dim 0."""
        if self.group is None:
            return x, Done()
        x = x.contiguous()
        output = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        return output, self.group.all_gather(output, x, blocking=False)

    def start_gather_into(self, output: torch.Tensor, x: torch.Tensor) -> Handle:
        """Begin to gather [n/t, ...] into `output` [n, ...] along dim 0, of which `x` may be this rank's part."""
        return _copied(output, x) if self.group is None else self.group.all_gather(output, x, blocking=False)

    def scatter_summed(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum of `x` [n, ...] -> [n/t, ...], without a gradient."""
        output, handle = self.start_scatter_sum(x)
        handle.wait()
        return output

    def start_scatter_sum(self, x: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Begin to sum [n, ...] over the axis and keep this rank's [n/t, ...] of dim 0. Raises ValueError if t does not divide n."""
        if self.group is None:
            return x, Done()
        if x.shape[0] % self.size:
            raise ValueError(f"dim 0 of {tuple(x.shape)} cannot be split over the {self.size} ranks of axis {self.name}")
        output = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        return output, self.group.reduce_scatter(output, x.contiguous(), blocking=False)

    def start_scatter_sum_into(self, output: torch.Tensor, x: torch.Tensor) -> Handle:
        """Begin to sum [n, ...] over the axis into `output` [n/t, ...], which may be this rank's part of `x`, or wider than `x`."""
        return _copied(output, x) if self.group is None else self.group.reduce_scatter(output, x, blocking=False)

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the host's memory, once what other ranks of the axis add to it is there: on a GPU the host waits here."""
        return self.start_to_host(x).wait()

    def start_to_host(self, x: torch.Tensor) -> Reading:
        """Begin to bring `x`, to which other ranks of the axis may add, into the host's memory."""
        return Reading(x) if self.group is None else self.group.start_to_host(x)


class Done(Handle):
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """Always."""
        return True


def _copied(output: torch.Tensor, x: torch.Tensor) -> Handle:
    """Let `output` be `x`, whose memory it may be."""
    places = [(of.untyped_storage()._cdata, of.storage_offset()) for of in (output, x)]
    if places[0] != places[1]:
        output.copy_(x)
    return Done()


@dataclass(frozen=True)
class Rows:
    """How the rows (dim 0, the sequence) of activations lie on the ranks of tp between linear layers: all on each, or split.

    A column-parallel layer reads all s rows, and a row-parallel one makes partial sums of them all:

                                     enter                         leave
        all on each rank             nothing                       all-reduce
        split (sequence parallel)    all-gather [s/t] -> [s]       reduce-scatter [s] -> [s/t]

    In the backward pass a gradient leaves where the activation entered, and enters where it left.
    """

    tp: Axis
    split: bool = False

    @property
    def partial_over(self) -> str | None:
        """Axis over which gradients of whole (unsplit) parameters are partial sums, as each rank has seen its own rows alone."""
        return self.tp.name if self.split else None

    def held(self, length: int) -> tuple[range, ...]:
        """Places of this rank's rows in a sequence of `length`, in the order in which it has them."""
        if not self.split:
            return (range(length),)
        count = length // self.tp.size
        return (range(self.tp.rank * count, (self.tp.rank + 1) * count),)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of `x` [s, ...], which it has whole; a view where they are neighbours."""
        parts = [x[places.start : places.stop] for places in self.held(len(x))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows -> all [s, ...], in the order of the sequence; without a gradient."""
        return self.tp.gathered(x) if self.split else x

    def start_enter(self, x: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Begin to `enter`; the result may be used once the handle has been waited for."""
        return self.tp.start_gather(x) if self.split else (x, Done())

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """Partial sums [s, ...], which may be overwritten -> this rank's rows of the sum over tp; without a gradient."""
        return self.tp.scatter_summed(partial) if self.split else self.tp.all_reduce(partial)

    def start_leave(self, partial: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Begin to `leave`; the result may be used once the handle has been waited for."""
        return self.tp.start_scatter_sum(partial) if self.split else self.tp.start_all_reduce(partial)


@dataclass(frozen=True)
class Link:
    """One direction between two stages, with a group of its own: what is sent here is received in the same order."""

    group: Group
    other: int
    """Place of the other rank in the group."""


@dataclass(frozen=True)
class MeshShape:
    """Sides of the box. All sizes at least 1; `ep` and `zero_ranks` must each divide dp * cp."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    zero_ranks: int | None = None
    """Neighbouring data ranks, of dp x cp, that share one set of ZeRO's shards; None: all of them."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of world rank `rank` along tp, cp, dp and pp. Raises ValueError outside the world."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not in a world of {self.world} ranks (0..{self.world - 1})")
        place = {}
        for name, size in (("tp", self.tp), ("cp", self.cp), ("dp", self.dp), ("pp", self.pp)):
            rank, place[name] = divmod(rank, size)
        return place

    def rank_at(self, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """World rank at a place; the inverse of `coordinates`."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """World ranks that differ from `rank` only along `axis`, in order of place.

        Axes: tp, cp, dp, pp; dp_cp (gradients' sum); ep and edp (its two factors: experts, and copies of an expert); shards and
        replicas (two factors again: the ranks that have one copy of ZeRO's shards between them, and those that have the same shard);
        edp_shards and edp_replicas (the same two factors of edp); ends (first and last stage); world.
        """
        at = self.coordinates(rank)
        if axis in ("tp", "cp", "dp", "pp"):
            return tuple(self.rank_at(**{**at, axis: i}) for i in range(getattr(self, axis)))
        if axis == "world":
            return tuple(range(self.world))
        if axis == "ends":
            ends = {0, self.pp - 1}
            return tuple(self.rank_at(**{**at, "pp": i}) for i in sorted(ends if at["pp"] in ends else {at["pp"]}))
        replicas = [self.rank_at(at["tp"], c, d, at["pp"]) for d in range(self.dp) for c in range(self.cp)]
        mine = at["cp"] + self.cp * at["dp"]
        if axis == "dp_cp":
            return tuple(replicas)
        inner = self.ep if axis in ("ep", "edp") else self.zero_ranks or len(replicas)
        if axis in ("edp_shards", "edp_replicas"):  # of an expert's copies, those whose ranks share a set of shards
            replicas, mine = replicas[mine % self.ep :: self.ep], mine // self.ep
            inner = inner // self.ep if inner % self.ep == 0 else 1
        if axis in ("ep", "shards", "edp_shards"):
            start = mine - mine % inner
            return tuple(replicas[start : start + inner])
        if axis in ("edp", "replicas", "edp_replicas"):
            return tuple(replicas[mine % inner :: inner])
        raise ValueError(f"unknown axis {axis!r}; axes are {', '.join(AXES)}")

    def links(self, rank: int) -> list[tuple[int, int] | None]:
        """(from stage, to stage) of the links to make, in order: neighbours on the ring of stages, both directions; None: stand by.

        Every rank has as many entries, and the two ranks of a link have it at the same place: first the pairs (0, 1), (2, 3) ...,
        then (1, 2), (3, 4) ..., then what an odd ring has left, (last, 0).
        """
        if self.pp == 1:
            return []
        stage = self.coordinates(rank)["pp"]
        rounds = 1 if self.pp == 2 else 2 + self.pp % 2
        made: list[tuple[int, int] | None] = []
        for turn in range(rounds):
            mine = [s for s in (stage - 1, stage) if self._turn_of(s % self.pp) == turn]
            pairs = [(s % self.pp, (s + 1) % self.pp) for s in mine]
            made += [pairs[0], pairs[0][::-1]] if pairs else [None, None]
        return made

    def _turn_of(self, stage: int) -> int:
        """In which round the links between a stage and the next one on the ring are made."""
        return 2 if self.pp % 2 and stage == self.pp - 1 else stage % 2


AXES = ("tp", "cp", "dp", "pp", "ep", "edp", "dp_cp", "shards", "replicas", "edp_shards", "edp_replicas", "ends", "world")


@dataclass(frozen=True)
class ParallelContext:
    """Everything a layer or a loop may ask about the layout, passed in. `ParallelContext.single()` needs no process group."""

    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    ep: Axis
    edp: Axis
    dp_cp: Axis
    shards: Axis
    replicas: Axis
    edp_shards: Axis
    edp_replicas: Axis
    ends: Axis
    world: Axis
    device: torch.device
    sends: Mapping[int, Link] = field(default_factory=dict)
    """Stage of the same pipeline -> the link to it; neighbours on the ring alone."""
    receives: Mapping[int, Link] = field(default_factory=dict)
    """Stage of the same pipeline -> the link from it."""

    def factors(self, average_over: str) -> tuple[Axis, Axis]:
        """(ranks that share one set of ZeRO's shards, ranks that have the same shard) of an axis that gradients are summed over."""
        return (self.shards, self.replicas) if average_over == "dp_cp" else (self.edp_shards, self.edp_replicas)

    def part(self, average_over: str) -> int:
        """Which of the equal parts of a bucket this rank writes to a checkpoint, as many as the axis has ranks: one of its shard."""
        shards, replicas = self.factors(average_over)
        return shards.rank * replicas.size + replicas.rank

    @classmethod
    def build(cls, world: World, shape: MeshShape, device: torch.device | str = "cpu") -> ParallelContext:
        """Make this rank's axes and their groups (collective: every rank of the world calls it). Raises ValueError on a size mismatch."""
        if shape.world != world.size:
            raise ValueError(f"a mesh of {shape.world} ranks ({shape}) cannot be laid over a world of {world.size} ranks")
        if (shape.dp * shape.cp) % shape.ep:
            raise ValueError(f"expert_parallel_size={shape.ep} must divide data x context parallel size {shape.dp * shape.cp}")
        if shape.zero_ranks is not None and (shape.dp * shape.cp) % shape.zero_ranks:
            raise ValueError(f"zero_ranks={shape.zero_ranks} must divide data x context parallel size {shape.dp * shape.cp}")
        axes: dict[str, Any] = {}
        made: dict[tuple[int, ...], Group] = {}
        for name in sorted(AXES, key=lambda name: name != "world"):  # first the one that is connected already
            ranks = shape.ranks_along(name, world.rank)
            group = made[ranks].named(name) if ranks in made else None
            elsewhere = name == "ends" and shape.pp > 2  # a transport may number groups: each rank must make as many
            if group is None and (len(ranks) > 1 or elsewhere):
                group = made[ranks] = world.group(name, ranks)
            axes[name] = Axis(name, len(ranks), ranks.index(world.rank), ranks, group if len(ranks) > 1 else None)
        axes["sends"], axes["receives"] = _links(world, shape, torch.device(device))
        return cls(**axes, device=torch.device(device))

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """The context of a plain `python` run: every axis has size 1."""
        axes: dict[str, Any] = {name: Axis(name) for name in AXES}
        return cls(**axes, device=torch.device(device))


def _links(world: World, shape: MeshShape, device: torch.device) -> tuple[dict[int, Link], dict[int, Link]]:
    """This rank's links, connected: (to each neighbouring stage, from each)."""
    sends: dict[int, Link] = {}
    receives: dict[int, Link] = {}
    pipeline = shape.ranks_along("pp", world.rank)
    stage = pipeline.index(world.rank)
    for link in shape.links(world.rank):
        if link is None:
            world.group("pp, standing by", (world.rank,))
            continue
        source, to = link
        ranks = sorted((pipeline[source], pipeline[to]))
        group = world.group(f"pp {source}>{to}", ranks)
        sending = source == stage
        neighbour = to if sending else source
        place = ranks.index(pipeline[neighbour])
        (sends if sending else receives)[neighbour] = Link(group, place)
        (group.send if sending else group.recv)(torch.zeros(1, device=device), place)  # connects it
    return sends, receives
