"""An error on any rank becomes the same error on every rank: `together`.

Moves no tensor of the model. Each call costs a few bytes; on an axis of size 1, nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import broadcast_text, lowest


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded; raised on every rank of the world at once."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, truncated, changed or not as the manifest says; the message names the file."""


class ContentError(CheckpointError):
    """A whole checkpoint that does not fit: of another model (tensors missing, too many, of another shape or dtype) or format version."""


_KINDS: tuple[type[CheckpointError], ...] = (CheckpointError, DamagedCheckpointError, ContentError)


@contextmanager
def together(ctx: ParallelContext) -> Iterator[None]:
    """Run the body on every rank of the world; if it fails on any, all raise the error of the lowest rank that failed.

    It is also a barrier. The body must hold no collectives: a rank that fails in it would leave the others waiting. An exception that is
    not an `Exception` (an interrupt) leaves at once; the other ranks then wait until the transport's time limit.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    world = ctx.world
    culprit = lowest(failure is not None, world.group, ctx.device)
    if culprit is None:
        return
    kind = type(failure) if type(failure) in _KINDS else CheckpointError
    message = str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
    name, _, message = broadcast_text(f"{kind.__name__}\n{message}", world.group, ctx.device, culprit).partition("\n")
    where = f"rank {culprit}: " if world.size > 1 else ""
    raise next(kind for kind in _KINDS if kind.__name__ == name)(where + message) from failure
