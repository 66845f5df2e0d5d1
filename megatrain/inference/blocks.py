"""The blocks of tokens that keys and values are kept in, and which of them hold a prefix that another sequence may begin with.

A block of full tokens whose contents are known has a key: (serial of the block before it, its tokens). Sequences that begin alike find
the same blocks one after the other, as in a tree. Blocks that no sequence holds are free, or idle: still there to be found, and the
longest unused of them is given away when no free one is left (PagedAttention, arXiv:2309.06180; RadixAttention, arXiv:2312.07104).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

Key = tuple[Hashable, Hashable]
"""(what comes before the block, what its tokens are)."""


class Blocks:
    """`count` blocks: who holds them, and what is known to be in them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks with a key that nobody holds, the longest unused first."""
        self._holders = [0] * count
        self._keys: dict[int, tuple[Key, int]] = {}
        """Block -> its key and serial."""
        self._known: dict[Key, tuple[int, int]] = {}
        """Key -> block and serial."""
        self._serials = 0

    @property
    def available(self) -> int:
        """Number of blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of blocks that sequences hold."""
        return self.count - self.available

    def take(self) -> int:
        """A block, now held by the caller. Raises IndexError where none is available."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            key, _ = self._keys.pop(block)
            del self._known[key]
        else:
            raise IndexError(f"all of {self.count} blocks are held")
        self._holders[block] = 1
        return block

    def find(self, key: Key) -> tuple[int, int] | None:
        """(block, serial) of a key; None if it is not known."""
        return self._known.get(key)

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds a block that has a key."""
        return block in self._idle

    def hold(self, block: int) -> None:
        """Hold a block that was found."""
        self._idle.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """Hold a block no longer."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def register(self, block: int, key: Key) -> int:
        """Say what is in a block; returns the serial of its contents, which another block may have already."""
        if key in self._known:
            return self._known[key][1]
        self._serials += 1
        self._known[key] = block, self._serials
        self._keys[block] = key, self._serials
        return self._serials

    def forget(self) -> None:
        """Nothing is known of any block any more."""
        self._free += self._idle
        self._idle.clear()
        self._keys.clear()
        self._known.clear()
