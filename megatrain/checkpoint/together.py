"""An error on any rank becomes the same error on every rank: `together`. So does a difference between ranks: `require_same`.

Moves no tensor of the model. Each call costs a few bytes; on an axis of size 1, nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

from megatrain.files import OneLine
from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import broadcast_text, gather_texts, lowest
from megatrain.transport.group import name_ranks


class CheckpointError(OneLine, RuntimeError):
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


def require_same(what: str, mine: str, ctx: ParallelContext) -> None:
    """Raise ContentError on every rank unless all ranks of the world give the same text (collective).

    It names the ranks that differ from rank 0 and the first line in which the first of them does. what: that which the text is of.
    """
    texts = gather_texts(mine, ctx.world.group, ctx.device)
    unlike = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if not unlike:
        return
    lines = zip_longest(*(texts[rank].splitlines() for rank in (0, unlike[0])), fillvalue="nothing")
    first, other = next(pair for pair in lines if pair[0] != pair[1])
    raise ContentError(
        f"ranks have other weights under {what} than rank 0: {name_ranks(unlike)}. On rank 0 it is {first}; on rank {unlike[0]}, {other}. "
        "Copy the one that is meant to the same path on every node, or give a path on a file system that all nodes share."
    )
