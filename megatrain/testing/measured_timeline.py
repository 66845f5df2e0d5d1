"""A pipeline whose layers only sleep: the executor's real timeline, to compare with the simulator's.

Sleeping takes no core, so four stages can be measured on a machine with two.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import Postponed
from megatrain.parallel.pipeline_parallel import Executed, Stage, run_schedule
from megatrain.parallel.schedules import Instruction, Kind, Schedule
from megatrain.parallel.simulator import Event, Timeline
from megatrain.testing.spawn import spawn

Span = tuple[Kind, int, int, float, float]
"""Kind, micro-batch, chunk, start and end in seconds of the machine's monotonic clock."""


def measured_timeline(schedule: Schedule, unit_seconds: float) -> Timeline:
    """Run a schedule on real processes, a stage each; forward, input gradient and weight gradient sleep `unit_seconds` each.

    Times are in units, from the start of the first instruction of any stage.
    """
    spans: list[list[Span]] = spawn(MeshShape(pp=schedule.stages), sleep_through, schedule, unit_seconds)
    begin = min(start for stage in spans for *_, start, _ in stage)
    stages = []
    for number, stage in enumerate(spans):
        events = []
        for kind, m, chunk, start, end in sorted(stage, key=lambda span: span[3]):
            times = ((start - begin) / unit_seconds, (end - begin) / unit_seconds)
            events.append(Event(Instruction(kind, m, chunk), schedule.virtual(number, chunk), *times))
        stages.append(events)
    return Timeline(schedule, stages)


def sleep_through(ctx: ParallelContext, schedule: Schedule, unit_seconds: float) -> list[Span]:
    """Run one rank of `measured_timeline`; returns its spans."""
    spans: list[Span] = []
    micro_batches = [torch.full((1, 1), float(m)) for m in range(schedule.micro_batches)]

    def observe(instruction: Instruction, start: float, end: float) -> None:
        spans.append((instruction.kind, instruction.micro_batch, instruction.chunk, start, end))

    chunks = [_SleepingChunk(unit_seconds)] * schedule.chunks
    stage = Stage(ctx, chunks, lambda hidden, _micro_batch: (hidden.sum(), {}, None), torch.empty_like, observe=observe)
    if ctx.pp.group is not None:
        ctx.pp.group.barrier()
    run_schedule(stage, schedule, micro_batches, scale=1.0)
    return spans


class _SleepingChunk:
    """A chunk that sleeps in its forward and backward."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(
        self, hidden: torch.Tensor | None, micro_batch: torch.Tensor, _sums: Executed, postponed: Postponed | None
    ) -> torch.Tensor:
        """[1, 1] -> [1, 1], after sleeping."""
        x = micro_batch.clone().requires_grad_() if hidden is None else hidden
        return _Sleep.apply(x, self.seconds, postponed)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float, postponed: Postponed | None) -> torch.Tensor:
        ctx.seconds, ctx.postponed = seconds, postponed
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        if ctx.postponed is None:
            time.sleep(2 * ctx.seconds)
        else:
            time.sleep(ctx.seconds)
            ctx.postponed.append(lambda: time.sleep(ctx.seconds))
        return dy, None, None
