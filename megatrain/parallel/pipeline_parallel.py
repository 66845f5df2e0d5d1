"""Pipeline parallelism: the layers lie on p stages, and an executor runs a schedule's instructions on each of them.

Problem: the model does not fit one device, or one node. Stage i holds neighbouring layers; activations travel to the next stage,
their gradients back. Four ranks, one chunk each:

    stage 0: embedding, layers 0-5  --[s,b,h]-->  stage 1: 6-11  -->  stage 2: 12-17  -->  stage 3: 18-22, head, loss
                                    <--gradient--                <--                  <--

Which micro-batch is run when is data (`schedules.py`); this file only does what the list says, the same for every schedule and
every number of stages: with one stage nothing is sent, and the same list is gradient accumulation. Receives are posted one
instruction ahead, in the order that the sender sends; sends are waited for at the end of the step. So no stage ever waits for
anything but its own next input, which is what the simulator proves free of deadlock on the strictest transport.

Shapes travel by contract: every boundary tensor is `Stage.boundary(micro_batch)`, [s, b, h], or [s/t, b, h] with sequence
parallelism. Every stage reads tokens, labels and positions from its own loader; only activations and gradients are sent:
2 (p v - 1) boundaries of s*b*h elements a micro-batch over the whole pipeline with v chunks a stage.

What is kept of a micro-batch between forward and backward: its input, autograd's graph, and, under a split backward, the list of
weight gradients that wait. The output itself is let go as soon as it is sent: a scalar ticket stands for it (`_Leave`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatrain.parallel.mesh import Done, ParallelContext
from megatrain.parallel.param import Postponed
from megatrain.parallel.schedules import Instruction, Message, Schedule
from megatrain.transport.group import Handle

Chunk = Callable[[torch.Tensor | None, Any, "Executed", Postponed | None], torch.Tensor]
"""A virtual stage: (hidden states of the one before, None for the first; micro-batch; sums so far; postponed) -> its own hidden states.

A layer may add to a sum (`Executed.by_name`), and appends a weight gradient that can wait to `postponed`, unless that is None.
"""
Head = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Mapping[str, torch.Tensor], Any]]
"""(the last virtual stage's hidden states, micro-batch) -> (summed loss with its gradient, statistics: scalars by name, any output)."""
Observer = Callable[[Instruction, float, float], None]
"""(instruction, start, end): seconds of time.monotonic() on the host, without waiting for what it needs; a GPU may still be busy."""


class Parameters(Protocol):
    """Where weights and gradients come and go with the instruction at work (ZeRO)."""

    def plan(self, program: Sequence[Instruction], /) -> None:
        """Called with the whole program before it runs."""

    def during(self, instruction: Instruction, postponed: Postponed | None, /) -> AbstractContextManager[None]:
        """Entered around every instruction; `postponed` is its micro-batch's list of weight gradients that wait."""


class Unsharded:
    """Parameters that are whole on every rank at any time."""

    def plan(self, _program: Sequence[Instruction], /) -> None:
        """Nothing to prepare."""

    def during(self, _instruction: Instruction, _postponed: Postponed | None, /) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


@dataclass(frozen=True)
class Stage:
    """This rank's share of a pipeline."""

    ctx: ParallelContext
    chunks: Sequence[Chunk]
    """In the order of the forward pass."""
    head: Head
    """Called after the last virtual stage, on the rank where that lies."""
    boundary: Callable[[Any], torch.Tensor]
    """Micro-batch -> a new tensor of the shape, dtype and device of what travels between its virtual stages."""
    statistics: tuple[str, ...] = ()
    """Names of the statistics, each a scalar, of the head, whose class is `objective`; one that it leaves out counts 0."""
    observe: Observer | None = None
    """Called after every instruction."""
    parameters: Parameters = field(default_factory=Unsharded)
    objective: str = "head"


@dataclass
class Executed:
    """Results of a schedule besides gradients. Where the last virtual stage is on another rank: zeros, and no outputs."""

    names: tuple[str, ...]
    """Names of the k statistics."""
    sums: torch.Tensor
    """[1 + k] float64: sums over the micro-batches of the loss (undivided) and of each statistic."""
    outputs: list[Any]
    """The head's output for each micro-batch."""
    peak_saved: int = 0
    """Most saved states at a time, of one micro-batch on one chunk each."""

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """The sums, by "loss" and the names of the statistics."""
        return dict(zip(("loss", *self.names), self.sums, strict=True))


def run_schedule(stage: Stage, schedule: Schedule, micro_batches: Sequence[Any], scale: torch.Tensor | float) -> Executed:
    """Execute this stage's program; every micro-batch's loss is differentiated times `scale` (1 / global weight).

    Collective over the pipeline. Raises TransportError where another stage has failed.
    """
    program = schedule.program(stage.ctx.pp.rank)
    stage.parameters.plan(program)
    execution = _Execution(stage, program, micro_batches, scale)
    for instruction in program:
        execution.run(instruction)
    for handle in execution.sending:
        handle.wait()
    return execution.executed


@dataclass
class _Saved:
    """State of one micro-batch on one chunk between its forward and its last backward."""

    input: torch.Tensor | None
    postponed: Postponed | None
    ticket: torch.Tensor | None = None
    """Scalar whose backward is that of the chunk."""
    gradient: torch.Tensor | None = None
    """Gradient of the output, put here before the backward reads it."""


class _Leave(torch.autograd.Function):
    """Output [s, b, h] -> a scalar ticket. Nothing refers to the output any more, so its storage is freed once it is sent."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, saved: _Saved) -> torch.Tensor:
        ctx.saved = saved
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _ticket: torch.Tensor) -> Any:
        return ctx.saved.gradient, None


class _Execution:
    """One run of one stage's program."""

    def __init__(
        self, stage: Stage, program: Sequence[Instruction], micro_batches: Sequence[Any], scale: torch.Tensor | float
    ) -> None:
        self.stage, self.micro_batches, self.scale = stage, micro_batches, scale
        kinds = {instruction.kind for instruction in program}
        self.differentiates, self.splits = kinds != {"forward"}, "backward_weight" in kinds
        sums = torch.zeros(1 + len(stage.statistics), dtype=torch.float64, device=stage.ctx.device)
        self.executed = Executed(stage.statistics, sums, [None] * len(micro_batches))
        self.saved: dict[tuple[int, int], _Saved] = {}
        """By micro-batch and chunk."""
        self.inbox: dict[Message, tuple[Handle, torch.Tensor]] = {}
        """Tensors for this stage's instructions, with the handle to wait for."""
        self.sending: list[Handle] = []

    def run(self, instruction: Instruction) -> None:
        """Receive what an instruction needs, run it, and send what it gives."""
        stage, key = self.stage, (instruction.micro_batch, instruction.chunk)
        for message in instruction.receives:
            link, room = stage.ctx.receives[message.source], stage.boundary(self.micro_batches[message.micro_batch])
            self.inbox[message] = link.group.recv(room, link.other, blocking=False), room
        given: torch.Tensor | None = None
        if instruction.needs is not None:
            arriving, given = self.inbox.pop(instruction.needs)
            arriving.wait()
        began = time.monotonic()
        with stage.parameters.during(instruction, self.saved[key].postponed if key in self.saved else None):
            by_kind = {"forward": self._forward, "backward_weight": self._backward_weight}
            made = by_kind.get(instruction.kind, self._backward)(instruction, given)
        if stage.observe is not None:
            stage.observe(instruction, began, time.monotonic())
        if instruction.gives is not None and made is not None:
            self._give(instruction.gives, made)
        for handle in [handle for handle in self.sending if handle.done()]:
            handle.wait()
            self.sending.remove(handle)

    def _give(self, message: Message, tensor: torch.Tensor) -> None:
        """Pass a tensor on: to another chunk of this stage, or to another stage."""
        if message.to == message.source:
            self.inbox[message] = Done(), tensor
        else:
            link = self.stage.ctx.sends[message.to]
            self.sending.append(link.group.send(tensor.contiguous(), link.other, blocking=False))

    def _forward(self, instruction: Instruction, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """The output for the next virtual stage, detached; None from the last one."""
        m, micro_batch, names = instruction.micro_batch, self.micro_batches[instruction.micro_batch], self.stage.statistics
        saved = _Saved(hidden, [] if self.splits else None)
        with torch.set_grad_enabled(self.differentiates):
            if hidden is not None:
                hidden.requires_grad_(self.differentiates)
            output = self.stage.chunks[instruction.chunk](hidden, micro_batch, self.executed, saved.postponed)
            if instruction.gives is None:
                total, statistics, self.executed.outputs[m] = self.stage.head(output, micro_batch)
                found = {"loss": total, **dict.fromkeys(names, total.new_zeros(())), **statistics}
                if wrong := [n for n in (*names, *statistics) if n == "loss" or names.count(n) != 1 or found[n].dim()]:
                    raise ValueError(
                        f"{self.stage.objective}.statistics is {names}, and {wrong[0]!r} of shape {list(found[wrong[0]].shape)} cannot be "
                        f"summed: declare every name that is returned, once, none called loss, and return scalars (.sum())"
                    )
                self.executed.sums += torch.stack([x.detach().double() for x in found.values()])
                saved.ticket = total * self.scale
            else:
                saved.ticket = _Leave.apply(output, saved)
        if self.differentiates:
            self.saved[m, instruction.chunk] = saved
            self.executed.peak_saved = max(self.executed.peak_saved, len(self.saved))
        return None if instruction.gives is None else output.detach()

    def _backward(self, instruction: Instruction, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of the input, for the virtual stage before; None at the first one."""
        saved = self.saved[instruction.micro_batch, instruction.chunk]
        saved.gradient = gradient
        if saved.ticket is not None and saved.ticket.requires_grad:
            torch.autograd.backward(saved.ticket)
        made = None if saved.input is None else saved.input.grad
        if saved.input is not None and made is None:  # nothing on the way to the loss depends on it
            made = torch.zeros_like(saved.input)
        saved.input = saved.ticket = saved.gradient = None
        if instruction.frees:
            del self.saved[instruction.micro_batch, instruction.chunk]
        return made

    def _backward_weight(self, instruction: Instruction, _none: torch.Tensor | None) -> None:
        postponed = self.saved.pop((instruction.micro_batch, instruction.chunk)).postponed or []
        with torch.no_grad():
            while postponed:
                postponed.pop(0)()  # and what it has kept is let go
