"""Portions: the elements of logical tensors that one rank holds, so that they can be saved, loaded and exported.

    logical tensor --(ParamSpec: tensor parallelism)--> a rank's slice --(Partition: flat buffers, ZeRO)--> a range of its elements

A slice is counted row by row; padding lies behind the logical elements, since only the first dim of a tensor is ever padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch

from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import ParamSpec


class Elements(Protocol):
    """Numbers behind one another that can be read and written in parts."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors that `read` returns."""

    @property
    def direct(self) -> bool:
        """Whether `read` returns views, so that there is nothing to `write`."""

    def read(self, part: slice) -> torch.Tensor:
        """Elements [n], a view of them where there is one; to be changed in place and given to `write`."""

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Store `values` [n], which `read` returned and the caller changed, as the elements."""


class TensorElements(NamedTuple):
    """The elements of a tensor [n]; `read` returns views of it."""

    tensor: torch.Tensor
    direct: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.tensor.dtype

    def read(self, part: slice) -> torch.Tensor:
        """A view [n]."""
        return self.tensor[part]

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Do nothing: `values` is a view."""


class ElementRange(NamedTuple):
    """A range of another `Elements`: its elements from index `start` on."""

    elements: Elements
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors that `read` returns."""
        return self.elements.dtype

    @property
    def direct(self) -> bool:
        """Whether `read` returns views."""
        return self.elements.direct

    def read(self, part: slice) -> torch.Tensor:
        """Elements [n]."""
        return self.elements.read(slice(self.start + part.start, self.start + part.stop))

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Store `values` [n], which `read` returned and the caller changed, as the elements."""
        self.elements.write(slice(self.start + part.start, self.start + part.stop), values)


class Partition(NamedTuple):
    """Division of a slice that several replicas hold, for writing it: its bucket has equal parts, and each replica writes one."""

    start: int
    """Index of the slice's first element in its bucket (parallel/flat.py)."""
    shard: int
    """Number of elements of a part; `ParallelContext.part` says which part a rank writes."""

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
    """The `count` elements."""
    partition: Partition
    """Which replica writes which elements of the slice to a checkpoint."""

    @classmethod
    def whole(cls, spec: ParamSpec, tensor: torch.Tensor) -> Portion:
        """All of a rank's slice, a contiguous tensor of shape `spec.local_shape(axis size)`, written by the first replica."""
        flat = tensor.detach().view(-1)
        return cls(spec, 0, flat.numel(), TensorElements(flat), Partition(0, max(1, flat.numel())))


Portions = Mapping[str, Mapping[str, Portion]]
"""Kind of numbers ("weights", "exp_avg", ...) -> logical name -> the elements that this rank holds."""


def axis_of(spec: ParamSpec, ctx: ParallelContext) -> Axis:
    """The axis that a logical tensor is split over; tp for one that is not."""
    found: Axis = ctx.tp if spec.split is None else getattr(ctx, spec.split.axis)
    return found


def logical_numel(spec: ParamSpec, axis: Axis) -> int:
    """Elements of this rank's slice without padding. Raises ValueError where padding does not lie behind them."""
    if spec.split is not None and spec.split.pad and spec.split.dim != 0:
        raise ValueError(f"{spec.name} is padded along dim {spec.split.dim}; only the first dim of a tensor can be")
    return prod(s.stop - s.start for s in spec.slices(axis.size, axis.rank))
