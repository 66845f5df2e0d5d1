"""Pipeline schedules as data: a schedule is a pure function that returns one stage's list of instructions.

The executor (`pipeline_parallel.py`) runs any such list. No pipelining is 1F1B with one stage: forward and backward of each
micro-batch in turn, which is exactly gradient accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Instruction:
    """Do one thing with one micro-batch on one of this stage's chunks."""

    kind: Literal["forward", "backward"]
    micro_batch: int
    chunk: int = 0
    last: bool = False
    """Whether this is the chunk's last instruction that adds to weight gradients: they are complete once it has run."""


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[Instruction]:
    """1F1B (Narayanan et al., arXiv:2006.09503 and arXiv:2104.04473): warm up, then one forward, one backward, then drain.

    Stage 1 of 3, 4 micro-batches:   F0 F1 B0 F2 B1 F3 B2 B3
    Peak of saved micro-batches on a stage: min(micro_batches, stages - stage). Raises ValueError where stage or counts make no sense.
    """
    if not 0 <= stage < stages or micro_batches < 1:
        raise ValueError(f"no 1F1B schedule for stage {stage} of {stages} with {micro_batches} micro-batches")
    warm_up = min(stages - stage - 1, micro_batches)
    program = [Instruction("forward", m) for m in range(warm_up)]
    for m in range(micro_batches):
        if warm_up + m < micro_batches:
            program.append(Instruction("forward", warm_up + m))
        program.append(Instruction("backward", m, last=m == micro_batches - 1))
    return program


def forward_only(micro_batches: int) -> list[Instruction]:
    """Evaluation: every micro-batch forward, nothing kept."""
    return [Instruction("forward", m) for m in range(micro_batches)]
