"""Measures, on one rank, how much of the data-parallel communication is hidden by computation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatrain.assembly import assemble
from megatrain.config.schema import Config
from megatrain.data.loader import Loader
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.schedules import Instruction
from megatrain.testing.trace import RandomSamples
from megatrain.training import train_step
from megatrain.transport.group import Group, Handle
from megatrain.transport.wrappers import DelayedGroup, Wrapper

SMALL = 4096
"""Bytes up to which a call is bookkeeping (loss, norm) and not counted."""


@dataclass(frozen=True)
class Overlap:
    """Measurements of one rank, medians over the steps."""

    step_seconds: float
    exposed_seconds: float
    """Time that the rank spent in starting, or waiting for, a reduction or gather of the data-parallel axis."""
    first_reduction: float
    """Start of the first reduction as a share of the last backward's time: below 0.5 is before its middle, above 1 after its end."""


class _TimedHandle(Handle):
    def __init__(self, inner: Handle, spent: Callable[[float], None]) -> None:
        self._inner, self._spent = inner, spent

    def wait(self) -> None:
        began = time.monotonic()
        self._inner.wait()
        self._spent(time.monotonic() - began)

    def done(self) -> bool:
        return self._inner.done()


class TimedGroup(Wrapper):
    """A group that sums the time its callers are blocked, and records when reductions begin; small calls are not counted."""

    def __init__(self, inner: Group) -> None:
        super().__init__(inner)
        self.exposed = 0.0
        self.reductions: list[float] = []

    def reset(self) -> None:
        """Set the sums to zero."""
        self.exposed, self.reductions = 0.0, []

    def _around(self, operation: str, larger: torch.Tensor | None, start: Callable[[], Handle], blocking: bool) -> Handle:
        began = time.monotonic()
        handle: Handle = start()
        if larger is not None and larger.nbytes > SMALL:
            self._spent(time.monotonic() - began)
            handle = _TimedHandle(handle, self._spent)
            if operation in ("all_reduce", "reduce_scatter"):
                self.reductions.append(began)
        if blocking:
            handle.wait()
        return handle

    def barrier(self) -> None:
        """Wait in the inner group's barrier."""
        self.inner.barrier()

    def _spent(self, seconds: float) -> None:
        self.exposed += seconds


def measured_overlap(ctx: ParallelContext, config: Config, steps: int, delay_seconds: float = 0.0) -> Overlap:
    """Train `config` (with its parallel.overlap and zero_stage) and measure the overlap (collective; two replicas or more).

    delay_seconds: least time of every call on the data-parallel axis, as on a slow network. Raises ValueError without replicas.
    """
    if ctx.dp_cp.group is None or config.model.vocab_size is None:
        raise ValueError("overlap is measured between replicas: start two ranks or more, with model.vocab_size given")
    made: dict[Group, TimedGroup] = {}
    axes: dict[str, Any] = {}
    for axis in (ctx.dp_cp, ctx.shards, ctx.replicas):
        if axis.group is not None:
            inner = axis.group
            made.setdefault(inner, TimedGroup(DelayedGroup(inner, delay_seconds) if delay_seconds else inner))
            axes[axis.name] = replace(axis, group=made[inner])
    ctx = replace(ctx, **axes)
    samples, train = RandomSamples(config.model.vocab_size, config.model.seq_length), config.train
    spans: list[tuple[Instruction, float, float]] = []
    seen: list[Overlap] = []
    with Loader(samples, train.global_batch_size, train.micro_batch_size, ctx.dp.rank, ctx.dp.size) as loader:
        run = assemble(config, ctx, loader, config.model.vocab_size)
        run.observers.instruction = lambda *span: spans.append(span)
        for _ in range(steps + 1):
            for timed in made.values():
                timed.reset()
            spans.clear()
            began = time.monotonic()
            train_step(run)
            run.flat.settle()
            seconds = time.monotonic() - began
            _, start, end = next(span for span in reversed(spans) if span[0].frees)
            began_first = min(began for timed in made.values() for began in timed.reductions)
            exposed = sum(timed.exposed for timed in made.values())
            seen.append(Overlap(seconds, exposed, (began_first - start) / (end - start)))
    rest = seen[1:]  # the first step sets up connections
    return Overlap(*(statistics.median(getattr(s, name) for s in rest) for name in Overlap.__dataclass_fields__))
