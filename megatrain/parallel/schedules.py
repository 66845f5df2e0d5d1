"""Pipeline schedules as data: a schedule is a pure function of (stage, stages, chunks, micro-batches) that returns instructions.

Problem: a model's layers lie on p stages; a stage has nothing to do until the one before has sent it something. Cut the batch into
m micro-batches, and choose the order in which every stage runs forwards and backwards so that few wait and little is kept.
Stage 0..2, 1F1B, 4 micro-batches (F takes one unit of time, B two; dots are idle):

    stage 0   F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 .  B2 B2 .  B3 B3
    stage 1   .  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3 .  .
    stage 2   .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .  .  .  .

The layers are numbered through as p x v *virtual stages* (v chunks a stage); a schedule says where each lies. Sends and receives
are not instructions of their own: every instruction carries the message that it needs, the one that it gives, and the receives that
are posted before it. The executor (`pipeline_parallel.py`) runs any such list, the simulator (`simulator.py`) checks and prices it.
No pipelining is 1F1B with one stage: forward and backward of each micro-batch in turn, which is exactly gradient accumulation.

Communication: every boundary between virtual stages on different ranks moves s*b*h elements forward and as many back for each
micro-batch (s/t*b*h with sequence parallelism), so v chunks move v times as much as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]
"""`backward` is input and weight gradients together; split schedules have `backward_input` and, later, `backward_weight`."""


class Message(NamedTuple):
    """A tensor for a neighbouring virtual stage: the input of the later one, or the gradient of the earlier one's output."""

    kind: Literal["activation", "gradient"]
    micro_batch: int
    virtual: int
    """The virtual stage that needs it."""
    source: int
    """The stage (rank of the pipeline) that sends it."""
    to: int
    """The stage that receives it; `source` itself where both virtual stages lie on one rank, and then it does not travel."""


class Instruction(NamedTuple):
    """Do one thing with one micro-batch on one of this stage's chunks. A schedule gives the first three; `Schedule.program` the rest."""

    kind: Kind
    micro_batch: int
    chunk: int = 0
    last: bool = False
    """Whether this is the chunk's last instruction that adds to weight gradients: they are complete once it has run."""
    needs: Message | None = None
    """Its input: an activation or a gradient of another virtual stage."""
    gives: Message | None = None
    """Its output, for another virtual stage."""
    receives: tuple[Message, ...] = ()
    """From other ranks, posted before it begins: up to what it and the instruction after it need, in the order they are sent."""

    @property
    def frees(self) -> bool:
        """Whether the saved state of the micro-batch on this chunk is let go by it."""
        return self.kind in ("backward", "backward_weight")

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} on chunk {self.chunk}"


def _staggered(count: int, delays: Mapping[Kind, int]) -> Iterator[tuple[Kind, int]]:
    """(kind, number) of instructions 0 .. count - 1 of each kind: one of each kind a turn, a kind from the turn of its delay on."""
    for turn in range(count + max(delays.values())):
        yield from ((kind, turn - delay) for kind, delay in delays.items() if 0 <= turn - delay < count)


def gpipe(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:
    """GPipe (Huang et al., arXiv:1811.06965, section 2.3): all forwards, then all backwards.

        stage 0 of 2, 3 micro-batches:   F0 F1 F2 .  .  .  B0 B0 B1 B1 B2 B2

    Peak of saved states: m on every stage. Step bubble: (p-1) / (m+p-1).
    """
    return [Instruction(kind, m) for kind, m in _staggered(micro_batches, {"forward": 0, "backward": micro_batches})]


def one_f_one_b(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:
    """1F1B (PipeDream-Flush; Narayanan et al., arXiv:2006.09503, and arXiv:2104.04473, section 2.2).

        stage 1 of 3, 4 micro-batches:   F0 F1 B0 F2 B1 F3 B2 B3

    Warm up with p-1-stage forwards, then one forward, one backward, then drain. Peak of saved states: min(m, p-stage). Step
    bubble: (p-1) / (m+p-1), as GPipe's.
    """
    warm_up = min(stages - stage - 1, micro_batches)
    return [Instruction(kind, m) for kind, m in _staggered(micro_batches, {"forward": 0, "backward": warm_up})]


def interleaved(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:
    """Interleaved 1F1B (Narayanan et al., arXiv:2104.04473, section 2.2): virtual stage c*p + stage lies here as chunk c.

        stage 0 of 2, 2 chunks (a, b), 4 micro-batches:   Fa0 Fa1 Fb0 Fb1 Fa2 Bb0 Fa3 Bb1 Fb2 Ba0 Fb3 Ba1 Bb2 Bb3 Ba2 Ba3

    Micro-batches go in groups of p through chunk after chunk. Peak of saved states: at most 2(p-1-stage) + (v-1)p + 1 chunks, each
    1/v of a stage. Step bubble: (p-1) / (vm+p-1). A last group that is not full runs as if it were, less what is not there: taking
    a micro-batch out of a legal order leaves a legal order.
    """
    group = stages * chunks
    total = -(-micro_batches // stages) * group
    warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)

    def unit(kind: Kind, k: int) -> Instruction:
        """The k-th forward; the k-th backward has the chunks in the opposite order."""
        chunk = k % group // stages
        return Instruction(kind, k // group * stages + k % stages, chunk if kind == "forward" else chunks - 1 - chunk)

    program = [unit(kind, k) for kind, k in _staggered(total, {"forward": 0, "backward": warm_up})]
    return [instruction for instruction in program if instruction.micro_batch < micro_batches]


def zb_h1(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:
    """ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, section 2.2): 1F1B with a split backward.

        stage 1 of 2, 4 micro-batches:   F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3

    Weight gradients wait for `stage` more backwards, so that the input gradients, which the stages before wait for, come sooner
    while no stage keeps more than 1F1B's first: peak of saved states min(m, p). Step bubble with F = B = W: (p-1) / (3m+p-1).
    """
    warm_up = min(stages - stage - 1, micro_batches)
    delays: dict[Kind, int] = {"forward": 0, "backward_input": warm_up, "backward_weight": warm_up + stage}
    return [Instruction(kind, m) for kind, m in _staggered(micro_batches, delays)]


def zb_v(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Instruction]:
    """ZB-V (Qi et al., arXiv:2401.10241, section 6): two chunks a stage, laid out as a V, and a split backward.

        virtual stages of 3 stages:      stage 0: 0, 5     stage 1: 1, 4     stage 2: 2, 3
        stage 0 of 2, chunks a and b, 3 micro-batches:
                                         Fa0 Fa1 Fa2 Fb0 Bb0 Wb0 Fb1 Bb1 Wb1 Ba0 Wa0 Fb2 Bb2 Wb2 Ba1 Wa1 Ba2 Wa2

    The last virtual stage lies where the first does, so the backward of a micro-batch begins on stage 0 as soon as its forward has
    come back there. With F = B = W no stage is idle between its first and its last instruction, the step bubble is (p-1) /
    (6m+p-1), and the peak of saved states is 2p chunks, half a stage each: 1F1B's first stage on all. Runs as if there were at
    least 2p-1 micro-batches.
    """
    total, behind = max(micro_batches, 2 * stages - 1), stages - stage
    forward: list[tuple[Kind, int]] = [("forward", 0), ("forward", 1)]
    backward: list[tuple[Kind, int]] = [("backward_input", 0), ("backward_input", 1)]
    weight: list[tuple[Kind, int]] = [("backward_weight", 0), ("backward_weight", 1)]
    order = [
        *forward[:1] * (2 * behind - 1),  # until the first micro-batch has come back
        *forward[::-1] * stage,
        *[forward[1], backward[1], weight[1]] * behind,
        *[forward[0], backward[0], weight[0], forward[1], backward[1], weight[1]] * (total - stages),  # steady
        *backward * stage,  # drain: the stages before wait for input gradients
        *[backward[0], weight[0]] * behind,
        *weight[1:] * total,  # the weight gradients that are left
        *weight[:1] * total,
    ]
    counts, program = Counter[tuple[Kind, int]](), []
    for kind, chunk in order:
        program.append(Instruction(kind, counts[kind, chunk], chunk))
        counts[kind, chunk] += 1
    return [instruction for instruction in program if instruction.micro_batch < micro_batches]


class _Family(NamedTuple):
    """A named schedule: its programs, and how many chunks a stage may have."""

    program: Callable[[int, int, int, int], list[Instruction]]
    """(stage, stages, chunks, micro_batches) -> the stage's instructions, in order."""
    fewest_chunks: int
    most_chunks: int | None
    folded: bool = False
    """Whether virtual stages run back after the last rank (a V) instead of starting over at the first."""


FAMILIES = {
    "gpipe": _Family(gpipe, 1, 1),
    "1f1b": _Family(one_f_one_b, 1, 1),
    "interleaved": _Family(interleaved, 2, None),
    "zb_h1": _Family(zb_h1, 1, 1),
    "zb_v": _Family(zb_v, 2, 2, folded=True),
}
"""parallel.schedule -> the schedule."""


# --- a schedule on a pipeline -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A named schedule on so many stages, chunks and micro-batches: every stage's program, and who sends what to whom."""

    name: str
    stages: int
    chunks: int
    micro_batches: int
    backward: bool = True
    """False: only the forwards, in the same order (evaluation)."""

    def __post_init__(self) -> None:
        """Raises ValueError where name or numbers make no schedule; the message names the config keys."""
        problem = chunks_problem(self.name, self.chunks)
        if problem is None and (self.stages < 1 or self.micro_batches < 1):
            problem = f"no schedule for {self.stages} stages and {self.micro_batches} micro-batches: both must be at least 1"
        if problem is not None:
            raise ValueError(problem)

    @property
    def virtual_stages(self) -> int:
        """Pieces the model is cut into."""
        return self.stages * self.chunks

    def virtual(self, stage: int, chunk: int) -> int:
        """Number of the virtual stage that lies on `stage` as its `chunk`."""
        return chunk * self.stages + self._folded(stage, chunk)

    def home(self, virtual: int) -> tuple[int, int]:
        """(stage, chunk) of a virtual stage; the inverse of `virtual`."""
        chunk, place = divmod(virtual, self.stages)
        return self._folded(place, chunk), chunk

    def _folded(self, place: int, chunk: int) -> int:
        """A V runs back with every second chunk."""
        return self.stages - 1 - place if FAMILIES[self.name].folded and chunk % 2 == 1 else place

    def program(self, stage: int) -> Sequence[Instruction]:
        """The instructions of `stage`, in order. Raises ValueError for a stage that is not there."""
        if not 0 <= stage < self.stages:
            raise ValueError(f"there is no stage {stage} in a pipeline of {self.stages}")
        return _program(self, stage)


def chunks_problem(name: str, chunks: int) -> str | None:
    """The error if a schedule cannot have so many chunks a stage, with the key to change; None where it can."""
    if name not in FAMILIES:
        return f"parallel.schedule={name} is none of {', '.join(FAMILIES)}"
    family = FAMILIES[name]
    if family.fewest_chunks <= chunks and (family.most_chunks is None or chunks <= family.most_chunks):
        return None
    wanted = f"{family.fewest_chunks}" + (" or more" if family.most_chunks is None else "")
    others = " or parallel.schedule=interleaved" if chunks > 2 else ""
    return (
        f"parallel.schedule={name} cannot have parallel.virtual_pipeline_size={chunks}. "
        f"Use parallel.virtual_pipeline_size={wanted}{others}."
    )


@lru_cache(maxsize=256)
def _program(schedule: Schedule, stage: int) -> Sequence[Instruction]:
    """A stage's program, the same at every step, with the receives that are posted before each instruction."""
    program = _linked(schedule, stage)
    sources = {i.needs.source for i in program if i.needs is not None} - {stage}
    sent = {s: iter([i.gives for i in _linked(schedule, s) if i.gives is not None and i.gives.to == stage]) for s in sources}
    posted: set[Message] = set()

    def receives(place: int) -> Iterator[Message]:
        for needed in [soon.needs for soon in program[place : place + 2]]:
            if needed is not None and needed.source != stage:
                while needed not in posted:
                    posted.add(message := next(sent[needed.source]))
                    yield message

    return tuple(i._replace(receives=tuple(receives(place))) for place, i in enumerate(program))


@lru_cache(maxsize=256)
def _linked(schedule: Schedule, stage: int) -> Sequence[Instruction]:
    """A stage's program, with what each instruction needs and gives, and each chunk's last weight gradient marked."""
    program = FAMILIES[schedule.name].program(stage, schedule.stages, schedule.chunks, schedule.micro_batches)
    ends = {i.chunk: place for place, i in enumerate(program) if i.frees}
    linked = [_with_messages(i._replace(last=ends.get(i.chunk) == place), schedule, stage) for place, i in enumerate(program)]
    return tuple(i for i in linked if schedule.backward or i.kind == "forward")


def _with_messages(instruction: Instruction, schedule: Schedule, stage: int) -> Instruction:
    """An instruction with what it needs and gives: activations go to the virtual stage after, gradients to the one before."""
    if instruction.kind == "backward_weight":
        return instruction
    kind: Literal["activation", "gradient"] = "activation" if instruction.kind == "forward" else "gradient"
    here, step = schedule.virtual(stage, instruction.chunk), 1 if kind == "activation" else -1

    def message(source: int, to: int) -> Message | None:
        if not 0 <= min(source, to) <= max(source, to) < schedule.virtual_stages:
            return None  # the model begins or ends here
        return Message(kind, instruction.micro_batch, to, schedule.home(source)[0], schedule.home(to)[0])

    return instruction._replace(needs=message(here - step, here), gives=message(here, here + step))
