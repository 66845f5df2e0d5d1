"""Finds the ranks to blame for a hang or a death, from what each rank reports. Pure functions, but for reads of /proc.

rank 0 waits in dp for rank 2,  rank 2 waits in tp for rank 3,  rank 3 reports nothing     ->  rank 3
rank 0 waits in tp for rank 1,  rank 1 waits in no call: it sleeps in load_sample          ->  rank 1, and where
rank 0 waits in tp for rank 1,  rank 1 waits in dp for rank 0                              ->  both: a deadlock

On a GPU a call of a group returns at once, and the host blocks when it reads a result (operation `read`), so the call that does not
end is unknown. But each rank reports how many calls it has begun in each of its groups, and a rank that reads waits for those that
have begun fewer. A full launch queue blocks the host anywhere, so of the ranks that are busy, only those that have begun the
fewest calls are blamed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Literal

from megatrain.transport.owner import Owner, own
from megatrain.transport.wrappers import Call

SHOWN = 8
"""Most ranks listed before `and N more`."""


@dataclass(frozen=True)
class Identity:
    """A process, described so that it is not mistaken for a later one with the same process number."""

    rank: int
    machine: str
    """Differs between machines and between containers, each of which has process numbers of its own."""
    host: str
    pid: int
    born: str
    """Start time in /proc; empty if there is no /proc."""

    @classmethod
    def own(cls, rank: int) -> Identity:
        """The identity of this process."""
        here = own()
        return cls(rank, here.machine, socket.gethostname(), here.pid, here.born)

    @classmethod
    def parse(cls, text: str) -> Identity:
        """The inverse of `text`."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """The identity as JSON."""
        return json.dumps(asdict(self))

    def condition(self) -> Literal["gone", "stopped", "running", "elsewhere"]:
        """The state of the process; elsewhere: on another machine, or unknown because there is no /proc."""
        return Owner(self.machine, self.pid, self.born).condition()

    def send(self, number: int) -> bool:
        """Send a signal if the same process still runs on this machine; whether it was sent."""
        if self.condition() in ("gone", "elsewhere"):
            return False
        try:
            os.kill(self.pid, number)
        except OSError:
            return False
        return True

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def _runs(ranks: Sequence[int]) -> str:
    """Ascending ranks as text of evenly spaced runs: `0-7,1024-1031`, or with a step `3-16379/8`."""
    found: list[str] = []
    at = 0
    while at < len(ranks):
        step = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 1
        end = at
        while end + 1 < len(ranks) and ranks[end + 1] - ranks[end] == step:
            end += 1
        found.append(f"{ranks[at]}-{ranks[end]}" + f"/{step}" * (step > 1) if end > at else f"{ranks[at]}")
        at = end + 1
    return ",".join(found)


@cache
def _written_out(runs: str) -> tuple[int, ...]:
    """The inverse of `_runs`. Cached, so all ranks of a group share one tuple and are compared by identity, not element by element."""
    ranks: list[int] = []
    for run in filter(None, runs.split(",")):
        ends, _, step = run.partition("/")
        first, _, last = ends.partition("-")
        ranks += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(ranks)


@dataclass(frozen=True)
class State:
    """One rank's report during an alarm."""

    rank: int
    doing: Literal["waiting", "busy", "blocked", "failed", "raised", "left", "overwritten"]
    """waiting: in a call; busy: in no call; blocked: a thread of it waits for a disk; failed: its transport broke; raised: ended by an
    exception; left: finished; overwritten: a process that is not of this job wrote in its place, which proves nothing against it."""
    detail: str = ""
    """The call as text, the error, or the section of the run that it is in."""
    axis: str = ""
    ranks: tuple[int, ...] = ()
    operation: str = ""
    sequence: int = 0
    seconds: float = 0.0
    """How long it has waited."""
    stack: str = ""
    """Stack of its main thread, innermost call last."""
    issued: Mapping[str, int] = field(default_factory=dict)
    """Number of calls that the rank has begun in each of its groups, by `axis/first rank`."""

    @classmethod
    def waiting(
        cls, rank: int, call: Call, now: float, stack: str, issued: Mapping[str, int] | None = None, section: str = ""
    ) -> State:
        """The report of a rank that is blocked in a call; section: of the run, where that is to be said."""
        of = call.axis, call.ranks, call.operation, call.sequence
        return cls(
            rank, "waiting", f"{call}, in {section}" if section else str(call), *of, now - call.started, stack, issued or {}
        )

    @classmethod
    def parse(cls, text: str) -> State:
        """The inverse of `text`."""
        said = json.loads(text)
        return cls(**{**said, "ranks": _written_out(said["ranks"])})

    def text(self) -> str:
        """The report as JSON. Its size does not grow with the call's ranks: every rank writes one, and one rank reads all."""
        return json.dumps({**{of.name: getattr(self, of.name) for of in fields(self)}, "ranks": _runs(self.ranks)})

    def __str__(self) -> str:
        said = {
            "waiting": f"has waited for {self.seconds:.1f} s in {self.detail}",
            "busy": f"has come no further for {self.seconds:.1f} s in {self.detail or 'no section of the run'}, and is in no call",
            "blocked": f"has come to no end for {self.seconds:.1f} s in {self.detail}",
            "failed": f"failed: {self.detail}",
            "raised": f"ended with {self.detail}",
            "left": "has left the run",
            "overwritten": "could not be heard: a process that is not of this job has written in its place",
        }
        return f"rank {self.rank} {said[self.doing]}"


@dataclass(frozen=True)
class Verdict:
    """The outcome of an alarm, printed by every rank."""

    kind: Literal["hang", "death"]
    culprits: tuple[int, ...]
    text: str
    kill: tuple[Identity, ...] = ()
    """Processes to kill, as they cannot end by themselves."""

    @classmethod
    def parse(cls, text: str) -> Verdict:
        """The inverse of `as_json`."""
        said = json.loads(text)
        kill = tuple(Identity(**identity) for identity in said["kill"])
        return cls(said["kind"], tuple(said["culprits"]), said["text"], kill)

    def as_json(self) -> str:
        """The verdict as JSON."""
        return json.dumps(asdict(self))


def behind(state: State, states: Mapping[int, State]) -> tuple[int, ...]:
    """The ranks that a waiting rank waits for: those of its call that are neither in it nor in a later call of the same axis."""
    return tuple(rank for rank in state.ranks if rank != state.rank and not _has_come(state, states.get(rank)))


def _has_come(state: State, other: State | None) -> bool:
    if other is None or other.doing != "waiting" or (other.axis, other.ranks) != (state.axis, state.ranks):
        return False
    if other.operation == "read":  # of a step before, perhaps: calls of the next one have been begun
        return other.issued.get(f"{state.axis}/{state.ranks[0]}", other.sequence + 1) > state.sequence
    if {state.operation, other.operation} & {"send", "recv"}:
        return {state.operation, other.operation} == {"send", "recv"}  # sends and receives are numbered separately on each rank
    return other.sequence >= state.sequence


def _waits(states: Mapping[int, State]) -> dict[int, tuple[int, ...]]:
    """Rank -> the ranks it waits for. Ranks that wait in the same call share one tuple, computed once."""
    waits: dict[int, tuple[int, ...]] = {}
    of_call: dict[tuple[str, int, int], tuple[int, ...]] = {}
    fewer = _Fewer(states)
    for rank, state in states.items():
        if state.doing == "waiting" and state.operation == "read":
            waits[rank] = fewer.than(state)
        elif state.doing == "waiting" and state.operation in ("send", "recv"):
            waits[rank] = behind(state, states)
        elif state.doing == "waiting":
            call = (state.axis, id(state.ranks), state.sequence)
            if call not in of_call:
                of_call[call] = behind(state, states)
            waits[rank] = of_call[call]
    return waits


class _Fewer:
    """For a rank blocked in a `read`: the ranks that have begun fewer calls than it in one of its groups."""

    def __init__(self, states: Mapping[int, State]) -> None:
        begun: dict[str, dict[int, list[int]]] = {}
        for rank, state in states.items():
            for group, calls in state.issued.items():
                begun.setdefault(group, {}).setdefault(calls, []).append(rank)
        self._behind = {
            (group, calls): tuple(sorted(rank for fewer, ranks in of.items() if fewer < calls for rank in ranks))
            for group, of in begun.items()
            for calls in of
        }
        self._unions: dict[tuple[tuple[str, int], ...], tuple[int, ...]] = {}

    def than(self, state: State) -> tuple[int, ...]:
        """The ranks that are behind `state.rank` in any of its groups; ranks with the same answer share one tuple."""
        groups = tuple(key for key in state.issued.items() if self._behind[key])
        if groups not in self._unions:
            self._unions[groups] = tuple(sorted({rank for key in groups for rank in self._behind[key]}))
        return self._unions[groups]


def find_culprits(states: Mapping[int, State], world_size: int) -> tuple[int, ...]:
    """The ranks to blame: those that raised, else those without a report, else those whose disk does not answer, else the ends of the
    chains of waiting, else a cycle of waiting.

    Where no rank waits for another: ranks whose transport failed, else busy ranks. Empty where all ranks wait in the same call: then the
    network between them is at fault.
    """
    silent = tuple(rank for rank in range(world_size) if rank not in states)
    raised = tuple(rank for rank, state in sorted(states.items()) if state.doing == "raised")
    blocked = tuple(rank for rank, state in sorted(states.items()) if state.doing == "blocked")
    if silent or raised or blocked:
        return raised or silent or blocked
    waits = _waits(states)
    reached: set[int] = set()
    ends: set[int] = set()
    followed: set[int] = set()
    for start in waits:
        ahead = [start]
        while ahead:
            next_ones = waits[ahead.pop()]
            if id(next_ones) in followed:
                continue
            followed.add(id(next_ones))
            for rank in next_ones:
                if rank not in waits:
                    ends.add(rank)
                elif rank not in reached:
                    reached.add(rank)
                    ahead.append(rank)
    if not waits:
        of = {
            state.doing: tuple(r for r, other in sorted(states.items()) if other.doing == state.doing)
            for state in states.values()
        }
        return of.get("failed") or _furthest_behind(of.get("busy", ()), states)
    return _furthest_behind(tuple(sorted(ends or reached)), states)


def _furthest_behind(ranks: tuple[int, ...], states: Mapping[int, State]) -> tuple[int, ...]:
    """Ranks without those that are busy and have begun more calls in some group than another busy one of them."""
    busy = {rank: states[rank] for rank in ranks if states[rank].doing == "busy"}
    fewer = _Fewer(busy)
    ahead = {rank for rank, state in busy.items() if fewer.than(state)}
    return ranks if len(ahead) == len(busy) else tuple(rank for rank in ranks if rank not in ahead)


def judge(states: Mapping[int, State], identities: Mapping[int, Identity], world_size: int, kept: str = "") -> Verdict:
    """The verdict: culprits, axis and call as text. `identities` has at least the ranks without a report; kept: a file with all stacks."""
    culprits = find_culprits(states, world_size)
    silent = [rank for rank in culprits if rank not in states]
    conditions = {rank: identities[rank].condition() if rank in identities else "elsewhere" for rank in silent}
    broken = any(state.doing in ("failed", "raised") for state in states.values())
    dead = "gone" in conditions.values() or (broken and "stopped" not in conditions.values())
    lines = [_describe_silent(rank, identities.get(rank), conditions[rank]) for rank in silent[:SHOWN]]
    lines += [str(states[rank]) for rank in [rank for rank in culprits if rank in states][:SHOWN]]
    if len(culprits) > SHOWN:
        lines.append(f"and {len(culprits) - SHOWN} more, of ranks {_runs(culprits)}")
    if not culprits:
        lines.append("all ranks are in the same call: the network between them, or a device, does not deliver")
    lines += _reports_beside(states, culprits) + _shown(states, culprits, kept)
    kill = tuple(identities[rank] for rank in silent if rank in identities)
    return Verdict("death" if dead else "hang", culprits, "\n".join(lines), kill)


def places(states: Mapping[int, State], world_size: int, kept: str = "") -> str:
    """Where all ranks are, those first that are in no call, and of these the ones that have come no further for longest."""
    order = sorted(states.values(), key=lambda state: (state.doing == "waiting", -state.seconds, state.rank))
    lines = [str(state) for state in order[:SHOWN]]
    if len(order) > SHOWN:
        lines.append(f"and {len(order) - SHOWN} more")
    silent = [rank for rank in range(world_size) if rank not in states]
    if silent:
        lines.append(f"rank {_runs(silent)} says nothing: it goes on, was not told, or is frozen")
    return "\n".join(lines + _shown(states, tuple(state.rank for state in order), kept))


def _describe_silent(rank: int, identity: Identity | None, condition: str) -> str:
    meaning = {
        "gone": "has died",
        "stopped": "is frozen (stopped by a signal)",
        "running": "is there, but does not answer",
        "elsewhere": "does not answer: dead, frozen or cut off from the network",
    }
    return f"{identity or f'rank {rank}'} {meaning[condition]}"


def _reports_beside(states: Mapping[int, State], culprits: tuple[int, ...]) -> list[str]:
    """Reports shown beside the culprits': ranks that wait for a culprit directly, longest first; then ranks whose transport broke."""
    blamed, waits = set(culprits), _waits(states)
    waiting = [s for s in states.values() if s.doing == "waiting" and s.rank not in blamed]
    guilty = {id(ranks): not blamed.isdisjoint(ranks) for ranks in {id(ranks): ranks for ranks in waits.values()}.values()}
    direct = [s for s in waiting if guilty[id(waits[s.rank])]] or waiting
    direct.sort(key=lambda s: -s.seconds)
    broken = [s for s in states.values() if s.doing == "failed" and s.rank not in blamed]
    return [str(state) for state in (direct + broken)[:SHOWN]]


def stacks(states: Mapping[int, State], culprits: tuple[int, ...] = ()) -> list[tuple[list[int], str]]:
    """(ranks, their stack) of all ranks, those of the culprits first; ranks with the same one share it."""
    of: dict[str, list[int]] = {}
    for rank in sorted(states, key=lambda rank: (rank not in culprits, rank)):
        if states[rank].stack:
            of.setdefault(states[rank].stack, []).append(rank)
    return [(sorted(ranks), stack) for stack, ranks in of.items()]


def written_out(found: Sequence[tuple[list[int], str]]) -> list[str]:
    """Stacks, each below its ranks."""
    return [f"rank {_runs(ranks)} is at\n{stack}" for ranks, stack in found]


def _shown(states: Mapping[int, State], culprits: tuple[int, ...], kept: str) -> list[str]:
    """SHOWN stacks, and the file that has all, if there are more."""
    found = stacks(states, culprits)
    rest = sorted(rank for ranks, _ in found[SHOWN:] for rank in ranks)
    more = f"and {len(found) - SHOWN} more stacks, of ranks {_runs(rest)}" + (f"; {kept} has them all" if kept else "")
    return written_out(found[:SHOWN]) + ([more] if rest else [])
