"""The engine: requests of any lengths are continued and scored side by side, one step after the other.

    number = engine.add(Request(tokens, max_tokens=64, sampling=Sampling(temperature=0.8), seed=1))
    while engine.busy:
        for update in engine.step():     # what each request has got
            ...
    answers = engine.run(requests)       # or all of them at once

Every rank of a model (tensor and pipeline parallelism) calls `add`, `cancel` and `step` alike and gets the same results: nothing is
decided on one rank alone, and a step sends activations and a few numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.blocks import Blocks
from megatrain.inference.paged_model import ForwardModel, PagedModel, Read
from megatrain.inference.requests import Answer, Finish, Request, Scored, StepUpdate
from megatrain.inference.scheduling import Scheduler
from megatrain.inference.sequences import Sequence as Running
from megatrain.inference.text import TextStream
from megatrain.parallel.mesh import ParallelContext

STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that a step reads at most, by the kind of device: enough that weights are read for many, few enough that answers go on."""
CACHE_SHARE = 0.25, 0.8
"""Share of the memory available that keys and values may take: of a host, of a GPU."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine."""

    block: int = 16
    """Tokens in a block."""
    step_tokens: int | None = None
    """Tokens that a step reads at most; None: 512 on a CPU, 8,192 on a GPU."""
    most_running: int = 256
    """Requests that are worked on at a time; others wait."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are kept; None: all that may run at a time, as far as a share of the memory lasts."""
    prefix_cache: bool = True
    """Whether the keys and values of prefixes that are seen again are kept."""


@dataclass(frozen=True)
class Stats:
    """An engine's counts, since it began."""

    running: int
    waiting: int
    blocks: int
    """Blocks that there are."""
    blocks_used: int
    """Blocks that requests hold now."""
    preemptions: int
    prefix_queries: int
    """Prompt tokens that were looked for in the cache of prefixes."""
    prefix_hits: int
    """Prompt tokens that were found there."""
    prompt_tokens: int
    """Tokens of the prompts of admitted requests."""
    generated_tokens: int
    steps: int


class Engine:
    """A model that works on many requests at a time."""

    def __init__(
        self,
        weights: ForwardModel,
        codec: Tokenizer | None = None,
        settings: EngineSettings = EngineSettings(),
        available: Callable[[], int] | None = None,
    ) -> None:
        """codec: needed for text and stop strings; available: bytes that this rank may use, read where settings.cache_tokens is None."""
        build = weights.chunks[0].build
        device = weights.ctx.device.type
        self.codec, self.settings = codec, settings
        self.vocab_size, self.max_length = build.vocab_size, build.config.positions
        self.two_dimensional = build.config.two_dimensional
        count = blocks_for(weights, settings, available)
        self.model = PagedModel(weights, count, settings.block)
        budget = settings.step_tokens or STEP_TOKENS.get(device, STEP_TOKENS["cuda"])
        self.scheduler = Scheduler(
            Blocks(count), settings.block, max(budget, settings.most_running), settings.most_running, settings.prefix_cache
        )
        self._live: dict[int, Running] = {}
        self._finished: dict[int, Answer] = {}
        self._added = self._version = self._steps = self._prompt_tokens = self._generated = 0

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._live)

    @property
    def stats(self) -> Stats:
        """Counts up to now."""
        s = self.scheduler
        waiting, hits = len(s.waiting), (s.preemptions, s.prefix_queries, s.prefix_hits)
        counts = self._prompt_tokens, self._generated, self._steps
        return Stats(len(s.running), waiting, s.blocks.count, s.blocks.used, *hits, *counts)

    def add(self, request: Request) -> int:
        """Take a request in; returns its number. Raises ValueError where it cannot be."""
        self._require(request)
        number = self._added
        self._added += 1
        stream = None
        if request.text or request.stops:
            if self.codec is None:
                raise ValueError("text and stop strings need a tokenizer: give the engine its codec.")
            stream = TextStream(self.codec, request.tokens, request.stops)
        sequence = Running(number, request, self._version, stream)
        self._prompt_tokens += len(request.tokens)
        self._live[number] = sequence
        self.scheduler.waiting.append(sequence)
        return number

    def cancel(self, number: int) -> None:
        """End a request now and forget it; one that has ended already is forgotten."""
        self._finished.pop(number, None)
        sequence = self._live.pop(number, None)
        if sequence is not None:
            self.scheduler.remove([sequence])

    def answer(self, number: int) -> Answer:
        """The answer to a request that has ended, which is forgotten."""
        return self._finished.pop(number)

    def step(self) -> list[StepUpdate]:
        """One iteration: read and choose tokens of all that runs (collective). Raises ValueError where logits are not finite."""
        pieces = self.scheduler.plan()
        if not pieces:
            return []
        updates = [update for read in self.model.read(pieces) if (update := self._absorb(read)) is not None]
        self._steps += 1
        return updates

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Work on requests, and on those taken in before, until these have ended; their answers, in order."""
        numbers = [self.add(request) for request in requests]
        while any(number in self._live for number in numbers):
            self.step()
        return [self.answer(number) for number in numbers]

    def settle(self) -> None:
        """Say that this replica has no more work for now: an engine whose replicas wait for each other does so here."""

    def new_weights(self) -> None:
        """Say that the weights have changed: what is kept of prefixes is forgotten. Raises ValueError while requests are under way."""
        if self.busy:
            raise ValueError(f"{len(self._live)} requests are under way; weights may change only between them.")
        self._version += 1
        self.scheduler.blocks.forget()

    def _require(self, request: Request) -> None:
        """Raise ValueError where a request does not fit the model or the cache."""
        length, room = len(request.tokens), self.scheduler.blocks.count * self.settings.block
        if not length or request.max_tokens < 0:
            raise ValueError(
                f"a request has at least one token and no negative max_tokens; here {length} and {request.max_tokens}."
            )
        if request.fed > self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens, and the model has {self.max_length} positions (model.max_positions). "
                "Use a shorter prompt."
            )
        if min(request.tokens) < 0 or max(request.tokens) >= self.vocab_size:
            wrong = next(token for token in request.tokens if not 0 <= token < self.vocab_size)
            raise ValueError(f"token {wrong} of the prompt is not in the model's vocabulary of {self.vocab_size} tokens.")
        if request.score_from is not None and not 1 <= request.score_from <= length:
            raise ValueError(f"score_from={request.score_from} is no place after the first of a prompt of {length} tokens.")
        if not 0 <= (request.top or 0) <= self.vocab_size:
            raise ValueError(f"top={request.top} of a vocabulary of {self.vocab_size} tokens cannot be told.")
        biased = [token for token, _ in request.sampling.logit_bias] + list(request.sampling.never)
        if wrong_ids := [token for token in biased if not 0 <= token < self.vocab_size]:
            raise ValueError(f"logit_bias names token {wrong_ids[0]}, and the vocabulary has {self.vocab_size} tokens.")
        most = min(request.fed + request.max_tokens, self.max_length)
        if most > room:
            raise ValueError(
                f"{length} tokens and {request.max_tokens} new ones need keys and values of {most} tokens, and the cache has room "
                f"for {room}. Use fewer tokens, or a larger cache (cache_tokens={most})."
            )

    def _absorb(self, read: Read) -> StepUpdate | None:
        """Add what a step has found to its request."""
        sequence = read.piece.sequence
        sequence.prompt += read.scored
        request = sequence.request
        if read.drawn is None:
            if request.max_tokens or sequence.remaining:
                return None
            return self._end(sequence, (), "", "length", None)
        self._generated += 1
        if read.drawn.token in request.ends:
            return self._end(sequence, (), self._rest(sequence), "stop", read.drawn.token)
        return self._append(sequence, read.drawn)

    def _append(self, sequence: Running, drawn: Scored) -> StepUpdate:
        """Add a token to an answer."""
        request, stream = sequence.request, sequence.stream
        sequence.tokens.append(drawn.token)
        sequence.answer.append(drawn)
        text = "" if stream is None else stream.push(drawn.token)
        if stream is not None and stream.stopped is not None:
            return self._end(sequence, (drawn,), text, "stop", stream.stopped)
        if len(sequence.answer) == request.max_tokens or len(sequence.tokens) > self.max_length:
            text += self._rest(sequence)  # with which it may turn out that a stop string had ended it
            stopped = None if stream is None else stream.stopped
            return self._end(sequence, (drawn,), text, "length" if stopped is None else "stop", stopped)
        sequence.text += text
        return StepUpdate(sequence.number, (drawn,), text, None)

    def _rest(self, sequence: Running) -> str:
        """The text that was held back, as the answer has ended."""
        return "" if sequence.stream is None else sequence.stream.finish()

    def _end(
        self, sequence: Running, tokens: tuple[Scored, ...], text: str, finish: Finish, stop: int | str | None
    ) -> StepUpdate:
        sequence.text += text
        sequence.finish, sequence.stop = finish, stop
        del self._live[sequence.number]
        self.scheduler.remove([sequence])
        self._finished[sequence.number] = sequence.outcome()
        return StepUpdate(sequence.number, tokens, text, sequence.finish)


def blocks_for(weights: ForwardModel, settings: EngineSettings, available: Callable[[], int] | None = None) -> int:
    """Number of blocks: of settings.cache_tokens, or of what memory there is; the same on every rank (collective).

    Raises ValueError where the memory does not last for one block.
    """
    ctx, build = weights.ctx, weights.chunks[0].build
    tokens = settings.cache_tokens
    if tokens is None:
        shapes = [block.attention.cache_shape for chunk in weights.chunks for block in chunk.stack.blocks]
        bytes_a_token = sum(2 * heads * width * build.dtype.itemsize for heads, width in shapes)
        memory = (available or (lambda: memory_for_cache(ctx)))()
        most = settings.most_running * (build.config.positions + settings.block)
        mine = torch.tensor([min(most, memory // max(bytes_a_token, 1))], dtype=torch.int64, device=ctx.device)
        tokens = int(ctx.world.to_host(ctx.world.all_reduce(mine, "min")))
    count = -(-tokens // settings.block) if settings.cache_tokens else tokens // settings.block
    if count < 1:
        raise ValueError("there is no memory for the keys and values of a single block of tokens.")
    return count


def memory_for_cache(ctx: ParallelContext) -> int:
    """Bytes that the keys and values of this rank may take."""
    of_host, of_device = CACHE_SHARE
    if ctx.device.type == "cuda":
        return int(of_device * torch.cuda.mem_get_info(ctx.device)[0])
    return int(of_host * psutil.virtual_memory().available / ctx.world.size)  # as if all ranks were on this machine
