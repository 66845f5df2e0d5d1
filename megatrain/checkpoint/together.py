"""What all ranks must agree on around a checkpoint: an error anywhere is the same error everywhere, and short texts are shared.

Nothing here moves tensors of the model. Each call costs a few bytes; on an axis of size 1 it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatrain.parallel.mesh import Axis, ParallelContext


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded; raised on every rank of the world at once."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, cut short, changed or not what the manifest says; the message names the file."""


class ContentError(CheckpointError):
    """A whole checkpoint of another model: tensors are missing, too many, or of another shape or dtype."""


class LayoutError(CheckpointError):
    """A whole checkpoint of this model whose optimizer state was saved under a layout that cannot be loaded here."""


_KINDS: tuple[type[CheckpointError], ...] = (CheckpointError, DamagedCheckpointError, ContentError, LayoutError)


@contextmanager
def together(ctx: ParallelContext) -> Iterator[None]:
    """Run the body on every rank of the world; if it fails on any, all raise the error of the lowest rank that failed.

    It is also a barrier. The body must hold no collectives: a rank that fails in it would leave the others waiting. An
    exception that is no `Exception` (an interrupt) leaves at once and is the business of the transport's time limit.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    world = ctx.world
    first = torch.tensor([world.size if failure is None else world.rank], dtype=torch.int64, device=ctx.device)
    if world.group is not None:
        world.group.all_reduce(first, "min")
    culprit = int(first.item())
    if culprit == world.size:
        return
    kind = type(failure) if type(failure) in _KINDS else CheckpointError
    message = str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
    name, _, message = broadcast_text(f"{kind.__name__}\n{message}", world, ctx.device, culprit).partition("\n")
    where = f"rank {culprit}: " if world.size > 1 else ""
    raise next(kind for kind in _KINDS if kind.__name__ == name)(where + message) from failure


def broadcast_text(text: str, axis: Axis, device: torch.device, source: int = 0) -> str:
    """The text of place `source` of the axis, on every rank of it."""
    if axis.group is None:
        return text
    data = _encode(text, device)
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    axis.group.broadcast(length, source)
    if axis.rank != source:
        data = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    axis.group.broadcast(data, source)
    return bytes(data.tolist()).decode()


def gather_texts(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Every rank's text, in order of place, on every rank of the axis."""
    if axis.group is None:
        return [text]
    data = _encode(text, device)
    lengths = torch.empty(axis.size, dtype=torch.int64, device=device)
    axis.group.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device=device))
    longest = int(lengths.max().item())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    gathered = torch.empty(axis.size * longest, dtype=torch.uint8, device=device)
    axis.group.all_gather(gathered, padded)
    rows = gathered.view(axis.size, longest).cpu().numpy()
    return [rows[i, :n].tobytes().decode() for i, n in enumerate(lengths.tolist())]


def _encode(text: str, device: torch.device) -> torch.Tensor:
    """UTF-8 bytes as uint8 [n]; the text must not be empty, since transports may refuse empty tensors."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
