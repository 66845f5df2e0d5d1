"""A request on its way: its tokens, the blocks that hold their keys and values, and what is known of its answer."""

from __future__ import annotations

from collections.abc import Hashable

from megatrain.inference.blocks import Blocks
from megatrain.inference.requests import Answer, Finish, Request, Scored
from megatrain.inference.text import TextStream


class Sequence:
    """One request being worked on."""

    def __init__(self, number: int, request: Request, version: int, stream: TextStream | None) -> None:
        """version: of the weights, whose keys and values no others may use."""
        self.number, self.request, self.stream = number, request, stream
        self.tokens = list(request.tokens)
        """Prompt and answer."""
        self.length = 0
        """Number of tokens whose keys and values are in the blocks."""
        self.blocks: list[int] = []
        self.root: Hashable = ("", version, request.places.root(request.tokens))
        self._before: Hashable = self.root
        """Serial of the last block that is known."""
        self._registered = 0
        """Number of first blocks that are known."""
        self.answer: list[Scored] = []
        self.prompt: list[Scored] = []
        self.cached: int | None = None
        """Prompt tokens that were found in blocks when the sequence was first admitted."""
        self.text = ""
        self.finish: Finish | None = None
        self.stop: int | str | None = None

    @property
    def wanted(self) -> int:
        """Number of tokens whose keys and values are needed for what comes next."""
        return len(self.tokens) if self.request.max_tokens else self.request.fed

    @property
    def remaining(self) -> int:
        """Number of tokens that are not in the blocks yet."""
        return self.wanted - self.length

    @property
    def scored(self) -> int:
        """First prompt token that is still to be scored; after the last where none are."""
        of = self.request.score_from
        return len(self.request.tokens) if of is None else of + len(self.prompt)

    def least(self) -> int:
        """Number of tokens that the next piece has at least: those of a prefix see each other, and are read together."""
        return max(1, self.request.places.prefix - self.length)

    def find_prefix(self, blocks: Blocks, size: int) -> list[int]:
        """Blocks that hold the sequence's first tokens; some of its last tokens are always left, since they are read for what follows."""
        limit = min(self.wanted - 1, self.scored - 1)
        found: list[int] = []
        before = self.root
        while (len(found) + 1) * size <= limit:
            entry = blocks.find((before, self._contents(len(found), size)))
            if entry is None:
                break
            found.append(entry[0])
            before = entry[1]
        return found

    def begin(self, found: list[int], blocks: Blocks, size: int) -> None:
        """Hold the blocks of a prefix, at admission."""
        for block in found:
            blocks.hold(block)
        self.blocks, self.length = list(found), len(found) * size
        if self.cached is None:
            self.cached = self.length
        self.register(blocks, size)

    def register(self, blocks: Blocks, size: int) -> None:
        """Say what is in the blocks that are full."""
        while (self._registered + 1) * size <= self.length:
            key = (self._before, self._contents(self._registered, size))
            self._before = blocks.register(self.blocks[self._registered], key)
            self._registered += 1

    def leave(self, blocks: Blocks) -> None:
        """Give all blocks back; the tokens are to be read again."""
        for block in reversed(self.blocks):  # the last blocks of a text are of less use to others, and go first
            blocks.release(block)
        self.blocks, self.length, self._registered, self._before = [], 0, 0, self.root

    def outcome(self) -> Answer:
        """The answer of a finished sequence."""
        if self.finish is None:
            raise ValueError(f"request {self.number} has not ended")
        return Answer(tuple(self.answer), self.text, self.finish, self.stop, tuple(self.prompt), self.cached or 0)

    def _contents(self, number: int, size: int) -> Hashable:
        start, end = number * size, (number + 1) * size
        return tuple(self.tokens[start:end]), self.request.places.stamp(start, end)
