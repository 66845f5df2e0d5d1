"""Which tokens the next step reads: one of each answer, then chunks of prompts, as far as the budget and the blocks last.

    running    a b c d      in the order of their arrival; each answer gets its next token, then prompts under way go on
    waiting    e f          admitted from the front, once nothing that runs lacks a block
    no block left           the sequence that came last gives its blocks back and waits again; its tokens are read anew later

Iteration-level batching (Orca, OSDI 2022), chunked prefill (Sarathi, arXiv:2308.16369), recomputation of the pre-empted (PagedAttention,
arXiv:2309.06180, section 4.5). The plan is a function of the requests and the steps so far, so that every rank makes the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from megatrain.inference.blocks import Blocks
from megatrain.inference.sequences import Sequence


@dataclass(frozen=True)
class StepPiece:
    """Tokens start .. end - 1 of a sequence, to be read in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def single(self) -> bool:
        """Whether it is one token that sees those before it, and no part of a prefix whose tokens see each other."""
        return self.end - self.start == 1 and self.end > self.sequence.request.places.prefix

    @property
    def scores(self) -> range:
        """TextPlaces of the prompt's tokens that the piece gives probabilities for: each by the token before it."""
        return range(self.sequence.scored, min(self.end + 1, len(self.sequence.request.tokens)))

    @property
    def draws(self) -> bool:
        """Whether the token after them is to be chosen."""
        return self.end == len(self.sequence.tokens) and self.sequence.request.max_tokens > 0


class Scheduler:
    """The sequences that run and wait, and the blocks they share."""

    def __init__(self, blocks: Blocks, block: int, step_tokens: int, most_running: int, prefix_cache: bool) -> None:
        """block: tokens in a block; step_tokens: the budget of a step; most_running: sequences at a time."""
        self.blocks, self.block, self.step_tokens = blocks, block, step_tokens
        self.most_running, self.prefix_cache = most_running, prefix_cache
        self.running: dict[int, Sequence] = {}
        """By number, in the order of their admission."""
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0
        """Prompt tokens looked for in blocks, and found."""

    def plan(self) -> list[StepPiece]:
        """The pieces of the next step; the blocks for them are held, and full ones are known, as all are written before any is read."""
        pieces: dict[int, StepPiece] = {}
        before = self.preemptions
        answers = [s for s in self.running.values() if s.remaining == 1]
        prompts = [s for s in self.running.values() if s.remaining > 1]
        budget = self._continue(answers, self.step_tokens, pieces)
        budget = self._continue(prompts, budget, pieces)
        if self.preemptions == before:
            self._admit(budget, pieces)
        return list(pieces.values())

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out, whether they run or wait."""
        for sequence in sequences:
            if self.running.pop(sequence.number, None) is None:
                self.waiting.remove(sequence)
            sequence.leave(self.blocks)

    def _continue(self, sequences: list[Sequence], budget: int, pieces: dict[int, StepPiece]) -> int:
        """Plan pieces of sequences that run; returns what is left of the budget."""
        for sequence in sequences:
            size = max(min(sequence.remaining, budget), sequence.least())
            if (budget < size and pieces) or sequence.number not in self.running:
                continue
            end = sequence.length + size
            if self._make_room(sequence, end, pieces):
                budget -= size
                self._plan(sequence, end, pieces)
        return budget

    def _admit(self, budget: int, pieces: dict[int, StepPiece]) -> None:
        """Plan first pieces of sequences that wait."""
        while self.waiting and budget > 0 and len(self.running) < self.most_running:
            sequence = self.waiting[0]
            found = sequence.find_prefix(self.blocks, self.block) if self.prefix_cache else []
            held = len(found) * self.block
            size = max(min(sequence.wanted - held, budget), sequence.request.places.prefix - held)
            more = -(-(held + size) // self.block) - len(found)
            if (size > budget and pieces) or more > self.blocks.available - sum(map(self.blocks.is_idle, found)):
                return
            self.waiting.popleft()
            if self.prefix_cache and sequence.cached is None:
                self.prefix_queries += len(sequence.request.tokens)
                self.prefix_hits += held
            sequence.begin(found, self.blocks, self.block)
            self.running[sequence.number] = sequence
            sequence.blocks += [self.blocks.take() for _ in range(more)]
            budget -= size
            self._plan(sequence, held + size, pieces)

    def _make_room(self, sequence: Sequence, end: int, pieces: dict[int, StepPiece]) -> bool:
        """Hold blocks for the first `end` tokens; False where the sequence itself had to give way."""
        while len(sequence.blocks) * self.block < end:
            if self.blocks.available:
                sequence.blocks.append(self.blocks.take())
                continue
            last = next(s for number, s in reversed(self.running.items()) if number not in pieces)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.leave(self.blocks)
        del self.running[sequence.number]
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _plan(self, sequence: Sequence, end: int, pieces: dict[int, StepPiece]) -> None:
        pieces[sequence.number] = StepPiece(sequence, sequence.length, end)
        sequence.length = end
        if self.prefix_cache:
            sequence.register(self.blocks, self.block)
