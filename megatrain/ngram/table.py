"""A hash table of 64-bit keys for many lookups at once: open addressing, linear probing, built and read with array operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.files import OneLine

EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
MISSING = np.uint32(0xFFFFFFFF)
LOAD = 0.6
"""Largest share of the slots that are used."""
MOST_SLOTS = 1 << 32
FURTHEST = 1 << 10
"""No key is as many slots away from where its search begins: chance makes about 200 of the most keys at LOAD."""

Keys = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.uint32]


def slots_for(count: int) -> int:
    """Number of slots for `count` keys: a power of 2."""
    return 1 << max(4, int(np.ceil(np.log2(max(count, 1) / LOAD))))


def _home(keys: Keys, slots: int) -> npt.NDArray[np.int64]:
    """The slot where the search for each key begins (splitmix64's finaliser)."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) & np.uint64(slots - 1)).astype(np.int64)


class TableError(OneLine, ValueError):
    """A table without free slots, which ends no search."""


class TwiceError(ValueError):
    """A key occurs twice; `places` are the two places."""

    def __init__(self, places: tuple[int, int]) -> None:
        super().__init__(f"keys {places[0]} and {places[1]} are the same")
        self.places = places


def twins(keys: npt.NDArray[Any]) -> tuple[int, int]:
    """Places of the first two equal keys of [n]; there must be some."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    first = same[int(order[same + 1].argmin())]
    return int(order[first]), int(order[first + 1])


@dataclass(frozen=True)
class Table:
    """Keys by slot; EMPTY in free slots."""

    keys: Keys
    name: str = "the model"
    """The model that errors name."""

    @classmethod
    def of(cls, keys: Keys) -> tuple[Table, Slots]:
        """The table of distinct keys, and the slot of each. Raises TwiceError."""
        size = slots_for(keys.size)
        held = np.full(size, EMPTY)
        slots = np.full(keys.size, MISSING)
        waiting, at = np.arange(keys.size), _home(keys, size)
        while waiting.size:
            free = held[at] == EMPTY
            if (held[at[~free]] == keys[waiting[~free]]).any():
                raise TwiceError(twins(keys))
            held[at[free]] = keys[waiting[free]]  # of several keys for one slot, one gets it
            won = held[at] == keys[waiting]
            slots[waiting[won]] = at[won].astype(np.uint32)
            waiting, at = waiting[~won], (at[~won] + 1) & (size - 1)
        if np.unique(slots).size != slots.size:
            raise TwiceError(twins(keys))
        return cls(held), slots

    def find(self, keys: Keys) -> Slots:
        """The slot of each key, or MISSING. Raises TableError."""
        found = np.full(keys.size, MISSING)
        if not self.keys.size:
            return found
        waiting, at = np.arange(keys.size), _home(keys, self.keys.size)
        for _ in range(FURTHEST):
            if not waiting.size:
                return found
            here = self.keys[at]
            same = here == keys[waiting]
            found[waiting[same]] = at[same].astype(np.uint32)
            on = ~same & (here != EMPTY)
            waiting, at = waiting[on], (at[on] + 1) & (self.keys.size - 1)
        if waiting.size:
            raise TableError(
                f"{self.name} is damaged: a table of it has {FURTHEST} slots side by side and none is free. Make it again."
            )
        return found
