"""Which layers lie on which virtual stage of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence


def split_layers(homes: Sequence[int], num_layers: int, layer_cost: float, first_cost: float, last_cost: float) -> list[int]:
    """Layers of each virtual stage, in order, each at least one, so that the slowest rank has as little to do as possible.

    homes: the rank of each virtual stage. Costs, in any unit: of one layer, of what the first virtual stage has besides (embedding),
    and the last (head and loss). Raises ValueError where there are fewer layers than virtual stages.
    """
    virtual_stages = len(homes)
    if num_layers < virtual_stages:
        raise ValueError(f"{num_layers} layers cannot be split over {virtual_stages} virtual stages, at least one on each")
    counts = [1] * virtual_stages
    extra = [0.0] * virtual_stages
    extra[0] += first_cost
    extra[-1] += last_cost

    def cost_with_one_more(virtual: int) -> tuple[float, float]:
        """Of the rank, then of the virtual stage."""
        rank = sum(extra[v] + counts[v] * layer_cost for v, home in enumerate(homes) if home == homes[virtual])
        return rank + layer_cost, extra[virtual] + (counts[virtual] + 1) * layer_cost

    for _ in range(num_layers - virtual_stages):
        counts[min(range(virtual_stages), key=cost_with_one_more)] += 1
    return counts


def ranges_of(counts: Sequence[int]) -> list[range]:
    """Layer indices of each virtual stage."""
    starts = [sum(counts[:v]) for v in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
