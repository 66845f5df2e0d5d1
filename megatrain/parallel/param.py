"""`ParamSpec`: what one parameter is, whatever the layout. Initialisation, slicing, gradient norm, checkpoints and counts read it.

The logical model is a set of named tensors. A spec says how such a tensor is cut when an axis has `size` ranks, and therefore,
without asking any other rank, which slice lies where:

    vocab 10, tp 4, padded:   rows 0-2 | 3-5 | 6-8 | 9 (+2 rows of padding that never leave the rank)
    vocab 50257, tp 1:        rows 0-50256 (+47 of padding: 393 tiles of 128)
    2 key heads, tp 4:        head 0 | head 0 | head 1 | head 1       (each head lies on 2 ranks: replicas)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import nn

from megatrain.kernels.matmul import add_matmul, matmul
from megatrain.parallel import rng
from megatrain.parallel.mesh import Axis, ParallelContext, Rows

Part = Literal["embedding", "attention", "mlp", "norm", "head", "other"]
"""The parts of a model, as reports and optimizer rules tell them apart; biases belong to their matrices' part."""

AverageOver = Literal["dp_cp", "edp"]
"""Axes whose ranks hold replicas of a parameter: dp x cp; for an expert, which differs along ep, the other factor of dp x cp."""

TILE = 128
"""Rows of a matrix that one block of a GPU's matmul works on (NVIDIA, Matrix Multiplication Background, "tile quantization")."""
ROWS_A_PADDING = 32
"""Rows are padded to whole tiles where each row of padding has so many real ones beside it: from 4,064 rows on, always."""


@dataclass(frozen=True)
class Init:
    """How the logical tensor is filled: normal(0, std) from the counter-based generator, or a constant."""

    kind: Literal["normal", "constant"] = "normal"
    value: float = 0.02
    """Standard deviation, or the constant."""


ONES, ZEROS = Init("constant", 1.0), Init("constant", 0.0)


@dataclass(frozen=True)
class Split:
    """Dim `dim` is cut into `units` equal indivisible pieces (heads, columns, rows) that are dealt out over an axis.

    With at least as many units as ranks, each rank has units/size neighbouring ones (if `pad`, the last ranks may have fewer and
    fill up with padding, as all do to whole tiles: see `padded`); with fewer, each unit lies on size/units neighbouring ranks.
    """

    dim: int
    units: int
    axis: str = "tp"
    pad: bool = False

    def copies(self, size: int) -> int:
        """Ranks of the axis that hold the same slice."""
        return 1 if self.pad or size <= self.units else size // self.units

    def slice(self, length: int, size: int, rank: int) -> tuple[int, int]:
        """Half-open range of the dim, `length` long, that place `rank` of `size` holds. Raises ValueError if it cannot be cut."""
        if self.pad:
            local = -(-length // size)
            return min(rank * local, length), min((rank + 1) * local, length)
        parts = size // self.copies(size)
        if self.units % parts or size % parts or length % self.units:
            raise ValueError(
                f"{self.units} units of a dim of {length} cannot be dealt out over {size} ranks of axis {self.axis}"
            )
        local = length // parts
        part = rank // self.copies(size)
        return part * local, (part + 1) * local

    def local(self, length: int, size: int) -> int:
        """Length of the dim on every rank, padding included."""
        return padded(-(-length // size)) if self.pad else length * self.copies(size) // size


def padded(rows: int) -> int:
    """Rows, padding included, of a rank that has `rows` of a padded matrix: whole tiles, where that is cheap.

    What a head makes are rows of as many numbers, and of 50,257 of 2 bytes seven rows in eight begin at no multiple of 16 bytes.
    Tensor cores are fed well in multiples of 16 bytes, on an A100 of 128 (the same page); the copy engine of an H100 takes no other
    strides (cuTensorMapEncodeTiled), so that the library falls back to kernels without it; and the loss reads 2 bytes at a time. A
    last tile that is partly full costs a whole one in any case. Megatron-LM pads to 128 too (`make_vocab_size_divisible_by`), at any
    price: 261 bytes and marks would become 384 rows.
    """
    whole = -(-rows // TILE) * TILE
    return whole if (whole - rows) * ROWS_A_PADDING <= rows else rows


@dataclass(frozen=True)
class ParamSpec:
    """One logical parameter."""

    name: str
    """Logical name; never depends on fusion or layout."""
    shape: tuple[int, ...]
    """Logical (global, unpadded) shape."""
    split: Split | None = None
    """How it is cut; None: every rank of every axis holds all of it."""
    partial_over: str | None = None
    """Axis over whose ranks (of the same slice) gradients are partial sums, because each saw other tokens or heads."""
    average_over: AverageOver = "dp_cp"
    """Axis of the replicas whose gradients are summed (the loss is already divided by the global weight); edp for an expert's."""
    tied: str | None = None
    """Axis whose ranks each hold a copy because they cannot share one tensor (`ends`: first and last stage); gradients are summed."""
    trainable: bool = True
    decay: bool = True
    """Whether weight decay applies."""
    init: Init = Init()
    part: Part = field(default="other", compare=False)
    """For reports alone: no checkpoint holds it, and no comparison sees it."""

    def __post_init__(self) -> None:
        """Raise ValueError where gradients of different slices would be summed."""
        if self.average_over not in get_args(AverageOver):
            raise ValueError(f"{self.name}: average_over={self.average_over!r} is no axis of replicas; use dp_cp, or edp")
        if self.split is not None and self.split.axis == "ep" and self.average_over != "edp":
            raise ValueError(f"{self.name} is split over ep: its gradients can be summed over edp, not {self.average_over}")

    @property
    def numel(self) -> int:
        """Logical number of elements."""
        return prod(self.shape)

    def local_shape(self, axis_size: int) -> tuple[int, ...]:
        """Shape of the tensor that a rank stores, padding included."""
        if self.split is None:
            return self.shape
        dim = self.split.dim
        return (*self.shape[:dim], self.split.local(self.shape[dim], axis_size), *self.shape[dim + 1 :])

    def slices(self, axis_size: int, axis_rank: int) -> tuple[slice, ...]:
        """Which part of the logical tensor that rank holds (without padding), one slice per dim."""
        whole = [slice(0, n) for n in self.shape]
        if self.split is not None:
            dim = self.split.dim
            whole[dim] = slice(*self.split.slice(self.shape[dim], axis_size, axis_rank))
        return tuple(whole)

    def copies(self, axis: Axis) -> int:
        """How many ranks of an axis hold the same elements; all of an axis over which it is not cut."""
        return self.split.copies(axis.size) if self.split is not None and self.split.axis == axis.name else axis.size

    def owned(self, ctx: ParallelContext) -> bool:
        """Whether this rank is the first of those that hold the same elements: the one that counts them in a norm and saves them.

        Of the replicas over `average_over` each counts as one that owns them.
        """
        axes = (ctx.tp,) if self.split is None else (ctx.tp, getattr(ctx, self.split.axis))
        return all(map(self.leads, axes)) and (self.tied is None or getattr(ctx, self.tied).rank == 0)

    def leads(self, axis: Axis) -> bool:
        """Whether this place of an axis is the first that holds its elements."""
        return axis.rank % self.copies(axis) == 0


class Parameter(nn.Parameter):
    """A tensor of the model that knows its spec and where its gradient is accumulated."""

    spec: ParamSpec
    follows: bool
    """Whether it lies right behind the parameter before it, so that one matmul serves both (q|k|v, gate|up)."""
    open_gradient: Callable[[], None] | None
    """Gives it a main_grad when one is asked for and it has none."""
    unwritten: bool
    """Whether there is no gradient yet, and whatever was there before lies in main_grad. Who asks for it gets zeros; see `claim`."""
    _main_grad: torch.Tensor | None

    @property
    def main_grad(self) -> torch.Tensor | None:
        """View of the flat gradient buffer, same shape; None outside training, and for a frozen parameter."""
        buffer, first = claim(self)
        return buffer.zero_() if first and buffer is not None else buffer

    @main_grad.setter
    def main_grad(self, buffer: torch.Tensor | None) -> None:
        self._main_grad, self.unwritten = buffer, False

    @property
    def accumulated(self) -> torch.Tensor:
        """`main_grad`, where there must be one. Raises ValueError outside training."""
        if self.main_grad is None:
            raise ValueError(f"{self.spec.name} has no main_grad: it is not in the flat buffers of a run")
        return self.main_grad

    def __new__(cls, data: torch.Tensor, spec: ParamSpec, follows: bool = False) -> Parameter:
        """Wrap this rank's local tensor `data` (padding included)."""
        self = super().__new__(cls, data, requires_grad=spec.trainable)
        self.spec, self.follows, self.open_gradient, self.main_grad = spec, follows, None, None
        return self


def claim(parameter: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """(main_grad as it lies, or None where there is none; whether the caller is the first and must write all of it, not add)."""
    if not isinstance(parameter, Parameter):
        return getattr(parameter, "main_grad", None), False
    if parameter._main_grad is None and parameter.open_gradient is not None:
        parameter.open_gradient()
    first, parameter.unwritten = parameter.unwritten, False
    return parameter._main_grad, first


def initialise(parameter: Parameter, axis: Axis, seed: int) -> None:
    """Fill this rank's slice as a function of (seed, logical name, element); padding is zero. On `meta` there is nothing to fill."""
    if parameter.is_meta:
        return
    spec = parameter.spec
    slices = spec.slices(axis.size, axis.rank)
    with torch.no_grad():
        parameter.zero_()
        here = parameter[tuple(slice(0, s.stop - s.start) for s in slices)]
        if spec.init.kind == "constant":
            here.fill_(spec.init.value)
        else:
            normal = rng.normal(rng.key(seed, "init", spec.name), spec.shape, slices, device=parameter.device)
            here.copy_(normal.mul_(spec.init.value))


# Parameters that lie behind one another, so that one matmul serves several, and gradients that are added where they belong.


Postponed = list[Callable[[], None]]
"""Weight gradients of one micro-batch that wait for their turn (a split backward)."""


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenation along dim 0, for reading; a view, without copying, where the tensors lie behind one another in one storage."""
    view = _view_over(tensors)
    return torch.cat([t.detach() for t in tensors]) if view is None else view


def _view_over(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view of tensors that lie behind one another in one storage; None where they do not."""
    first = tensors[0].detach()
    end = first.storage_offset()
    for tensor in tensors:
        same_storage = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and tensor.is_contiguous() and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


@dataclass(frozen=True)
class Place:
    """Where and as what the layers of a model lie on this rank: what each of them is built with."""

    rows: Rows
    """How activations lie between linear layers."""
    dtype: torch.dtype
    """The dtype of parameters, and of activations that are multiplied with them."""
    device: torch.device

    @property
    def tp(self) -> Axis:
        """The axis over which matrices are split."""
        return self.rows.tp


def make_parameters(specs: Sequence[ParamSpec], place: Place) -> list[Parameter]:
    """This rank's zero-filled parameters of equal width, behind one another in one storage."""
    shapes = [spec.local_shape(place.tp.size) for spec in specs]
    storage = torch.zeros((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=place.dtype, device=place.device)
    parameters: list[Parameter] = []
    for spec, rows in zip(specs, storage.split([shape[0] for shape in shapes]), strict=True):
        parameters.append(Parameter(rows, spec, follows=bool(parameters)))
    return parameters


def add_weight_gradient(parameters: Sequence[nn.Parameter], dy: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Accumulate dy^T x ([tokens, out], [tokens, in]) into the parameters' joined main_grad, or return it piecewise to autograd."""
    return _accumulate(parameters, lambda out, first: add_matmul(out, dy.t(), x, first), lambda: matmul(dy.t(), x))


def add_bias_gradient(parameters: Sequence[nn.Parameter], dy: torch.Tensor) -> list[torch.Tensor | None]:
    """Accumulate the sum of dy [tokens, out] over tokens into the parameters' joined main_grad, or return it piecewise.

    Like a product, it is added up in float32 and comes in the dtype of dy: asked for another, torch on CPU copies all of dy first.
    """
    return _accumulate(parameters, lambda out, first: out.copy_(dy.sum(0)) if first else out.add_(dy.sum(0)), lambda: dy.sum(0))


def bias_proxy(biases: Sequence[nn.Parameter]) -> torch.Tensor:
    """Stands for the joined biases [out] that a matmul has added to its output already, without their values.

    Who makes the gradient of that output sums it over the tokens in the same pass, and gives the sum as this tensor's gradient, in at
    least float32; it goes where `add_bias_gradient` would have brought it.
    """
    proxy: torch.Tensor = _BiasProxy.apply(*biases)
    return proxy


class _BiasProxy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *biases: nn.Parameter) -> torch.Tensor:
        ctx.biases = biases
        wide = torch.promote_types(biases[0].dtype, torch.float32)
        return biases[0].new_empty((), dtype=wide).expand(sum(len(b) for b in biases))

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor) -> Any:
        def add(out: torch.Tensor, first: bool) -> object:
            return out.copy_(total) if first else out.add_(total)

        return tuple(_accumulate(ctx.biases, add, lambda: total.to(ctx.biases[0].dtype)))


def _accumulate(
    parameters: Sequence[nn.Parameter], add: Callable[[torch.Tensor, bool], object], compute: Callable[[], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Add a gradient to the parameters' main_grad where they have one; else return it, cut into their rows.

    `add` does so in one go, for buffers that lie behind one another, and where it is told that it is the first writes them;
    `compute` returns the gradient of all rows.
    """
    if not any(p.requires_grad for p in parameters):
        return [None] * len(parameters)
    claims = [claim(p) for p in parameters]
    present = [buffer for buffer, _ in claims if buffer is not None]
    firsts = {first for _, first in claims}
    view = _view_over(present) if len(present) == len(parameters) and len(firsts) == 1 else None
    if view is not None:
        add(view, firsts.pop())
        return [None] * len(parameters)
    left: list[torch.Tensor | None] = []
    pieces = compute().split([p.shape[0] for p in parameters])
    for parameter, (buffer, first), piece in zip(parameters, claims, pieces, strict=True):
        if buffer is not None:
            _ = buffer.copy_(piece) if first else buffer.add_(piece)
        left.append(piece if buffer is None and parameter.requires_grad else None)
    return left
