"""Which parameters travel together: units of the model, and buckets of parameters cut into equal shards. Arithmetic alone.

A unit is what is used at one time (the embedding, a layer, the head); a bucket is what one collective moves. The ranks of the data
axis each own one shard of every bucket, so that a reduce-scatter or an all-gather of it has one contiguous input and output:

    backward order    | head | layer 2 | layer 1 | layer 0 | embedding | norms and biases of the chunk |
    a bucket, d = 4     [ part 0 | part 1 | part 2 | part 3 ]             a multiple of d x 64 elements, parameters lie across parts
    its shards          [ part 0 | part 1 | part 2 | part 3 ]             one for each data rank, or, where 2 ranks share them,
                        [ shard 0         | shard 1         ]             parts 0 and 1, parts 2 and 3

Every bucket is of one kind: parameters with weight decay (matrices) or without (norms, biases), trainable or frozen, of one dtype; so
an optimizer step sees one tensor a bucket. Norms and biases of a whole chunk of the model share a bucket: they are few, and under a
split backward their gradients come before those of the matrices. A parameter of two units (tied embeddings), or with a copy on
another stage, has a bucket to itself, which therefore is cut alike wherever it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from megatrain.parallel.param import Parameter

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
