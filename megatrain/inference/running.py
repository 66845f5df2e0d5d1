"""An engine over the weights of a run, between two of its steps: it computes forward, as an evaluation does, and leaves no trace.

    ranks     tensor and pipeline parallel ranks work together, as in a step; the schedule is the run's, of one micro-batch, forward
    ZeRO 3    a layer's weights are gathered over the replicas in its turn, so all replicas work on the same requests, step by step
    else      each replica has all weights, and works on its own requests; one that is done waits for the others (`settle`)

Nothing random is drawn that a step would draw, dropout is off, and no compiled code runs, which would be compiled for each number of rows.
Keys and values, and the rows of a step, are at most as many as the tokens of one micro-batch (but for a single longer request): a step of
the training keeps more of each, so that the most memory of a run does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.engine import STEP_TOKENS, Engine, EngineSettings
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import StepUpdate
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.training import Model, schedule_of


class Told(ValueError):
    """A rank was told to stop; raised on all ranks."""


class RunningEngine(Engine):
    """An engine whose ranks, those of all replicas, look before each of their steps whether to go on: 8 bytes over the world."""

    def __init__(
        self, weights: ForwardModel, codec: Tokenizer | None, settings: EngineSettings, told: Callable[[], bool]
    ) -> None:
        """told: whether this rank is told to stop."""
        super().__init__(weights, codec, settings)
        self._told, self._left = told, False

    def step(self) -> list[StepUpdate]:
        """As `Engine.step`, at the same time on all replicas (collective). Raises Told on all ranks where one is told to stop."""
        self._goes_on(busy=True)
        return super().step()

    def settle(self) -> None:
        """Wait until no replica has work left (collective), and look meanwhile as in `step`, so that this rank is not taken to hang."""
        while not self._left and self._goes_on(busy=False):
            pass

    def _goes_on(self, *, busy: bool) -> bool:
        """Whether a replica has work left; busy: this one has (collective)."""
        world, device = self.model.weights.ctx.world, self.model.weights.ctx.device
        votes = world.all_reduce(torch.tensor([float(self._told()), float(busy)], device=device))
        wishes, working = world.to_host(votes).tolist()
        if wishes:
            self._left = True
            raise Told("the run was told to stop.")
        return bool(working)


def together(run: Model) -> bool:
    """Whether all replicas of a run take their steps together, on the same requests."""
    return run.config.parallel.zero_stage == 3


def dealing(run: Model) -> ParallelContext:
    """The context whose replicas share work: without any where all work on the same."""
    return replace(run.ctx, dp=Axis("dp")) if together(run) else run.ctx


def room_for(run: Model, lengths: Sequence[int], block: int = 16) -> EngineSettings:
    """An engine's sizes for requests that have so many tokens at the end; at most positions count."""
    build, train = run.chunks[0].build, run.config.train
    batch = train.micro_batch_size * run.config.model.seq_length
    rounded = [-(-min(length, build.config.positions) // block) * block for length in lengths]
    tokens = max(max(rounded, default=block), min(sum(rounded), batch))
    step = min(batch, STEP_TOKENS.get(build.device.type, STEP_TOKENS["cuda"]))
    return EngineSettings(block, step, most_running=min(256, step), cache_tokens=tokens)


@contextmanager
def engine_of_run(
    run: Model, codec: Tokenizer | None, lengths: Sequence[int] = (), told: Callable[[], bool] = bool
) -> Iterator[RunningEngine]:
    """An engine over a run's weights as they are, for requests of such lengths; the run may go on once it is left.

    told: whether a rank is told to stop, asked on every rank before each of the engine's steps. All replicas take steps, or `settle`.
    """
    ctx, alike = run.ctx, together(run)
    schedule = schedule_of(run.config, 1, backward=False)
    plain = _uncompiled if run.chunks[0].build.compile else torch.no_grad  # what they make can be trained with
    weights = ForwardModel(ctx, run.chunks, schedule, run.parameters, ctx.dp if alike else Axis("alike"), plain)
    for chunk in run.chunks:
        chunk.eval()
    try:
        yield RunningEngine(weights, codec, room_for(run, lengths), told)
    finally:
        for chunk in run.chunks:
            chunk.train()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Without gradients, and without compiled code; the first time takes a second, in which torch gets its compiler ready."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
