"""The flat buffers of one rank: where its weights and gradients lie, and which part of them it owns.

    whole       [ bucket 0                        | bucket 1 ... ]       weights below stage 3, gradients below stage 2
    own           [ shard ]                         [ shard ]            what this rank updates: masters and states are of this size

At stage 0 a rank owns all: there is one shard, of which every data rank is a replica. A parameter and its `main_grad` are views of a
whole bucket, and nothing where that is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.transport.group import Handle

# Which parameters travel together: units of the model, and buckets of parameters cut into equal shards. Arithmetic alone.
#
# A unit is what is used at one time (the embedding, a layer, the head); a bucket is what one collective moves. The ranks of the data
# axis each own one shard of every bucket, so that a reduce-scatter or an all-gather of it has one contiguous input and output:
#
#     backward order    | head | layer 2 | layer 1 | layer 0 | embedding | norms and biases of the chunk |
#     a bucket, d = 4     [ part 0 | part 1 | part 2 | part 3 ]             a multiple of d x 64 elements, parameters lie across parts
#     its shards          [ part 0 | part 1 | part 2 | part 3 ]             one for each data rank, or, where 2 ranks share them,
#                         [ shard 0         | shard 1         ]             parts 0 and 1, parts 2 and 3
#
# Every bucket is of one kind: parameters with weight decay (matrices) or without (norms, biases), trainable or frozen, of one dtype; so
# an optimizer step sees one tensor a bucket. Norms and biases of a whole chunk of the model share a bucket: they are few, and under a
# split backward their gradients come before those of the matrices. A parameter of two units (tied embeddings), or with a copy on
# another stage, has a bucket to itself, which therefore is cut alike wherever it lies.


ALIGNMENT = 64
"""Elements between the starts of separate matrices and of shards: a cache line, and a 128-byte GPU segment even in BF16."""


SMALLEST = 8_000_000
FOR_EACH_RANK = 1_000_000


@dataclass(frozen=True)
class Unit:
    """Parameters that are used at one time, in the order of the forward pass; shared ones are in several units."""

    parameters: tuple[Parameter, ...]
    chunk: int = 0
    """Virtual stage on this rank."""
    module: nn.Module | None = None
    """What uses them: its first argument and its first result are the hidden states."""
    source: bool = False
    """It makes hidden states from tokens: there is no gradient of an input, and no weight is read for one."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters that are reduced, updated and gathered together."""

    parameters: tuple[Parameter, ...]
    starts: tuple[int, ...]
    """Of each parameter, in elements."""
    size: int
    """Elements, with alignment: a multiple of the number of parts."""
    parts: int
    """As many as there are data ranks."""
    chunk: int
    unit: int | None
    """Index of the unit whose backward completes its gradients; None: those of the whole chunk do."""

    @property
    def trainable(self) -> bool:
        """Whether it has gradients and optimizer states."""
        return self.parameters[0].spec.trainable

    @property
    def decay(self) -> bool:
        """Whether weight decay applies."""
        return self.parameters[0].spec.decay

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

    def segments(self, start: int, stop: int) -> Iterator[tuple[Parameter, int, int, int]]:
        """What lies in elements start .. stop: (parameter, first of its own elements, place in the range, how many)."""
        for parameter, begin in zip(self.parameters, self.starts, strict=True):
            first, last = max(begin, start), min(begin + parameter.numel(), stop)
            if first < last:
                yield parameter, first - begin, first - start, last - first


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step."""

    shards: int
    """To the ranks that share the shards with it: neighbours."""
    replicas: int
    """To those that have the same shard."""

    @property
    def total(self) -> int:
        """Over the whole data axis."""
        return self.shards + self.replicas


def traffic(
    elements: int, shards: int, replicas: int, stage: int, micro_batches: int, weight_bytes: int, gradient_bytes: int
) -> Traffic:
    """What a rank sends over the data axis in a step, for so many parameters of its own (zero.py has the table).

    shards x replicas: data ranks; at stage 0 one shard, and all of them replicas. Stage 3 counts two gathers a micro-batch;
    recomputation adds none, since it lies within a layer's backward.
    """
    reduce, gather = elements * gradient_bytes, elements * weight_bytes
    within = {
        0: 0,
        1: reduce + gather,
        2: micro_batches * reduce + gather,
        3: micro_batches * (reduce + 2 * gather),
    }
    return Traffic(within[stage] * (shards - 1) // shards, 2 * reduce // shards * (replicas - 1) // replicas)


def usual_size(elements: int, ranks: int, stage: int) -> int:
    """Elements of a bucket where parallel.bucket_size is null: 8M, and with more than 8 data ranks 1M for each of them.

    elements: trainable ones of this rank. A ring of d ranks passes a bucket of n float32 gradients on in d - 1 steps of 4 n/d bytes
    each, which take alpha + 4 n/(d B): between nodes alpha is 14 us (NCCL's own figure) and B 50 GB/s. 8M elements on 1,024 ranks are
    messages of 31 KB, 0.6 us beside 14 us of latency; 1M elements a rank are 4 MB, 80 us beside 14. (Megatron-Core: 40M, and 1M a rank.)

    But a bucket is no more than an eighth of the elements, since nothing runs beside the reduction of the last one; and from stage 2
    on, where the gradients of up to three buckets are open at a time, a thirty-second (at stage 3 a bucket ends with its unit anyway).
    """
    return max(SMALLEST, min(FOR_EACH_RANK * ranks, elements // (8 if stage < 2 else 32)))


def make_buckets(units: Sequence[Unit], parts: int, largest: int, by_unit: bool) -> list[Bucket]:
    """Every parameter of the units in one bucket, in backward order, the frozen ones last.

    parts: of every bucket, one for each data rank. largest: elements after which a bucket takes no more parameters. by_unit: no bucket
    holds matrices of two units (stage 3).
    Raises ValueError where the parameters differ in dtype.
    """
    home = _homes(units)
    dtypes = {p.dtype for p in home}
    if len(dtypes) > 1:
        raise ValueError(f"parameters must share one dtype to lie in one buffer: found {sorted(map(str, dtypes))}")
    users = Counter(p for unit in units for p in unit.parameters)
    shared = {p for p in home if p.spec.tied is not None or users[p] > 1}
    return [b for trainable in (True, False) for b in _of_kind(units, home, shared, parts, largest, by_unit, trainable)]


def _homes(units: Sequence[Unit]) -> dict[Parameter, int]:
    """Parameter -> index of the first unit that uses it: the last one whose backward adds to its gradient."""
    home: dict[Parameter, int] = {}
    for index, unit in enumerate(units):
        for parameter in unit.parameters:
            home.setdefault(parameter, index)
    return home


def _of_kind(
    units: Sequence[Unit],
    home: dict[Parameter, int],
    shared: set[Parameter],
    parts: int,
    largest: int,
    by_unit: bool,
    trainable: bool,
) -> Iterator[Bucket]:
    for chunk in sorted({unit.chunk for unit in units}, reverse=True):
        open_: list[list[Parameter]] = []
        last = 0
        small: list[list[Parameter]] = []
        for index in reversed([i for i, unit in enumerate(units) if unit.chunk == chunk]):
            mine = [p for p in units[index].parameters if home[p] == index and p.spec.trainable == trainable]
            if open_ and by_unit:
                yield _bucket(open_, parts, chunk, last)
                open_ = []
            for group in reversed(list(_adjacent(mine))):
                if group[0] in shared:
                    yield _bucket([group], parts, chunk, None)
                elif not group[0].spec.decay:
                    small.append(group)
                else:
                    if open_ and _elements([*open_, group]) > largest:
                        yield _bucket(open_, parts, chunk, last)
                        open_ = []
                    open_.append(group)
                    last = index
        if open_:
            yield _bucket(open_, parts, chunk, last)
        if small:
            yield _bucket(small, parts, chunk, None)


def _adjacent(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Runs of parameters that lie behind one another so that one matmul serves them."""
    run: list[Parameter] = []
    for parameter in parameters:
        if run and not (parameter.follows and parameter.spec.decay == run[0].spec.decay):
            yield run
            run = []
        run.append(parameter)
    if run:
        yield run


def _elements(groups: Iterable[Sequence[Parameter]]) -> int:
    return sum(p.numel() for group in groups for p in group)


def _bucket(groups: Sequence[Sequence[Parameter]], parts: int, chunk: int, unit: int | None) -> Bucket:
    """Lay the groups out behind one another."""
    starts: list[int] = []
    end = 0
    for group in groups:
        end = _up(end, ALIGNMENT)
        for parameter in group:
            starts.append(end)
            end += parameter.numel()
    parameters = tuple(p for group in groups for p in group)
    return Bucket(parameters, tuple(starts), _up(end, parts * ALIGNMENT), parts, chunk, unit)


def _up(number: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-number // unit) * unit


# What one rank holds of a logical tensor: a run of elements of its slice, wherever these lie in memory.
#
#     logical tensor --(ParamSpec: tensor parallelism)--> a rank's slice --(Cut: flat buffers, ZeRO)--> a run of its elements
#
# A slice is counted row by row; padding lies behind the logical elements, since only the first dim of a tensor is ever padded.


class Elements(Protocol):
    """Numbers behind one another that can be read and written in parts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""

    @property
    def direct(self) -> bool:
        """Whether `read` gives views, so that there is nothing to `write`."""

    def read(self, part: slice) -> torch.Tensor:
        """Elements [n], a view of them where there is one; to be changed in place and given to `write`."""

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Let what `read` gave, changed, be the elements."""


class Plain(NamedTuple):
    """The elements of a tensor [n]."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype

    @property
    def direct(self) -> bool:
        """Yes."""
        return True

    def read(self, part: slice) -> torch.Tensor:
        """A view."""
        return self.tensor[part]

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Nothing to do: `values` is a view."""


class Window(NamedTuple):
    """Elements from place `start` of others on."""

    elements: Elements
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the others."""
        return self.elements.dtype

    @property
    def direct(self) -> bool:
        """As the others."""
        return self.elements.direct

    def read(self, part: slice) -> torch.Tensor:
        """Elements [n]."""
        return self.elements.read(self._there(part))

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Let what `read` gave, changed, be the elements."""
        self.elements.write(self._there(part), values)

    def _there(self, part: slice) -> slice:
        return slice(self.start + part.start, self.start + part.stop)


class Cut(NamedTuple):
    """Which ranks of the data axis write the elements of one slice: those that lie in a row of equal parts from `start` on."""

    start: int
    """Place of the slice's first element in the row of parts (in its bucket, parallel/flat.py)."""
    shard: int
    """Elements of a part; `ParallelContext.part` says which one a rank writes, of those that it holds."""

    def run(self, numel: int, place: int) -> tuple[int, int]:
        """Half-open range of a slice's `numel` elements that lies in part `place`; empty where stop <= start."""
        first = max(place * self.shard - self.start, 0)
        return first, max(first, min((place + 1) * self.shard - self.start, numel))

    def places(self, first: int, stop: int) -> range:
        """Parts that the elements first .. stop - 1 lie in."""
        return (
            range((self.start + first) // self.shard, (self.start + stop - 1) // self.shard + 1) if stop > first else range(0)
        )


@dataclass(frozen=True)
class Portion:
    """Elements first .. first + count - 1 of this rank's slice of a logical tensor, padding included."""

    spec: ParamSpec
    first: int
    count: int
    elements: Elements
    """`count` of them."""
    cut: Cut
    """Who of the data ranks writes which of them to a checkpoint."""

    @classmethod
    def whole(cls, spec: ParamSpec, tensor: torch.Tensor) -> Portion:
        """All of a rank's slice, a contiguous tensor of shape `spec.local_shape(axis size)`, written by the first data rank."""
        flat = tensor.detach().view(-1)
        return cls(spec, 0, flat.numel(), Plain(flat), Cut(0, max(1, flat.numel())))


Portions = Mapping[str, Mapping[str, Portion]]
"""Kind of numbers ("weights", "exp_avg", ...) -> logical name -> what this rank holds."""


def axis_of(spec: ParamSpec, ctx: ParallelContext) -> Axis:
    """The axis that a logical tensor is split over; tp for one that is not."""
    found: Axis = ctx.tp if spec.split is None else getattr(ctx, spec.split.axis)
    return found


def logical_numel(spec: ParamSpec, axis: Axis) -> int:
    """Elements of this rank's slice without padding. Raises ValueError where padding does not lie behind them."""
    if spec.split is not None and spec.split.pad and spec.split.dim != 0:
        raise ValueError(f"{spec.name} is padded along dim {spec.split.dim}; only the first dim of a tensor can be")
    return prod(s.stop - s.start for s in spec.slices(axis.size, axis.rank))


class Segment(NamedTuple):
    """A run of one parameter's elements in what this rank owns."""

    parameter: Parameter
    gradient: torch.Tensor
    """[n] of them."""
    weight: torch.Tensor
    """[n], the elements themselves."""


@dataclass(eq=False)
class Held:
    """A bucket on this rank: where its elements lie."""

    bucket: Bucket
    own: slice
    """Elements of the bucket that this rank updates: its shard, or at stage 0 all."""
    own_weights: torch.Tensor
    weights: torch.Tensor | None
    """All of them; at stage 3 only while they are in use."""
    own_grads: torch.Tensor | None
    """None for a frozen bucket."""
    grads: torch.Tensor | None
    """All of them; at stages 2 and 3 only between the first gradient and the reduction."""
    arriving: Handle | None = None
    """All-gather of the weights under way."""
    reducing: Handle | None = None
    """Sum of this rank's own gradients over the replicas under way."""
    reduced: bool = field(default=False)
    """Whether the last reduction of this step has begun."""


class FlatBuffers:
    """The parameters of this rank's part of the model in buffers, and their gradients."""

    def __init__(
        self, units: Sequence[Unit], ctx: ParallelContext, stage: int, bucket_size: int | None, reduce_dtype: torch.dtype | None
    ) -> None:
        """units: in the order of the forward pass. Raises ValueError when nothing is trainable, or dtypes differ."""
        self.ctx, self.units = ctx, units
        self.stage = stage if ctx.shards.size > 1 else 0  # the one shard is the whole
        self.shards = ctx.shards if self.stage else Axis("shards")
        self.replicas = ctx.replicas if self.stage else ctx.dp_cp
        self.parameters = list(dict.fromkeys(p for unit in units for p in unit.parameters if p.spec.trainable))
        largest = bucket_size or usual_size(sum(p.numel() for p in self.parameters), ctx.dp_cp.size, self.stage)
        buckets = make_buckets(units, ctx.dp_cp.size, largest, by_unit=self.stage == 3)
        if not any(bucket.trainable for bucket in buckets):
            raise ValueError("there is no trainable parameter")
        self.dtype = buckets[0].parameters[0].dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.sent = reduce_dtype or self.wide
        whole = sum(b.size for b in buckets)
        trained = sum(b.size for b in buckets if b.trainable)
        self.weights = self._zeros(whole // self.shards.size if self.stage == 3 else whole, self.dtype)
        self.grads = self._zeros(trained // self.shards.size if self.stage >= 2 else trained, self.wide)
        self.held = self._lay_out(buckets)
        self.trained = [held for held in self.held if held.bucket.trainable]
        for held in self.held:
            self._adopt(held)

    def _zeros(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(elements, dtype=dtype, device=self.ctx.device)

    def _lay_out(self, buckets: Sequence[Bucket]) -> list[Held]:
        held: list[Held] = []
        weights = grads = 0
        for bucket in buckets:
            shard = bucket.size // self.shards.size
            own = slice(self.shards.rank * shard, (self.shards.rank + 1) * shard)

            def part(
                buffer: torch.Tensor, start: int, sharded: bool, whole: int = bucket.size, shard: int = shard
            ) -> torch.Tensor:
                return buffer[start : start + (shard if sharded else whole)]

            w = part(self.weights, weights, self.stage == 3)
            g = part(self.grads, grads, self.stage >= 2) if bucket.trainable else None
            weights, grads = weights + w.numel(), grads + (0 if g is None else g.numel())
            whole_grads = g if self.stage < 2 else None
            own_grads = g[own] if g is not None and self.stage < 2 else g
            if self.stage == 3:
                held.append(Held(bucket, own, w, None, own_grads, None))
            else:
                held.append(Held(bucket, own, w[own], w, own_grads, whole_grads))
        return held

    def _adopt(self, held: Held) -> None:
        """Move the parameters of a bucket into its buffers."""
        whole = self._zeros(held.bucket.size, self.dtype) if held.weights is None else held.weights
        for parameter, view in self._views(held, whole):
            view.copy_(parameter.detach())
        if held.weights is None:
            held.own_weights.copy_(whole[held.own])
        self._place_weights(held)

    def _views(self, held: Held, whole: torch.Tensor) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """The parameters of a bucket, each with its part of a buffer of the whole bucket, in its shape."""
        for parameter, start in zip(held.bucket.parameters, held.bucket.starts, strict=True):
            yield parameter, whole[start : start + parameter.numel()].view(parameter.shape)

    def _place_weights(self, held: Held) -> None:
        """Let the parameters be views of the weights; without them NaN, so that no one reads what is not there unnoticed."""
        if held.weights is None:
            for parameter in held.bucket.parameters:
                parameter.data = torch.full((), torch.nan, dtype=self.dtype, device=self.ctx.device).expand(parameter.shape)
        else:
            for parameter, view in self._views(held, held.weights):
                parameter.data = view

    def _place_grads(self, held: Held) -> None:
        """Let each main_grad be a view of the gradients, or nothing."""
        if held.grads is None:
            for parameter in held.bucket.parameters:
                parameter.main_grad = None
        else:
            for parameter, view in self._views(held, held.grads):
                parameter.main_grad = view

    def nbytes(self) -> dict[str, int]:
        """Bytes that stay between steps: parameters and gradients, alignment included."""
        return {"parameters": self.weights.nbytes, "gradients": self.grads.nbytes}

    def segments(self) -> Iterator[Segment]:
        """The gradients that this rank owns, parameter by parameter."""
        for held in self.trained:
            gradient = there(held.own_grads)
            for parameter, _, at, count in held.bucket.segments(held.own.start, held.own.stop):
                yield Segment(parameter, gradient[at : at + count], held.own_weights[at : at + count])

    def whole(self, pieces: Sequence[torch.Tensor], frozen: bool = False) -> dict[str, tuple[ParamSpec, torch.Tensor]]:
        """Logical name -> (spec, this tensor-parallel rank's tensor), from what each rank owns of every bucket (collective).

        pieces: one for each trainable bucket, with `frozen` for all. At stage 0 the tensors are views, else copies on the CPU.
        """
        found: dict[str, tuple[ParamSpec, torch.Tensor]] = {}
        for held, piece in zip(self.held if frozen else self.trained, pieces, strict=True):
            everything = piece
            if self.stage:
                gathered = piece.new_empty(held.bucket.size)
                self.shards.start_gather_into(gathered, piece.contiguous()).wait()
                everything = gathered.cpu()
            found |= {p.spec.name: (p.spec, view) for p, view in self._views(held, everything)}
        return {p.spec.name: found[p.spec.name] for unit in self.units for p in unit.parameters if p.spec.name in found}


def there(value: Any) -> Any:
    """A value that must not be None. Raises ValueError."""
    if value is None:
        raise ValueError("a bucket's buffer is used at a stage, or at a moment, at which it has none")
    return value


class Pool:
    """Buffers that are used again: fresh memory is slow on a CPU."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def take(self, like: torch.Tensor, elements: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A buffer of so many elements, of the device and, unless one is given, the dtype of `like`, not cleared."""
        dtype = dtype or like.dtype
        free = self._free.get((elements, dtype))
        return free.pop() if free else like.new_empty(elements, dtype=dtype)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)
