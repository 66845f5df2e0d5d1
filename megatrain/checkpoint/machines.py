"""The machines that a run's ranks are on, and which of them keeps a copy of another's files, for the loss of one.

    6 machines    0-3  1-4  2-5     each keeps the other's
    5             0-2  1-3-4        the last three are a ring: 3 keeps 1's, 4 keeps 3's, 1 keeps 4's

Pairs lose least where two machines are lost at once: in a ring twice as many pairs of machines hold all that there is of one (GEMINI,
Wang et al., SOSP 2023: its group placement). The two of a pair are half the machines apart, since what
takes several at once, a rack's power or its switch, takes neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import gather_texts


@dataclass(frozen=True)
class Machines:
    """The ranks of each machine."""

    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> Machines:
        """By the label of each rank's machine; machines may have different numbers of ranks."""
        found: dict[str, list[int]] = {}
        for rank, label in enumerate(labels):
            found.setdefault(label, []).append(rank)
        return cls(tuple(map(tuple, found.values())))

    @classmethod
    def meet(cls, label: object, ctx: ParallelContext) -> Machines:
        """The machines of all ranks, each by the label that its ranks give it (collective over the world)."""
        return cls.of(gather_texts(str(label), ctx.world.group, ctx.device))

    @property
    def number(self) -> int:
        """Number of machines."""
        return len(self.ranks)

    def machine(self, rank: int) -> int:
        """The machine of a rank."""
        return next(number for number, ranks in enumerate(self.ranks) if rank in ranks)

    def share(self, rank: int) -> tuple[int, int]:
        """(place of a rank among those of its machine, their number)."""
        ranks = self.ranks[self.machine(rank)]
        return ranks.index(rank), len(ranks)

    def leads(self, rank: int) -> bool:
        """Whether a rank is the first of its machine."""
        return self.share(rank)[0] == 0

    def keeper(self, machine: int) -> int | None:
        """The machine that keeps a copy of a machine's files; None if there is no other."""
        half, number = self.number // 2, self.number
        if number == 1:
            return None
        if number % 2 and machine in (half - 1, 2 * half - 1, number - 1):
            return {half - 1: 2 * half - 1, 2 * half - 1: number - 1, number - 1: half - 1}[machine]
        return machine + half if machine < half else machine - half

    def receiver(self, rank: int) -> int | None:
        """The rank that takes in a rank's files for its machine; None if there is no other machine."""
        keeper = self.keeper(self.machine(rank))
        return None if keeper is None else self.turn(keeper, self.share(rank)[0])

    def givers(self, rank: int) -> tuple[int, ...]:
        """The ranks whose files a rank takes in."""
        mine = self.machine(rank)
        kept = [ranks for number, ranks in enumerate(self.ranks) if self.keeper(number) == mine]
        return tuple(other for ranks in kept for place, other in enumerate(ranks) if self.turn(mine, place) == rank)

    def turn(self, machine: int, number: int) -> int:
        """The rank of a machine that does the task of this number, as its ranks take turns."""
        ranks = self.ranks[machine]
        return ranks[number % len(ranks)]
