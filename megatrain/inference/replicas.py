"""Work dealt to the data-parallel replicas of a model, and results brought together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import gather_texts

Item = TypeVar("Item")


def share(items: Sequence[Item], ctx: ParallelContext) -> Sequence[Item]:
    """The items that this replica works on: every dp-th one."""
    return items[ctx.dp.rank :: ctx.dp.size]


def gathered(mine: Sequence[Item], ctx: ParallelContext) -> list[Item]:
    """The results of all replicas, each of what `share` gave it, in the order of the items (collective over dp).

    Results are made of what JSON has: numbers, texts, lists, None; floats are kept to the last bit.
    """
    parts = [json.loads(text) for text in gather_texts(json.dumps(list(mine)), ctx.dp.group, ctx.device)]
    results: list[Item] = [None] * sum(map(len, parts))  # type: ignore[list-item]
    for rank, part in enumerate(parts):
        results[rank :: len(parts)] = part
    return results
