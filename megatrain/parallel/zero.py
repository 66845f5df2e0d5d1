"""Replicas of the model over the data axis, and what of them is sharded: ZeRO stages 0 to 3 (Rajbhandari et al., arXiv:1910.02054).

Problem: d ranks hold the same weights and each sees its own samples. Gradients must be summed; and to hold d copies of gradients,
of optimizer states and of weights is waste. Four ranks, a bucket of parameters (`flat.py`) and its four shards, at each stage:

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

Stage 0 is z = 1: one shard, which all ranks own. All this is a bucket's own matter: a parameter that differs along `ep` (an expert)
has replicas along `edp` alone (`ParamSpec.average_over`), and its buckets go over edp and the two factors of that.

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
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import nn

from megatrain.parallel.flat import FlatBuffers, LocalBucket, ParameterShard, Rules, Unit
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.parallel.param import Postponed
from megatrain.parallel.schedules import Instruction
from megatrain.transport.group import Handle

IN_FLIGHT = 2
"""Reductions under way at a time where each holds a bucket's buffer, or has another one behind it."""


class FlatParameters(FlatBuffers):
    """The parameters of this rank's part of the model, their gradients, and their way over the replicas."""

    def __init__(
        self,
        units: Sequence[Unit],
        ctx: ParallelContext,
        *,
        stage: int = 0,
        bucket_size: int | None = None,
        overlap: bool = True,
        reduce_dtype: torch.dtype | None = None,
        rules: Rules | None = None,
    ) -> None:
        """units: in the order of the forward pass. bucket_size: None for `usual_size`. overlap: reduce and gather beside the computation.
        reduce_dtype: gradients are rounded to it on their way over the replicas; None: they keep their dtype. rules: of the optimizer,
        by part of the model, where they are not the run's.

        Raises ValueError when nothing is trainable, or when the parameters differ in dtype.
        """
        super().__init__(units, ctx, stage, bucket_size, rules)
        self.overlap, self.sent = overlap, reduce_dtype or self.wide
        self._pool = Pool()
        self._largest = max(local.bucket.size for local in self.trained)
        self._flying: list[_Flight] = []
        self._summing: list[tuple[LocalBucket, Handle, torch.Tensor | None]] = []
        self._now: Instruction | None = None
        self._postponed: Postponed | None = None
        self._uses = Uses(units)
        # Landing lets the next sum begin, or gives a buffer back; where there is neither to gain, it is put off to the end.
        waits = self.sent != self.wide or any(b.stage >= 2 or b.replicas.group is not None for b in self.trained)
        apart = overlap and any(local.shards.group is not None for local in self.trained)
        self._aloft = 0 if not apart else IN_FLIGHT if waits else len(self.trained)
        homes = {p: local for local in self.buckets for p in local.bucket.parameters}
        self._of_chunk = {c: [b for b in self.buckets if b.bucket.chunk == c] for c in {u.chunk for u in units}}
        self._common = {c: [b for b in of if not b.bucket.decay] for c, of in self._of_chunk.items()}
        """By chunk, norms and biases: every unit of it reads them."""
        self._of_unit = [list(dict.fromkeys(homes[p] for p in unit.parameters)) for unit in units]
        self._partial: dict[str, list[ParameterShard]] = {}
        for shard in self.owned:
            if shard.parameter.spec.partial_over is not None:
                self._partial.setdefault(shard.parameter.spec.partial_over, []).append(shard)
        me = proxy(self)  # the hooks of parameters and modules must not keep the buffers alive when the run has gone
        for number, local in enumerate(self.trained):
            for parameter in local.bucket.parameters:
                parameter.open_gradient = lambda number=number: me._open(number)
                parameter.register_post_accumulate_grad_hook(_move_gradient)
            local.place_grads()
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
        self._fetch(self._common[instruction.chunk])
        yield
        if instruction.frees:
            self._complete(self._of_chunk[instruction.chunk])
        self._now = self._postponed = None
        if not self._uses.next_instruction(instruction.chunk):
            self._let_go(self._common[instruction.chunk])

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
        mine = [local for local in self._of_unit[index] if local.bucket.unit == index]
        if self._now is not None and self._now.kind == "backward_input" and self._postponed is not None:
            self._postponed.append(lambda: self._complete(mine))
        else:
            self._complete(mine)
        self._let_go_unit(index)

    # --- weights --------------------------------------------------------------------------------------------------------

    def _use(self, index: int) -> None:
        """Have a unit's weights, and begin to fetch those of the next one."""
        self._uses.come_to(index)
        mine = [*self._of_unit[index], *self._common[self.units[index].chunk]]
        ahead = self._of_unit[self._uses.next] if self.overlap and self._uses.next is not None else []
        for local in (*mine, *ahead):
            self._start_gather(local)
        self._fetch(mine)

    def _fetch(self, mine: Sequence[LocalBucket]) -> None:
        """Wait until weights are there."""
        for local in mine:
            self._start_gather(local)
            if local.arriving is not None:
                local.arriving.wait()
                local.arriving = None
                if local.stage == 3:
                    local.place_weights()

    def _start_gather(self, local: LocalBucket) -> None:
        """Stage 3: begin to gather weights that are not here; at the other stages they are, or `publish` has begun it."""
        if local.weights is None:
            local.weights = self._pool.take(local.own_weights, local.bucket.size)
            local.arriving = local.shards.start_gather_into(local.weights, local.own_weights)

    def _let_go_unit(self, index: int) -> None:
        """Let a unit's weights go, but for those that the next unit uses too."""
        kept = self._of_unit[self._uses.next] if self._uses.next is not None else []
        self._let_go([local for local in self._of_unit[index] if local not in kept and local.bucket.decay])

    def _let_go(self, mine: Sequence[LocalBucket]) -> None:
        """Stage 3: keep only the shard of weights."""
        for local in mine:
            if local.stage == 3 and local.weights is not None:
                if local.arriving is not None:
                    local.arriving.wait()
                    local.arriving = None
                self._pool.give(local.weights)
                local.weights = None
                local.place_weights()

    def publish(self, local: LocalBucket) -> None:
        """This rank's shard of a bucket has been updated: let the other ranks have it, beside what comes next."""
        if local.stage in (1, 2) and local.weights is not None:
            local.arriving = local.shards.start_gather_into(local.weights, local.own_weights)
            if not self.overlap:
                self._fetch([local])

    def settle(self) -> None:
        """Wait for all weights that are on their way, to read parameters outside of a forward pass."""
        self._fetch([local for local in self.buckets if local.arriving is not None])

    # --- gradients ------------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for local in self.trained:
            local.reduced = False
            local.place_grads()
            if local.grads is None:
                local.own_grads.zero_()
            else:
                self._forget(local, local.grads)

    def _forget(self, local: LocalBucket, grads: torch.Tensor) -> None:
        """Let the buffer of a bucket have no gradient yet. The first one of a matrix is written there, so nothing is cleared or read.

        Norms and biases are many, small, and cleared in one go.
        """
        for gap in local.bucket.gaps() if local.bucket.decay else [slice(None)]:
            grads[gap].zero_()
        for parameter in local.bucket.parameters:
            parameter.unwritten = local.bucket.decay

    def _open(self, number: int) -> None:
        """A gradient of a trained bucket is about to be added. Raises ValueError where the bucket has been reduced already."""
        local = self.trained[number]
        if local.reduced:
            names = ", ".join(p.spec.name for p in local.bucket.parameters[:3])
            raise ValueError(
                f"a gradient for the bucket of {names} ... came after it was reduced. A parameter that several units use "
                "must be among the parameters of each of them (`Unit.parameters`)."
            )
        local.grads = self._pool.take(local.own_grads, local.bucket.size)
        local.place_grads()
        self._forget(local, local.grads)

    def _complete(self, mine: Sequence[LocalBucket]) -> None:
        """Reduce buckets that will get no further gradient in this instruction; at stages 0 and 1, in this step."""
        if self._now is None:
            return
        for local in mine:
            if local.stage >= 2 or (self._now.last and self.overlap):
                self._start_reduction(local, self._now.last)

    def _start_reduction(self, local: LocalBucket, last: bool) -> None:
        """Begin to sum a bucket's gradients, if there are any, over the ranks that share its shards. last: of this step."""
        grads = local.grads
        if grads is None or local.reduced:
            return
        local.reduced = last
        for parameter in local.bucket.parameters:
            if parameter.unwritten:  # nobody gave this gradient: it is zero
                parameter.accumulated.zero_()
            parameter.main_grad = None  # a gradient that comes too late is noticed
        if local.stage >= 2:
            local.grads = None
        self._land(self._aloft - 1)
        sent, room = self._to_send(grads, local.shards)
        self._flying.append(_Flight(local, grads, local.shards.start_scatter_sum_into(grads[local.own], sent), last, room))
        if self._aloft == 0:
            self._land(0)

    def _land(self, flying: int) -> None:
        """Wait until at most so many reductions are under way, and keep what this rank owns of the others."""
        while len(self._flying) > max(flying, 0):
            local, grads, reducing, last, room = self._flying.pop(0)
            reducing.wait()
            if room is not None:
                self._pool.give(room)
            if local.stage >= 2:
                local.own_grads.add_(grads[local.own])
                self._pool.give(grads)
            if last:
                self._sum_replicas(local)

    def _to_send(self, grads: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients as they go over an axis: themselves, or rounded; then also the buffer that this lies in, to be given back."""
        if axis.group is None or self.sent == grads.dtype:
            return grads, None
        room = self._pool.take(grads, self._largest, self.sent)  # one that serves all of them
        return room[: grads.numel()].copy_(grads), room

    def _sum_replicas(self, local: LocalBucket) -> None:
        """Begin to sum what this rank owns of a bucket's gradients, once a step, over the ranks that own the same."""
        if self.sent != self.wide:
            self._end_sums(IN_FLIGHT - 1)
        sent, room = self._to_send(local.own_grads, local.replicas)
        self._summing.append((local, local.replicas.start_all_reduce(sent)[1], room))
        if not self.overlap:
            self._end_sums(0)

    def _end_sums(self, under_way: int) -> None:
        """Wait until at most so many sums over the replicas are under way."""
        while len(self._summing) > under_way:
            local, summing, room = self._summing.pop(0)
            summing.wait()
            if room is not None:
                local.own_grads.copy_(room[: local.own_grads.numel()])
                self._pool.give(room)

    def reduce(self) -> None:
        """The step's gradients are all there: finish their sums over replicas, over ranks that hold the same slice, and tied ones."""
        self._let_go(self.buckets)
        for local in self.trained:
            self._start_reduction(local, last=True)
        self._land(0)
        for local in self.trained:
            if not local.reduced:  # the last micro-batch gave it no gradient
                self._sum_replicas(local)
        self._end_sums(0)
        for local in self.trained:
            local.place_grads()
        for name, shards in self._partial.items():
            _sum_partial(shards, getattr(self.ctx, name))
        self._sum_tied()

    def _sum_tied(self) -> None:
        """Sum the gradients of each parameter that the ranks of an axis have a copy of."""
        for local in self.trained:
            if local.bucket.spec.tied is not None:
                getattr(self.ctx, local.bucket.spec.tied).all_reduce(local.own_grads)


class _Flight(NamedTuple):
    """A reduction over the ranks that share the shards, under way."""

    local: LocalBucket
    grads: torch.Tensor
    """The whole bucket; this rank's own part of it is what is being summed."""
    reducing: Handle
    last: bool
    """Whether it completes the step's gradients on these ranks."""
    room: torch.Tensor | None
    """Where the rounded copy lies that is sent; None: they are sent themselves."""


class Uses:
    """The order in which the units of the model are used, read from a step's program, so that weights are fetched ahead of time.

    1F1B on one stage, units 0 (embedding), 1, 2:   forward 0 1 2 | backward 2 1 | forward 0 1 2 | backward 2 1
    """

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
        self._at += self.next == index

    def next_instruction(self, chunk: int) -> bool:
        """An instruction is over: whether the next one is on the same chunk."""
        del self._chunks[-1:]
        return self._chunks[-1:] == [chunk]


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


def _hook(module: nn.Module, flat: FlatParameters, index: int) -> None:
    """Have enter and leave called around a unit's module, with the first of its arguments and of its results."""

    def leave(_: nn.Module, _given: Any, made: Any) -> Any:
        return (flat.leave(index, made[0]), *made[1:]) if isinstance(made, tuple) else flat.leave(index, made)

    module.register_forward_pre_hook(lambda _, given: (flat.enter(index, given[0]), *given[1:]))
    module.register_forward_hook(leave)


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
    if parameter.grad is not None:
        parameter.accumulated.add_(parameter.grad)
        parameter.grad = None


def _sum_partial(shards: Sequence[ParameterShard], axis: Axis) -> None:
    """Sum each gradient over the ranks of an axis that hold the same slice, all in one all-reduce.

    A parameter cut into n distinct slices takes n places in the message, and each rank fills in its own: the ranks of a slice
    are summed without a group of their own.
    """
    copies = [shard.parameter.spec.copies(axis) for shard in shards]
    rows = [axis.size // n * [shard.gradient.numel()] for n, shard in zip(copies, shards, strict=True)]
    message = shards[0].gradient.new_zeros(sum(map(sum, rows)))
    places = iter(message.split([length for row in rows for length in row]))
    mine = [[next(places) for _ in row][axis.rank // n] for n, row in zip(copies, rows, strict=True)]
    for shard, part in zip(shards, mine, strict=True):
        part.copy_(shard.gradient)
    axis.all_reduce(message)
    for shard, part in zip(shards, mine, strict=True):
        shard.gradient.copy_(part)
