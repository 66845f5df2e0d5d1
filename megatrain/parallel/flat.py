"""The flat buffers of one rank: where its weights and gradients lie, and which part of them it owns.

    whole       [ bucket 0                        | bucket 1 ... ]       weights below stage 3, gradients below stage 2
    own           [ shard ]                         [ shard ]            what this rank updates: masters and states are of this size

At stage 0 a rank owns all: there is one shard, of which every data rank is a replica. A parameter and its `main_grad` are views of a
whole bucket, and nothing where that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from megatrain.parallel.buckets import Bucket, Unit, make_buckets, usual_size
from megatrain.parallel.collectives import start_gather_into
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.transport.group import Handle


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
                start_gather_into(gathered, piece.contiguous(), self.shards).wait()
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
