"""Numbers that all ranks of a run have alike, besides its tensors: steps, samples, updates, loss scale, learning rate, loss guard.

They are counted by each rank for itself, so that a flipped bit in one of them is in no tensor's copy; what a rank does with it spreads.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash

from megatrain.optim.audit import Blame, ReplicaError, holders_of, named
from megatrain.parallel.mesh import ParallelContext
from megatrain.training import Run
from megatrain.transport.consensus import gather_texts

_AT_THE_START = ("identity", "program", "began")
"""Compared when a run starts, and no more."""
_SHOWN = 60
"""Characters of a value that are shown."""


def numbers_of(run: Run, kept: Mapping[str, Any]) -> dict[str, str]:
    """The numbers as text, by name; kept: what a checkpoint keeps besides tensors, as plain JSON."""
    found = {name: json.dumps(_rounded(value)) for name, value in sorted(kept.items()) if name not in _AT_THE_START}
    (bits,) = run.optimizer.updates.reshape(1).view(torch.int32).tolist()
    rates = json.dumps(_rounded([run.lr, run.weight_decay]))
    return {**found, "updates": f"{run.optimizer.updates.item():g} ({bits:#x})", "learning rate and weight decay": rates}


def compare(numbers: Mapping[str, str], ctx: ParallelContext) -> None:
    """Compare the numbers of all ranks (collective over the world). Raises ReplicaError on every rank, with the ranks of the minority."""
    group = ctx.world.group
    if group is None:
        return
    whole = xxhash.xxh3_64_intdigest(json.dumps(numbers).encode()) - (1 << 63)
    mine = torch.tensor([whole], dtype=torch.int64, device=ctx.device)
    gathered = mine.new_empty(group.size)
    group.all_gather(gathered, mine)
    if len(set(group.to_host(gathered).tolist())) == 1:
        return
    short = {name: [xxhash.xxh3_64_hexdigest(text.encode()), text[:_SHOWN]] for name, text in numbers.items()}
    rows = [json.loads(text) for text in gather_texts(json.dumps([socket.gethostname(), short]), group, ctx.device)]
    raise ReplicaError(
        "numbers that all ranks have alike are not the same on all of them",
        [
            blame
            for name in numbers
            for blame in _blames(name, [values[name] for _, values in rows], [host for host, _ in rows], ctx)
        ],
        "Go back to a checkpoint from before (checkpoint.resume=PATH), and look for a broken device on the ranks named.",
    )


def _blames(name: str, values: Sequence[Sequence[str]], hosts: Sequence[str], ctx: ParallelContext) -> list[Blame]:
    """The lines on one number; values: (hash, beginning of its text) on each rank."""
    most, *others = holders_of(ctx.world, [digest for digest, _ in values], range(len(values)))
    return [
        Blame(
            f"{name}: {named(ranks)} on {hosts[ranks[0]]} has {values[ranks[0]][1]}, {named(most)} {values[most[0]][1]}",
            tuple(ranks),
            (name,),
            own=False,
        )
        for ranks in others
    ]


def _rounded(value: Any) -> Any:
    """A value whose floats have six digits, as logarithms and cosines of two machines may differ in their last bits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return {str(name): _rounded(of) for name, of in value.items()}
    return [_rounded(of) for of in value] if isinstance(value, (list, tuple)) else value
