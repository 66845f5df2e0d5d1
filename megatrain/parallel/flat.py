"""Flat buffers: parameters lie bucket by bucket in one buffer, their gradients in another, and each rank owns a part of every bucket.

A unit is what is used at one time (the embedding, a layer, the head); a bucket is what one collective moves:

    backward order    | head | layer 2 | layer 1 | layer 0 | embedding | norms and biases of the chunk |
    a bucket, d = 4     [ part 0 | part 1 | part 2 | part 3 ]      one part a replica, a multiple of 64 elements; parameters lie across
    its shards          [ shard 0         | shard 1         ]      a part each, or, where 2 of 4 ranks share them, two neighbouring parts
    on one rank         [ whole: weights below stage 3, gradients below stage 2; own: its shard, which it updates, masters and states too ]

At stage 0 there is one shard, the bucket, which every replica owns. A parameter and its `main_grad` are views of the whole bucket; while
that is not in memory the parameter reads as NaN, and there is no `main_grad`.

All parameters of a bucket are reduced and updated alike: with weight decay (matrices) or without (norms, biases), trainable or frozen,
by one rule of the optimizer, over one axis of replicas (`ParamSpec.average_over`). So one tensor a bucket is reduced and updated. Norms
and biases of a whole chunk of the model share a bucket: they are few, and under a split backward their gradients come before those of
the matrices. A parameter of two units (tied embeddings), or with a copy on another stage, has a bucket to itself, which therefore is
laid out alike wherever it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import nn

from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import AverageOver, Parameter, ParamSpec, Part
from megatrain.transport.group import Handle

ALIGNMENT = 64
"""Elements between the starts of separate matrices and of parts: a cache line, and a 128-byte GPU segment even in BF16."""


@dataclass(frozen=True)
class Unit:
    """Parameters that are used at one time, in the order of the forward pass; shared ones are in several units."""

    parameters: tuple[Parameter, ...]
    chunk: int = 0
    """Virtual stage on this rank."""
    module: nn.Module | None = None
    """The module that uses them: its first argument and its first result are the hidden states."""
    source: bool = False
    """It makes hidden states from tokens: there is no gradient of an input, and no weight is read for one."""


class ParameterRange(NamedTuple):
    """Elements first .. first + length - 1 of a parameter; they begin at element `at` of the range of a bucket that was asked for."""

    parameter: Parameter
    first: int
    at: int
    length: int


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters that are reduced, updated and gathered together."""

    parameters: tuple[Parameter, ...]
    starts: tuple[int, ...]
    """First element of each parameter."""
    size: int
    """Elements, with alignment: a multiple of the number of parts."""
    parts: int
    """Equal parts, as many as the axis of replicas has ranks."""
    chunk: int
    unit: int | None
    """Index of the unit whose backward completes its gradients; None: those of the whole chunk do."""

    @property
    def spec(self) -> ParamSpec:
        """The first parameter's: the others are trainable, reduced, tied, decayed and updated like it."""
        return self.parameters[0].spec

    @property
    def decay(self) -> bool:
        """Whether weight decay applies."""
        return self.spec.decay

    @property
    def part(self) -> int:
        """Elements of one part."""
        return self.size // self.parts

    def gaps(self) -> Iterator[slice]:
        """The elements that are no parameter's: alignment."""
        ends = [0, *(begin + p.numel() for p, begin in zip(self.parameters, self.starts, strict=True))]
        for end, begin in zip(ends, [*self.starts, self.size], strict=True):
            if end < begin:
                yield slice(end, begin)

    def ranges(self, start: int, stop: int) -> Iterator[ParameterRange]:
        """The parameters' elements among elements start .. stop - 1 of the bucket."""
        for parameter, begin in zip(self.parameters, self.starts, strict=True):
            first, last = max(begin, start), min(begin + parameter.numel(), stop)
            if first < last:
                yield ParameterRange(parameter, first - begin, first - start, last - first)

    def views(self, buffer: torch.Tensor) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Each parameter with its part of a buffer [size], in its shape."""
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            yield parameter, buffer[start : start + parameter.numel()].view(parameter.shape)


def usual_size(elements: int, ranks: int, stage: int) -> int:
    """Elements of a bucket where parallel.bucket_size is null: 8M, and with more than 8 data ranks 1M for each of them.

    elements: trainable ones of this rank. A ring of d ranks passes a bucket of n float32 gradients on in d - 1 steps of 4 n/d bytes
    each, which take alpha + 4 n/(d B): between nodes alpha is 14 us (NCCL's own figure) and B 50 GB/s. 8M elements on 1,024 ranks are
    messages of 31 KB, 0.6 us beside 14 us of latency; 1M elements a rank are 4 MB, 80 us beside 14. (Megatron-Core: 40M, and 1M a rank.)

    But a bucket is no more than an eighth of the elements, since nothing runs beside the reduction of the last one; and from stage 2
    on, where the gradients of up to three buckets are open at a time, a thirty-second (at stage 3 a bucket ends with its unit anyway).
    """
    return max(8_000_000, min(1_000_000 * ranks, elements // (8 if stage < 2 else 32)))


Rules = Mapping[Part, str]
"""Part of a model -> name of the optimizer's rule for its parameters, where it is not that of the run."""


@dataclass(frozen=True)
class _Layout:
    """How parameters become buckets, of one chunk."""

    parts: Mapping[str, int]
    largest: int
    rules: Rules
    chunk: int

    def alike(self, spec: ParamSpec) -> tuple[object, ...]:
        """Equal for parameters that may share a bucket, among the trainable ones or the frozen ones of a chunk."""
        return spec.decay, spec.average_over, self.rules.get(spec.part)

    def groups(self, parameters: Iterable[Parameter]) -> list[list[Parameter]]:
        """Runs of parameters that lie behind one another so that one matmul serves them."""
        runs: list[list[Parameter]] = []
        for parameter in parameters:
            if runs and parameter.follows and self.alike(parameter.spec) == self.alike(runs[-1][0].spec):
                runs[-1].append(parameter)
            else:
                runs.append([parameter])
        return runs

    def bucket(self, groups: Sequence[Sequence[Parameter]], unit: int | None) -> Bucket:
        """Lay the groups out behind one another."""
        starts, end = [], 0
        for group in groups:
            end = _up(end, ALIGNMENT)
            for parameter in group:
                starts.append(end)
                end += parameter.numel()
        parameters, parts = tuple(p for group in groups for p in group), self.parts[groups[0][0].spec.average_over]
        return Bucket(parameters, tuple(starts), _up(end, parts * ALIGNMENT), parts, self.chunk, unit)

    def buckets(
        self, units: Sequence[tuple[int, Sequence[Parameter]]], shared: Collection[Parameter], by_unit: bool
    ) -> Iterator[Bucket]:
        """The buckets of (index, parameters) of the chunk's units, which are given in backward order."""
        small: dict[object, list[list[Parameter]]] = {}
        filling: dict[object, tuple[list[list[Parameter]], int]] = {}
        for index, parameters in units:
            if by_unit:
                yield from (self.bucket(*full) for full in filling.values())
                filling = {}
            for group in reversed(self.groups(parameters)):
                alike = self.alike(group[0].spec)
                if group[0] in shared:
                    yield self.bucket([group], None)
                elif not group[0].spec.decay:
                    small.setdefault(alike, []).append(group)
                else:
                    others, last = filling.pop(alike, ([], index))
                    if others and sum(p.numel() for of in (*others, group) for p in of) > self.largest:
                        yield self.bucket(others, last)
                        others = []
                    filling[alike] = [*others, group], index
        yield from (self.bucket(*full) for full in filling.values())
        yield from (self.bucket(groups, None) for groups in small.values())


def _up(number: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-number // unit) * unit


def make_buckets(
    units: Sequence[Unit], parts: Mapping[str, int], largest: int, by_unit: bool, rules: Rules | None = None
) -> list[Bucket]:
    """Every parameter of the units in one bucket, in backward order, the frozen ones last.

    parts: axis of replicas -> its ranks. largest: elements after which a bucket takes no more parameters. by_unit: no bucket holds
    matrices of two units (stage 3). Raises ValueError where the parameters differ in dtype.
    """
    # The first unit that uses a parameter is the last one whose backward adds to its gradient.
    home = {p: index for index, unit in reversed(list(enumerate(units))) for p in unit.parameters}
    dtypes = {p.dtype for p in home}
    if len(dtypes) > 1:
        raise ValueError(f"parameters must share one dtype to lie in one buffer: found {sorted(map(str, dtypes))}")
    users = Counter(p for unit in units for p in unit.parameters)
    shared = {p for p in home if p.spec.tied is not None or users[p] > 1}
    made: list[Bucket] = []
    for trainable in (True, False):
        for chunk in sorted({unit.chunk for unit in units}, reverse=True):
            backward = [
                (index, [p for p in units[index].parameters if home[p] == index and p.spec.trainable == trainable])
                for index in reversed(range(len(units)))
                if units[index].chunk == chunk
            ]
            made += _Layout(parts, largest, rules or {}, chunk).buckets(backward, shared, by_unit)
    return made


@dataclass(eq=False)
class LocalBucket:
    """A bucket on this rank: the shard that it owns, and the whole while that is in memory."""

    bucket: Bucket
    stage: int
    """ZeRO stage of this bucket: 0 where the one shard is the whole."""
    shards: Axis
    """Ranks that have one copy of the bucket's shards between them."""
    replicas: Axis
    """Ranks that have the same shard."""
    own: slice
    """Elements of the bucket that this rank updates: its shard, at stage 0 all."""
    own_weights: torch.Tensor
    own_grads: torch.Tensor
    """Empty for a frozen bucket."""
    weights: torch.Tensor | None
    """The whole bucket's; at stage 3 only while they are in use."""
    grads: torch.Tensor | None
    """The whole bucket's; at stages 2 and 3 only between the first gradient and the reduction; None for a frozen bucket."""
    arriving: Handle | None = None
    """All-gather of the weights under way."""
    reduced: bool = False
    """Whether the last reduction of this step has begun."""

    def place_weights(self) -> None:
        """Let the parameters be views of the weights; without them NaN, so that nobody reads them unnoticed."""
        if self.weights is None:
            for parameter in self.bucket.parameters:
                parameter.data = self.own_weights.new_full((), torch.nan).expand(parameter.shape)
        else:
            for parameter, view in self.bucket.views(self.weights):
                parameter.data = view

    def place_grads(self) -> None:
        """Let each main_grad be a view of the gradients; without them there is none."""
        views = {} if self.grads is None else dict(self.bucket.views(self.grads))
        for parameter in self.bucket.parameters:
            parameter.main_grad = views.get(parameter)


class ParameterShard(NamedTuple):
    """Elements of one parameter that this rank owns."""

    parameter: Parameter
    gradient: torch.Tensor
    """[n], a view."""
    weight: torch.Tensor
    """[n], a view."""
    counts: bool
    """Whether this rank is the one, of those that own these elements, that counts them in a norm."""


class FlatBuffers:
    """The parameters of this rank's part of the model in buffers, and their gradients."""

    def __init__(
        self, units: Sequence[Unit], ctx: ParallelContext, stage: int, bucket_size: int | None, rules: Rules | None = None
    ) -> None:
        """units: in the order of the forward pass. Raises ValueError when nothing is trainable, or dtypes differ."""
        self.ctx, self.units, self.rules = ctx, units, rules or {}
        self.stage = stage if ctx.shards.size > 1 else 0  # the one shard is the whole
        self.parameters = list(dict.fromkeys(p for unit in units for p in unit.parameters if p.spec.trainable))
        largest = bucket_size or usual_size(sum(p.numel() for p in self.parameters), ctx.dp_cp.size, self.stage)
        parts = {name: getattr(ctx, name).size for name in get_args(AverageOver)}
        buckets = make_buckets(units, parts, largest, self.stage == 3, self.rules)
        if not any(bucket.spec.trainable for bucket in buckets):
            raise ValueError("there is no trainable parameter")
        self.dtype = buckets[0].parameters[0].dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.buckets = self._lay_out(buckets)
        self.trained = [local for local in self.buckets if local.bucket.spec.trainable]
        self.owned = [
            ParameterShard(
                parameter,
                local.own_grads[at : at + length],
                local.own_weights[at : at + length],
                local.replicas.rank == 0 and parameter.spec.owned(ctx),
            )
            for local in self.trained
            for parameter, _, at, length in local.bucket.ranges(local.own.start, local.own.stop)
        ]
        """The gradients that this rank owns, parameter by parameter."""

    def _lay_out(self, buckets: Sequence[Bucket]) -> list[LocalBucket]:
        """Make the buffers, and move the parameters of each bucket into its part of them."""
        placed = [(bucket, *self._sharding(bucket)) for bucket in buckets]
        kept = [b.size // (shards.size if stage == 3 else 1) for b, stage, shards, _ in placed]
        summed = [b.size // (shards.size if stage >= 2 else 1) * b.spec.trainable for b, stage, shards, _ in placed]
        self.weights = torch.zeros(sum(kept), dtype=self.dtype, device=self.ctx.device)
        self.grads = torch.zeros(sum(summed), dtype=self.wide, device=self.ctx.device)
        made = []
        buffers = zip(placed, self.weights.split(kept), self.grads.split(summed), strict=True)
        for (bucket, stage, shards, replicas), weights, grads in buffers:
            shard = bucket.size // shards.size
            own = slice(shards.rank * shard, (shards.rank + 1) * shard)
            whole = weights if stage < 3 else weights.new_zeros(bucket.size)
            for parameter, view in bucket.views(whole):
                view.copy_(parameter.detach())
            own_weights = weights[own] if stage < 3 else weights.copy_(whole[own])
            own_grads, whole_grads = (grads[own], grads) if stage < 2 and bucket.spec.trainable else (grads, None)
            local = LocalBucket(
                bucket, stage, shards, replicas, own, own_weights, own_grads, weights if stage < 3 else None, whole_grads
            )
            local.place_weights()
            made.append(local)
        return made

    def _sharding(self, bucket: Bucket) -> tuple[int, Axis, Axis]:
        """(ZeRO stage, shards, replicas) of a bucket."""
        over = bucket.spec.average_over
        shards, replicas = self.ctx.factors(over)
        if self.stage and shards.size > 1:
            return self.stage, shards, replicas
        return 0, Axis("shards"), getattr(self.ctx, over)

    def nbytes(self) -> dict[str, int]:
        """Bytes that stay between steps: parameters and gradients, alignment included."""
        return {"parameters": self.weights.nbytes, "gradients": self.grads.nbytes}

    def whole(self, pieces: Iterable[tuple[LocalBucket, torch.Tensor]]) -> dict[str, tuple[ParamSpec, torch.Tensor]]:
        """Logical name -> (spec, this rank's slice), from what each rank owns of some buckets (collective over their shards).

        At stage 0 the tensors are views of the pieces, else copies on the CPU.
        """
        found: dict[str, tuple[ParamSpec, torch.Tensor]] = {}
        for local, piece in pieces:
            everything = piece
            if local.stage:
                everything = piece.new_empty(local.bucket.size)
                local.shards.start_gather_into(everything, piece.contiguous()).wait()
                everything = everything.cpu()
            found |= {p.spec.name: (p.spec, view) for p, view in local.bucket.views(everything)}
        return {p.spec.name: found[p.spec.name] for unit in self.units for p in unit.parameters if p.spec.name in found}
