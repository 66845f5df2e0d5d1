"""Which unit of the model is used when, read from the program of a step: so that ZeRO fetches weights ahead of time.

1F1B on one stage, units 0 (embedding), 1, 2:   forward 0 1 2 | backward 2 1 | forward 0 1 2 | backward 2 1
"""

from __future__ import annotations

from collections.abc import Sequence

from megatrain.parallel.buckets import Unit
from megatrain.parallel.schedules import Instruction


class Uses:
    """Which unit is used when, as far ahead as the program says."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self._order: list[int] = []
        self._chunks: list[int] = []
        self._at = 0

    def plan(self, program: Sequence[Instruction]) -> None:
        """Forwards use a chunk's units in order, backwards in reverse; split-off weight gradients read no matrix."""
        self._order, self._at = [], 0
        self._chunks = [instruction.chunk for instruction in program][::-1]
        for instruction in program:
            mine = [i for i, unit in enumerate(self.units) if unit.chunk == instruction.chunk]
            if instruction.kind == "forward":
                self._order += mine
            elif instruction.kind != "backward_weight":
                self._order += [i for i in reversed(mine) if not self.units[i].source]

    @property
    def next(self) -> int | None:
        """The unit after the one at work; None where nothing is planned."""
        return self._order[self._at] if self._at < len(self._order) else None

    def come_to(self, index: int) -> None:
        """A unit is used now."""
        if self.next == index:
            self._at += 1

    def next_instruction(self, chunk: int) -> bool:
        """An instruction is over: whether the next one is on the same chunk."""
        if self._chunks:
            self._chunks.pop()
        return bool(self._chunks) and self._chunks[-1] == chunk
