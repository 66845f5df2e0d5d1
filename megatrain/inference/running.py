"""An engine over the weights of a run, between two of its steps: it computes forward, as an evaluation does, and leaves no trace.

    ranks     tensor and pipeline parallel ranks work together, as in a step; the schedule is the run's, of one micro-batch, forward
    ZeRO 3    a layer's weights are gathered over the replicas in its turn, so all replicas work on the same requests, step by step
    else      each replica has all weights, and works on its own requests (`replicas.share`)

Nothing random is drawn that a step would draw, dropout is off, and no compiled code runs, which would be compiled for each number of rows.
Keys and values, and the rows of a step, are at most as many as the tokens of one micro-batch (but for a single longer request): a step of
the training keeps more of each, so that the most memory of a run does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.engine import STEP_TOKENS, Engine, EngineSettings
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import StepUpdate
from megatrain.parallel.mesh import Axis, ParallelContext
from megatrain.training import Model, schedule_of


class Told(ValueError):
    """A rank was told to stop; raised on all ranks that work together."""


class RunningEngine(Engine):
    """An engine that looks before each of its steps whether to go on."""

    def __init__(
        self,
        weights: ForwardModel,
        codec: Tokenizer,
        settings: EngineSettings,
        told: Callable[[], bool],
        voters: Sequence[Axis],
    ) -> None:
        """told: whether this rank is told to stop; voters: axes of the ranks that take steps together."""
        super().__init__(weights, codec, settings)
        self._told, self._voters = told, voters

    def step(self) -> list[StepUpdate]:
        """As `Engine.step`. Raises Told on all ranks that take steps together where one is told to stop."""
        ctx = self.model.weights.ctx
        wishes = torch.full((), float(self._told()), device=ctx.device)
        for axis in self._voters:
            axis.all_reduce(wishes)
        if bool(ctx.world.to_host(wishes)):
            raise Told("the run was told to stop.")
        return super().step()


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
    run: Model, codec: Tokenizer, lengths: Sequence[int] = (), told: Callable[[], bool] = bool
) -> Iterator[RunningEngine]:
    """An engine over a run's weights as they are, for requests of such lengths; the run may go on once it is left.

    told: asked on every rank before each of the engine's steps, as `RunningEngine`.
    """
    ctx, alike = run.ctx, together(run)
    schedule = schedule_of(run.config, 1, backward=False)
    weights = ForwardModel(ctx, run.chunks, schedule, run.parameters, ctx.dp if alike else Axis("alike"), _plain)
    voters = (ctx.world,) if alike else (ctx.tp, ctx.pp)
    for chunk in run.chunks:
        chunk.eval()
    try:
        yield RunningEngine(weights, codec, room_for(run, lengths), told, voters)
    finally:
        for chunk in run.chunks:
            chunk.train()


@contextmanager
def _plain() -> Iterator[None]:
    """Without gradients, in tensors that can be trained with afterwards, and without compiled code."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
