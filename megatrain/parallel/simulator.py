"""The simulator: runs a schedule on paper, checks that it is legal and cannot deadlock, and says when who is idle.

It knows the strictest transport there is, so that what passes here runs on gloo and on NCCL: one channel per direction between two
stages, no buffering, first in first out, and a transfer begins only when it has been posted on both sides. Stages behave as the
executor does (`pipeline_parallel.py`): before an instruction they post its `receives`, wait for what it needs, compute, post the
send of what it gives, and wait for sends at the end of the step alone.

NCCL makes a link's communicator at its first message, and holds the host that posts it until the other side posts its own. With
`lazy_links` stages are held so; every schedule deadlocks then for some number of micro-batches, which is why a mesh sends something
over each link when it makes it (`mesh.py`).

Two figures tell how good a schedule is (docs/pipeline.md). The *device bubble* of a stage is the share of the time between its own
first and last instruction in which it is idle. The *step bubble* is the idle share of all devices from the first instruction of any
to the last of any, since all of them meet at the optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatrain.parallel.schedules import Instruction, Message, Schedule


class ScheduleError(RuntimeError):
    """A schedule is not legal, or deadlocks; the message says where."""


@dataclass(frozen=True)
class Costs:
    """Time of each instruction, in any unit: one number for all virtual stages, or one for each."""

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    communication: float = 0.0
    """From the posting of a message on both sides to its arrival."""

    def of(self, instruction: Instruction, virtual: int) -> float:
        """Duration of an instruction on a virtual stage; an unsplit backward takes the sum of both parts."""
        if instruction.kind == "backward":
            return _at(self.backward_input, virtual) + _at(self.backward_weight, virtual)
        return _at(getattr(self, instruction.kind), virtual)


class Event(NamedTuple):
    """One instruction on the clock of its stage."""

    instruction: Instruction
    virtual: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every stage does what."""

    schedule: Schedule
    stages: Sequence[Sequence[Event]]
    """The events of each stage, in order."""

    @property
    def makespan(self) -> float:
        """From the first instruction of any stage to the last of any."""
        return max(events[-1].end for events in self.stages)

    def busy(self, stage: int) -> float:
        """Time in which a stage computes."""
        return sum(event.end - event.start for event in self.stages[stage])

    def device_bubble(self, stage: int) -> float:
        """Share of the time between the stage's first and last instruction in which it is idle."""
        events = self.stages[stage]
        span = events[-1].end - events[0].start
        return 1 - self.busy(stage) / span if span else 0.0

    @property
    def step_bubble(self) -> float:
        """Share of the makespan in which devices are idle, over all devices."""
        whole = self.makespan * len(self.stages)
        return 1 - sum(map(self.busy, range(len(self.stages)))) / whole if whole else 0.0

    def peak(self, stage: int) -> int:
        """Most saved states, of one micro-batch on one chunk each, that the stage holds at a time."""
        return peak_saved([event.instruction for event in self.stages[stage]])


def peak_saved(program: Sequence[Instruction]) -> int:
    """Most saved states at a time, of one micro-batch on one chunk each, in a stage's program; 0 where nothing is differentiated."""
    live = peak = 0
    if not any(i.frees for i in program):
        return 0
    for instruction in program:
        live += instruction.kind == "forward"
        peak = max(peak, live)
        live -= instruction.frees
    return peak


def simulate(schedule: Schedule, costs: Costs | None = None, *, lazy_links: bool = False) -> Timeline:
    """Run a schedule. Raises ScheduleError where it is not legal, or does not end.

    lazy_links: the first message on a link holds both of its stages until the other has posted its side of it.
    """
    costs = costs or Costs()
    stages = [_Stage(schedule, costs, number) for number in range(schedule.stages)]
    for stage in stages:
        check_program(schedule, stage.number, stage.program)
    for source in stages:
        for to in {i.gives.to for i in source.program if i.gives is not None} - {source.number}:
            channel = _Channel(costs.communication, is_open=not lazy_links)
            source.outgoing[to] = stages[to].incoming[source.number] = channel
    ready = deque(stages)
    while ready:
        stage = ready.popleft()
        for to in stage.run():
            if stages[to].waiting_for == stage.number:
                ready.append(stages[to])
    stuck = [stage for stage in stages if stage.waiting_for is not None]
    if stuck:
        waits = "; ".join(f"stage {s.number} waits for stage {s.waiting_for} {s.doing}" for s in stuck[:4])
        raise ScheduleError(f"{schedule.name} on {schedule.stages} stages deadlocks: {waits}")
    return Timeline(schedule, [stage.events for stage in stages])


def check_program(schedule: Schedule, stage: int, program: Sequence[Instruction]) -> None:
    """Every micro-batch exactly once on every chunk: forward, then input gradient, then weight gradient; the last one marked.

    Raises ScheduleError.
    """
    state: dict[tuple[int, int], str] = {}
    follows = {"forward": "", "backward": "forward", "backward_input": "forward", "backward_weight": "backward_input"}
    for instruction in program:
        key = instruction.micro_batch, instruction.chunk
        if state.get(key, "") != follows[instruction.kind]:
            before = state.get(key) or "nothing"
            raise ScheduleError(f"{schedule.name}, stage {stage}: {instruction} after {before} of the same micro-batch")
        state[key] = instruction.kind
    wanted = {(m, c) for m in range(schedule.micro_batches) for c in range(schedule.chunks)}
    ends = {"backward", "backward_weight"} if schedule.backward else {"forward"}
    unfinished = sorted(wanted ^ {key for key, kind in state.items() if kind in ends})
    if unfinished:
        raise ScheduleError(f"{schedule.name}, stage {stage}: (micro-batch, chunk) {unfinished[:4]} are not run to their end")
    for chunk in range(schedule.chunks):
        marks = [i.last for i in program if i.frees and i.chunk == chunk]
        if any(marks[:-1]) or not all(marks[-1:]):
            raise ScheduleError(
                f"{schedule.name}, stage {stage}: chunk {chunk} must mark its last weight gradient, and no other"
            )


@dataclass
class _Channel:
    """Messages from one stage to another: posted by both sides in the same order, carried one after the other."""

    latency: float
    is_open: bool = True
    came: dict[str, float] = field(default_factory=dict)
    """Side (`sender`, `receiver`) -> when it posted its first message, where that had to open the channel."""
    sent: list[tuple[Message, float]] = field(default_factory=list)
    """Messages that the sender has posted, and when."""
    expected: list[tuple[Message, float]] = field(default_factory=list)
    """Messages that the receiver has posted, and when."""
    arrived: dict[Message, float] = field(default_factory=dict)
    last: float = 0.0
    """When the last one arrived."""

    def open(self, side: str, now: float) -> float | None:
        """Come to a channel; when a side that comes then may go on, or None while the other one has not come."""
        if not self.is_open:
            self.came.setdefault(side, now)
            self.is_open = len(self.came) == 2
        return max([now, *self.came.values()]) if self.is_open else None

    def arrival(self, message: Message) -> float | None:
        """When a message is there; None if it has not been sent yet. Raises ScheduleError where the two sides differ in their order."""
        while len(self.arrived) < min(len(self.sent), len(self.expected)):
            (comes, sent), (expected, posted) = self.sent[len(self.arrived)], self.expected[len(self.arrived)]
            if comes != expected:
                raise ScheduleError(f"stage {comes.source} sends {comes} out of order: stage {comes.to} receives {expected}")
            self.arrived[comes] = self.last = max(self.last, sent, posted) + self.latency
        return self.arrived.get(message)


class _Stage:
    """One rank on paper."""

    def __init__(self, schedule: Schedule, costs: Costs, number: int) -> None:
        self.schedule, self.costs, self.number = schedule, costs, number
        self.program = schedule.program(number)
        self.place = 0
        self.clock = 0.0
        self.events: list[Event] = []
        self.incoming: dict[int, _Channel] = {}
        self.outgoing: dict[int, _Channel] = {}
        self.waiting_for: int | None = None
        self._made: dict[Message, float] = {}
        """Messages for another chunk of this stage, and when each was made."""
        self._unsent: Message | None = None
        """The last instruction's message for another stage."""
        self._posted = 0
        """How many of the receives before the next instruction are posted."""

    @property
    def doing(self) -> str:
        """The instruction that it cannot begin, or the message that it cannot send."""
        return f"before {self.program[self.place]}" if self._unsent is None else f"to send {self._unsent}"

    def run(self) -> set[int]:
        """Go on until something has not been sent yet, or a link is not open; the stages that may go on by it."""
        reached: set[int] = set()
        while self._send(reached) and self.place < len(self.program):
            instruction = self.program[self.place]
            start = self._when_ready(instruction.needs) if self._post(instruction.receives, reached) else None
            if start is None:
                break
            virtual = self.schedule.virtual(self.number, instruction.chunk)
            self.clock = start + self.costs.of(instruction, virtual)
            self.events.append(Event(instruction, virtual, start, self.clock))
            self._unsent, self._posted = instruction.gives, 0
            self.place += 1
        return reached

    def _open(self, channel: _Channel, side: str, other: int, reached: set[int]) -> bool:
        """Come to a channel; False where the other stage has not come."""
        was_open, now = channel.is_open, channel.open(side, self.clock)
        if now is None:
            self.waiting_for = other
            return False
        if not was_open:
            reached.add(other)
        self.clock, self.waiting_for = now, None
        return True

    def _post(self, receives: Sequence[Message], reached: set[int]) -> bool:
        """Post the receives before an instruction; False where that holds this stage."""
        for message in receives[self._posted :]:
            channel = self.incoming[message.source]
            if not self._open(channel, "receiver", message.source, reached):
                return False
            channel.expected.append((message, self.clock))
            self._posted += 1
        return True

    def _when_ready(self, message: Message | None) -> float | None:
        """Earliest start of an instruction that needs a message; None where that has not been sent."""
        self.waiting_for = None
        if message is None:
            return self.clock
        here = message.source == self.number
        arrival = self._made.pop(message, None) if here else self.incoming[message.source].arrival(message)
        if arrival is None:
            self.waiting_for = message.source
            return None
        return max(self.clock, arrival)

    def _send(self, reached: set[int]) -> bool:
        """Post what the instruction before has made; False where that holds this stage."""
        message, self._unsent = self._unsent, None
        if message is None:
            return True
        if message.to == self.number:
            self._made[message] = self.clock
            return True
        channel = self.outgoing[message.to]
        if not self._open(channel, "sender", message.to, reached):
            self._unsent = message
            return False
        channel.sent.append((message, self.clock))
        reached.add(message.to)
        return True


def _at(cost: float | Sequence[float], virtual: int) -> float:
    return float(cost[virtual]) if isinstance(cost, Sequence) else float(cost)
