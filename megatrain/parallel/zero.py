"""Replicas of the model over the data axis, and what of them is sharded: ZeRO stages 0 to 3 (Rajbhandari et al., arXiv:1910.02054).

Problem: d ranks hold the same weights and each sees its own samples. Gradients must be summed; and to hold d copies of gradients,
of optimizer states and of weights is waste. Four ranks, a bucket of parameters (`buckets.py`) and its four shards, at each stage:

    stage     weights           gradients, float32             optimizer states     bytes moved per rank and step
    0         0 1 2 3           0 1 2 3  all-reduced           0 1 2 3              all-reduce 4 Psi, x2
    1         0 1 2 3           0 1 2 3  reduce-scattered      own shard alone      reduce-scatter 4 Psi, all-gather 2 Psi
    2         0 1 2 3           own, summed a micro-batch      own                  m reduce-scatters of 4 Psi, all-gather 2 Psi
    3         own               own                            own                  m reduce-scatters of 4 Psi, 2 m all-gathers of 2 Psi
              (each times (d-1)/d; weights in BF16, 2 bytes; m micro-batches)

Links between nodes are slow. So z neighbouring ranks (a node) may share one set of shards, of which there are r = d/z replicas (MiCS,
Zhang et al., arXiv:2205.00119; FSDP's hybrid sharding). The data axis is then `shards` x `replicas`:

    data rank           0 1 2 3         what is above goes over `shards`, times (z-1)/z; and once a step the own gradients
    its shard, z = 2    0 1 0 1         are all-reduced over `replicas`: 4 Psi/z, x2, times (r-1)/r

Stage 0 is z = 1: one shard, which all ranks own.

Weights lie in one contiguous buffer, gradients in another (float32, float64 in float64 runs), in the order of the backward. A
parameter's `main_grad` is a view. What comes first writes a matrix's gradient, and what follows adds to it (`param.claim`). When the
backward of a unit (a layer) is over, its bucket is reduced while the next one is at work; after the update, buckets are gathered while
the next forward begins. Stage 2 opens a bucket's gradients when the backward comes to it and closes them when they are reduced; stage 3
does the same with weights, and fetches the next unit's ahead of time.

Who says when: hooks on the units (`enter` and `leave` around a forward; in the backward they are met in reverse), and the
executor, which says what instruction runs (`during`). Under a split backward a unit is complete when its weight gradients are.

With `parallel.reduce_dtype: bf16` gradients are rounded on their way: a bucket (what a rank owns of it, over the replicas) is copied
to bfloat16, half the bytes are moved, and the sum joins the float32 buffer. Micro-batches are summed in float32 as ever. Nothing is
scaled for it: the loss has been divided by the weight of the whole batch, so that ranks add up, and bfloat16 has the range of float32.
One rounding is 2^-8 of a rank's gradient at most. Stages 1 to 3 add in float32 what comes from the ranks, in rank order; NCCL rounds
each of its d - 1 additions, as do sums over the replicas everywhere (stage 0; `zero_ranks`).

Gradients that are partial sums over the tensor-parallel ranks (norms under sequence parallelism, replicated key/value heads), or
that the ends of a pipeline share (tied embeddings), are summed at the end of the step, each rank its own shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import nn

from megatrain.parallel.flat import FlatBuffers, Held, Pool, Segment, Unit, there
from megatrain.parallel.mesh import (
    Axis,
    ParallelContext,
)
from megatrain.parallel.param import Postponed
from megatrain.parallel.schedules import Instruction
from megatrain.transport.group import Handle

# Which unit of the model is used when, read from the program of a step: so that ZeRO fetches weights ahead of time.
#
# 1F1B on one stage, units 0 (embedding), 1, 2:   forward 0 1 2 | backward 2 1 | forward 0 1 2 | backward 2 1


class Uses:
    """Which unit is used when, as far ahead as the program says."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self._order: list[int] = []
        self._chunks: list[int] = []
        self._at = 0

    def plan(self, program: Sequence[Instruction]) -> None:
        """Forwards use a chunk's units in order, backwards in reverse; split-off weight gradients read no matrix."""
        self._order, self._at = [], 0
        self._chunks = [instruction.chunk for instruction in program][::-1]
        for instruction in program:
            mine = [i for i, unit in enumerate(self.units) if unit.chunk == instruction.chunk]
            if instruction.kind == "forward":
                self._order += mine
            elif instruction.kind != "backward_weight":
                self._order += [i for i in reversed(mine) if not self.units[i].source]

    @property
    def next(self) -> int | None:
        """The unit after the one at work; None where nothing is planned."""
        return self._order[self._at] if self._at < len(self._order) else None

    def come_to(self, index: int) -> None:
        """A unit is used now."""
        if self.next == index:
            self._at += 1

    def next_instruction(self, chunk: int) -> bool:
        """An instruction is over: whether the next one is on the same chunk."""
        if self._chunks:
            self._chunks.pop()
        return bool(self._chunks) and self._chunks[-1] == chunk


IN_FLIGHT = 2
"""Reductions under way at a time where each holds a bucket's buffer, or has another one behind it."""


class FlatParameters(FlatBuffers):
    """The parameters of this rank's part of the model, their gradients, and their way over the data axis."""

    def __init__(
        self,
        units: Sequence[Unit],
        ctx: ParallelContext,
        *,
        stage: int = 0,
        bucket_size: int | None = None,
        overlap: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """units: in the order of the forward pass. bucket_size: None for `usual_size`. overlap: reduce and gather beside the computation.
        reduce_dtype: what gradients are rounded to on their way over the data axis; None: they keep theirs.

        Raises ValueError when nothing is trainable, or when the parameters differ in dtype.
        """
        super().__init__(units, ctx, stage, bucket_size, reduce_dtype)
        self.overlap = overlap
        self._pool = Pool()
        self._flying: list[_Flight] = []
        self._summing: list[tuple[Held, torch.Tensor | None]] = []
        self._now: Instruction | None = None
        self._postponed: Postponed | None = None
        self._uses = Uses(units)
        # Landing lets the next sum begin, or gives a buffer back; where there is neither to gain, it is put off to the end.
        waits = self.stage >= 2 or self.replicas.group is not None or self.sent != self.wide
        self._aloft = 0 if not overlap or self.shards.group is None else IN_FLIGHT if waits else len(self.trained)
        homes = {p: held for held in self.held for p in held.bucket.parameters}
        self._of_chunk = {c: [h for h in self.held if h.bucket.chunk == c] for c in {u.chunk for u in units}}
        self._of_unit = [list(dict.fromkeys(homes[p] for p in unit.parameters)) for unit in units]
        me = proxy(self)  # what parameters and modules hold must not keep the buffers alive when the run has gone
        for number, held in enumerate(self.trained):
            for parameter in held.bucket.parameters:
                parameter.open_gradient = partial(_open, me, number)
        for held in self.trained:
            self._place_grads(held)
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(_move_gradient)
        for index, unit in enumerate(units):
            if unit.module is not None:
                _hook(unit.module, me, index)

    # --- a step, as the executor and the units tell it --------------------------------------------------------------------

    def plan(self, program: Sequence[Instruction]) -> None:
        """Told by the executor what it is going to run."""
        self._uses.plan(program)

    @contextmanager
    def during(self, instruction: Instruction, postponed: Postponed | None) -> Iterator[None]:
        """Around every instruction; `postponed` is its micro-batch's list of weight gradients that wait."""
        self._now, self._postponed = instruction, postponed
        self._fetch(self._common(instruction.chunk))
        yield
        if instruction.frees:
            self._complete(self._of_chunk[instruction.chunk])
        self._now = self._postponed = None
        if not self._uses.next_instruction(instruction.chunk):
            self._let_go(self._common(instruction.chunk))

    def enter(self, index: int, hidden: Any) -> Any:
        """The input of a unit, before its forward; its weights are there when this returns."""
        self._use(index)
        if not (torch.is_grad_enabled() and isinstance(hidden, torch.Tensor)):
            return hidden
        if not hidden.requires_grad:
            if not any(p.requires_grad for p in self.units[index].parameters):
                return hidden  # there will be no backward
            hidden = hidden.detach().requires_grad_()  # so that the end of the backward is noticed
        return _Tell.apply(hidden, lambda: self._end_backward(index))

    def leave(self, index: int, output: Any) -> Any:
        """The output of a unit, after its forward."""
        self._let_go_unit(index)
        if self.units[index].source or not (torch.is_grad_enabled() and output.requires_grad):
            return output
        return _Tell.apply(output, lambda: self._use(index))

    def _end_backward(self, index: int) -> None:
        """The gradient of a unit's input is there; so are those of its weights, unless they were postponed."""
        mine = [held for held in self._of_unit[index] if held.bucket.unit == index]
        if self._now is not None and self._now.kind == "backward_input" and self._postponed is not None:
            self._postponed.append(lambda: self._complete(mine))
        else:
            self._complete(mine)
        self._let_go_unit(index)

    # --- weights --------------------------------------------------------------------------------------------------------

    def _common(self, chunk: int) -> list[Held]:
        """Buckets that every unit of a chunk reads: norms and biases."""
        return [held for held in self._of_chunk[chunk] if not held.bucket.decay]

    def _use(self, index: int) -> None:
        """Have a unit's weights, and begin to fetch those of the next one."""
        self._uses.come_to(index)
        mine = [*self._of_unit[index], *self._common(self.units[index].chunk)]
        for held in mine:
            self._start_gather(held)
        if self.overlap and self._uses.next is not None:
            for held in self._of_unit[self._uses.next]:
                self._start_gather(held)
        self._fetch(mine)

    def _fetch(self, mine: Sequence[Held]) -> None:
        """Wait until weights are there."""
        for held in mine:
            self._start_gather(held)
            if held.arriving is not None:
                held.arriving.wait()
                held.arriving = None
                if self.stage == 3:
                    self._place_weights(held)

    def _start_gather(self, held: Held) -> None:
        """Stage 3: begin to gather weights that are not here; at the other stages they are, or `publish` has begun it."""
        if held.weights is None:
            held.weights = self._pool.take(held.own_weights, held.bucket.size)
            held.arriving = self.shards.start_gather_into(held.weights, held.own_weights)

    def _let_go_unit(self, index: int) -> None:
        kept = self._of_unit[self._uses.next] if self._uses.next is not None else []
        self._let_go([held for held in self._of_unit[index] if held not in kept and held.bucket.decay])

    def _let_go(self, mine: Sequence[Held]) -> None:
        """Stage 3: keep only the shard of weights."""
        if self.stage < 3:
            return
        for held in mine:
            if held.weights is not None:
                if held.arriving is not None:
                    held.arriving.wait()
                    held.arriving = None
                self._pool.give(held.weights)
                held.weights = None
                self._place_weights(held)

    def publish(self, held: Held) -> None:
        """What this rank owns of a bucket has been updated: let the other ranks have it, beside what comes next."""
        if self.stage in (1, 2):
            held.arriving = self.shards.start_gather_into(there(held.weights), held.own_weights)
            if not self.overlap:
                self._fetch([held])

    def settle(self) -> None:
        """Wait for all weights that are on their way, to read parameters outside of a forward pass."""
        self._fetch([held for held in self.held if held.arriving is not None])

    # --- gradients ------------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for held in self.trained:
            held.reduced = False
            self._place_grads(held)
            if held.grads is None:
                there(held.own_grads).zero_()
            else:
                self._forget(held)

    def _forget(self, held: Held) -> None:
        """Let the buffer of a bucket have no gradient yet. What comes first writes a matrix, and need neither clear nor read it.

        Norms and biases are many, small, and cleared in one go.
        """
        grads = there(held.grads)
        for gap in held.bucket.gaps() if held.bucket.decay else [slice(None)]:
            grads[gap].zero_()
        for parameter in held.bucket.parameters:
            parameter.unwritten = held.bucket.decay

    def _open(self, number: int) -> None:
        """A gradient of a trained bucket is about to be added. Raises ValueError where the bucket has been reduced already."""
        held = self.trained[number]
        if held.reduced:
            names = ", ".join(p.spec.name for p in held.bucket.parameters[:3])
            raise ValueError(
                f"a gradient for the bucket of {names} ... came after it was reduced. A parameter that several units use "
                "must be among the parameters of each of them (`Unit.parameters`)."
            )
        held.grads = self._pool.take(there(held.own_grads), held.bucket.size)
        self._place_grads(held)
        self._forget(held)

    def _complete(self, mine: Sequence[Held]) -> None:
        """Reduce buckets that will get no further gradient in this instruction; at stages 0 and 1, in this step."""
        if self._now is None:
            return
        if self.stage >= 2 or (self._now.last and self.overlap):
            for held in mine:
                if held.grads is not None and not held.reduced:
                    self._start_reduction(held, self._now.last)

    def _start_reduction(self, held: Held, last: bool) -> None:
        """Begin to sum a bucket's gradients over the ranks that share its shards. last: there will be no others in this step."""
        grads, held.reduced = there(held.grads), last
        _clear_unwritten(held)
        if self.stage >= 2:
            held.grads = None
        for parameter in held.bucket.parameters:
            parameter.main_grad = None  # a gradient that comes too late is noticed
        self._land(self._aloft - 1)
        sent, room = self._to_send(grads, self.shards)
        self._flying.append(_Flight(held, grads, self.shards.start_scatter_sum_into(grads[held.own], sent), last, room))
        if self._aloft == 0:
            self._land(0)

    def _land(self, flying: int) -> None:
        """Wait until at most so many reductions are under way, and keep what this rank owns of the others."""
        while len(self._flying) > max(flying, 0):
            held, grads, reducing, last, room = self._flying.pop(0)
            reducing.wait()
            if room is not None:
                self._pool.give(room)
            if self.stage >= 2:
                there(held.own_grads).add_(grads[held.own])
                self._pool.give(grads)
            if last:
                self._sum_replicas(held)

    def _to_send(self, grads: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients as they go over an axis: themselves, or rounded; then also the buffer that this lies in, to be given back."""
        if axis.group is None or self.sent == grads.dtype:
            return grads, None
        room = self._pool.take(grads, max(held.bucket.size for held in self.trained), self.sent)  # one that serves all of them
        return room[: grads.numel()].copy_(grads), room

    def _sum_replicas(self, held: Held) -> None:
        """Begin to sum what this rank owns of a bucket's gradients, once a step, over the ranks that own the same."""
        own = there(held.own_grads)
        if self.sent != self.wide:
            self._end_sums(IN_FLIGHT - 1)
        sent, room = self._to_send(own, self.replicas)
        held.reducing = self.replicas.start_all_reduce(sent)[1]
        self._summing.append((held, room))
        if not self.overlap:
            self._end_sums(0)

    def _end_sums(self, under_way: int) -> None:
        """Wait until at most so many sums over the replicas are under way."""
        while len(self._summing) > under_way:
            held, room = self._summing.pop(0)
            there(held.reducing).wait()
            if room is not None:
                own = there(held.own_grads)
                own.copy_(room[: own.numel()])
                self._pool.give(room)

    def reduce(self) -> None:
        """The step's gradients are all there: finish their sums over replicas, over ranks that hold the same slice, and tied ones."""
        self._let_go(self.held)
        for held in self.trained:
            if held.grads is not None and not held.reduced:
                self._start_reduction(held, last=True)
        self._land(0)
        for held in self.trained:
            if held.reducing is None:  # the last micro-batch gave it no gradient
                self._sum_replicas(held)
        self._end_sums(0)
        for held in self.trained:
            held.reducing = None
            self._place_grads(held)
        partial = [s for s in self.segments() if s.parameter.spec.partial_over is not None]
        if partial:
            _sum_partial(partial, self.ctx)
        self._sum_tied()

    def _sum_tied(self) -> None:
        for held in self.trained:
            tied = held.bucket.parameters[0].spec.tied
            if tied is not None:
                getattr(self.ctx, tied).all_reduce(there(held.own_grads))


class _Flight(NamedTuple):
    """A reduction over the ranks that share the shards, under way."""

    held: Held
    grads: torch.Tensor
    """The whole bucket; this rank's own part of it is what is being summed."""
    reducing: Handle
    last: bool
    """Whether it completes the step's gradients on these ranks."""
    room: torch.Tensor | None
    """Where the rounded copy lies that is sent; None: they are sent themselves."""


def _clear_unwritten(held: Held) -> None:
    """Let the gradients that nobody gave be zero."""
    for parameter in held.bucket.parameters:
        if parameter.unwritten:
            there(parameter.main_grad)


def _open(flat: FlatParameters, number: int) -> None:
    flat._open(number)


def _hook(module: nn.Module, flat: FlatParameters, index: int) -> None:
    """Have enter and leave called around a unit's module."""
    module.register_forward_pre_hook(lambda _, given: (flat.enter(index, given[0]), *given[1:]))
    module.register_forward_hook(lambda _, _given, made: _first(made, lambda y: flat.leave(index, y)))


def _first(made: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A module's result with its first tensor changed."""
    return (change(made[0]), *made[1:]) if isinstance(made, tuple) else change(made)


class _Tell(torch.autograd.Function):
    """The identity; calls `tell` when the backward comes to it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tell: Callable[[], None]) -> torch.Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        ctx.tell()
        return dy, None


def _move_gradient(parameter: Any) -> None:
    """Add what autograd computed (norms, a user's own layer) to the flat buffer; linear layers have added theirs already."""
    if parameter.grad is None:
        return
    parameter.accumulated.add_(parameter.grad)
    parameter.grad = None


def _sum_partial(segments: Sequence[Segment], ctx: ParallelContext) -> None:
    """Sum each gradient over the ranks that hold the same slice, all in one all-reduce over tp.

    A parameter cut into n distinct slices takes n places in the message, and each rank fills in its own: the ranks of a slice
    are summed without a group of their own.
    """
    tp = ctx.tp
    slots = [tp.size // s.parameter.spec.copies(tp.size) for s in segments]
    places = [tp.rank // s.parameter.spec.copies(tp.size) for s in segments]
    lengths = [s.gradient.numel() for s in segments]
    message = segments[0].gradient.new_zeros(sum(n * length for n, length in zip(slots, lengths, strict=True)))
    mine, start = [], 0
    for length, count, place in zip(lengths, slots, places, strict=True):
        mine.append(message[start + place * length :][:length])
        start += count * length
    for segment, part in zip(segments, mine, strict=True):
        part.copy_(segment.gradient)
    tp.all_reduce(message)
    for segment, part in zip(segments, mine, strict=True):
        segment.gradient.copy_(part)
