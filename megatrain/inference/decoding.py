"""Decoding: a model with a key-value cache, and the choice of the next token: the most probable, sampled, or by beam search.

A decoding step is the forward-only schedule with one micro-batch. The last stage's logits go to every rank, and all ranks choose the
same token, each from a generator with the same seed: checkpoint, prompt and seed give the same text under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from megatrain.inference.key_values import KeyValueCache
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import Loss, MicroBatch
from megatrain.models.gpt import GPT, Block, Head
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import Postponed
from megatrain.parallel.pipeline_parallel import Chunk, Executed, Stage, run_schedule
from megatrain.parallel.schedules import Schedule


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits."""

    greedy: bool = False
    """Take the most probable token; the other fields are then ignored."""
    temperature: float = 1.0
    """The logits are divided by it; above 0."""
    top_k: int | None = None
    """Sample among the k most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest most probable tokens whose probabilities sum to this (nucleus sampling, arXiv:1904.09751)."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [v] -> probabilities [v], float32 on the CPU. Raises ValueError if logits are not finite."""
        logits = logits.float().cpu()
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "the model's logits are not finite numbers: its training has diverged. Take an earlier checkpoint."
            )
        if self.greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        logits = (logits - logits.max()) / self.temperature
        order = logits.argsort(descending=True, stable=True)
        kept = order[: min(self.top_k or len(order), len(order))]
        probabilities = torch.softmax(logits[kept], 0)
        if self.top_p is not None:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return torch.zeros_like(logits).index_copy_(0, kept, probabilities / probabilities.sum())

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Sample a token id from logits [v]."""
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator).item())


class Decoder:
    """A model with a key-value cache, to which some sequences are fed piece by piece."""

    def __init__(self, chunks: Sequence[GPT], ctx: ParallelContext | None = None, schedule: Schedule | None = None) -> None:
        """chunks: the chunks of this rank, which calls together with the others; without `ctx`, one rank has the whole model."""
        self.chunks, self.ctx = chunks, ctx or ParallelContext.single()
        self.schedule = schedule or Schedule("1f1b", 1, 1, 1, backward=False)
        self.config = chunks[0].build.config
        self.capacity = self.config.position_rows
        self.caches: list[list[KeyValueCache]] = []
        """For each chunk: the cache of each of its layers."""
        self.length = 0
        """Number of tokens in the caches, for each sequence."""
        self.seen: list[int] = []
        """The tokens given to `logits` since the last restart."""

    def restart(self) -> None:
        """Empty the caches, for one new sequence."""
        self.caches, self.length, self.seen = (
            [[self._empty_cache(block) for block in c.stack.blocks] for c in self.chunks],
            0,
            [],
        )

    def go_back(self, length: int) -> None:
        """Drop all tokens after the first `length`, and all sequences but the first."""
        self.length = length
        self.select([0])

    def select(self, sequences: Sequence[int]) -> None:
        """Keep these sequences, in this order; one may appear several times."""
        for caches in self.caches:
            for cache in caches:
                cache.select(sequences, self.length)

    @torch.inference_mode()
    def feed(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        block_positions: torch.Tensor | None = None,
        prefix: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append tokens [s, b] at positions [s, b] and return the logits [b, v] of the token after the last, on every rank.

        prefix: [b] number of first tokens that all tokens see, if those are among `tokens`.
        """
        device = self.ctx.device
        batch = MicroBatch(
            tokens=tokens.to(device),
            labels=tokens.to(device),
            loss_weights=torch.zeros(tokens.shape, device=device),
            positions=positions.to(device),
            samples=torch.zeros(tokens.shape[1], dtype=torch.int64, device=device),
            mask=AttentionMask(prefix=prefix),
            block_positions=None if block_positions is None else block_positions.to(device),
        )
        (logits,) = run_schedule(self._stage(), self.schedule, [batch], scale=1.0).outputs
        self.length += len(tokens)
        if logits is None:  # they are another stage's
            logits = torch.zeros(tokens.shape[1], self.chunks[0].build.vocab_size, device=device)
        return self.ctx.pp.all_reduce(logits)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Append tokens (at least one) of a single sequence and return the logits [v] of the token after them.

        Where the text no longer fits into model.max_positions, the model goes on with its end, half of max_positions long.
        """
        capacity = self.config.positions
        if not self.caches or len(self.seen) + len(ids) > capacity:
            ids = [*self.seen, *ids]
            if len(ids) > capacity:
                ids = ids[-max(1, capacity // 2) :]
            self.restart()
        start = len(self.seen)
        self.seen += ids
        tokens = torch.tensor(ids, dtype=torch.int64)[:, None]
        return self.feed(tokens, torch.arange(start, start + len(ids))[:, None])[0]

    def _stage(self) -> Stage:
        """This rank's stage of the pipeline; the last stage puts out the logits of the last token of each sequence."""
        head = cast(Head, self.chunks[-1].head)

        def last_logits(hidden: torch.Tensor, _batch: MicroBatch) -> Loss:
            return Loss(hidden.new_zeros(()), output=head.logits(hidden[-1:])[0].float().contiguous())

        chunks = [_cached(chunk, caches) for chunk, caches in zip(self.chunks, self.caches, strict=True)]
        return Stage(self.ctx, chunks, last_logits, self.chunks[0].boundary)

    def _empty_cache(self, block: Block) -> KeyValueCache:
        build = self.chunks[0].build
        heads, width = block.attention.cache_shape
        return KeyValueCache(1, heads, self.capacity, width, build.dtype, build.device)


def _cached(chunk: GPT, caches: Sequence[KeyValueCache]) -> Chunk:
    def forward(hidden: torch.Tensor | None, batch: MicroBatch, _sums: Executed, _postponed: Postponed | None) -> torch.Tensor:
        return chunk(hidden, batch, caches)

    return forward


def continuation(
    decoder: Decoder, prompt: Sequence[int], max_tokens: int, sampling: Sampling, seed: int, ends: Collection[int] = ()
) -> Iterator[int]:
    """Sample the tokens that follow `prompt` (at least one token), one by one; stops before a token of `ends`. The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    new = list(prompt)
    for _ in range(max_tokens):
        token = sampling.draw(decoder.logits(new), generator)
        if token in ends:
            return
        yield token
        new = [token]


def best_continuation(
    decoder: Decoder, prompt: Sequence[int], max_tokens: int, beams: Beams, ends: Collection[int] = ()
) -> Sequence[int]:
    """The tokens that follow `prompt`, found by beam search, without a final token of `ends`. The same on every rank.

    Raises ValueError where prompt and tokens are more than model.max_positions: beam search cannot drop the start of the text.
    """
    room = decoder.config.positions - len(prompt)
    if max_tokens > room:
        advice = (
            f"Use --max-tokens {room}, or a shorter prompt"
            if room > 0
            else f"Use a prompt of {decoder.config.positions - 1} tokens at most, or --greedy, which goes on with the end of a long one"
        )
        raise ValueError(
            f"beam search of {max_tokens} tokens after a prompt of {len(prompt)} needs a model.max_positions of their sum, and it is "
            f"{decoder.config.positions}. {advice}."
        )
    first = decoder.logits(prompt)

    def step(parents: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        decoder.select(parents)
        row = torch.tensor([list(tokens)])
        return decoder.feed(row, torch.full_like(row, decoder.length))

    found = beam_search(first, step, ends, max_tokens, beams)
    return found.tokens[:-1] if found.ended else found.tokens


@dataclass(frozen=True)
class Beams:
    """Settings of beam search: the most probable texts are continued side by side (Sutskever et al., arXiv:1409.3215, section 3.2)."""

    count: int = 1
    """Number of beams; 1 is greedy decoding."""
    length_penalty: float = 0.0
    """alpha: the log-probability of n tokens is divided by ((5 + n) / 6)^alpha (arXiv:1609.08144, section 7); 0 is no penalty."""

    def score(self, log_probability: float, tokens: int) -> float:
        """The score that texts are ranked by: log-probability of a text of `tokens` tokens, with the length penalty."""
        return float(log_probability / ((5 + tokens) / 6) ** self.length_penalty)


Step = Callable[[Sequence[int], Sequence[int]], torch.Tensor]
"""(numbers of the sequences to keep, the next token of each) -> logits [b, v] of the token after it."""


@dataclass(frozen=True)
class Hypothesis:
    """A text with its log-probability."""

    tokens: tuple[int, ...]
    log_probability: float
    ended: bool
    """Whether its last token is an end token."""


def beam_search(first: torch.Tensor, step: Step, ends: Collection[int], max_tokens: int, beams: Beams) -> Hypothesis:
    """The best text found of at most `max_tokens` tokens, with its end token if it has ended; texts that have not ended compete too.

    first: logits [v] of the first token. Stops as soon as no text still growing can score better than `count` ended ones.
    """
    alive = [Hypothesis((), 0.0, False)]
    ended: list[Hypothesis] = []
    logits = first[None]
    while alive and len(alive[0].tokens) < max_tokens:
        steps = torch.log_softmax(logits.double().cpu(), -1)
        totals = steps + torch.tensor([h.log_probability for h in alive], dtype=torch.float64)[:, None]
        size = totals.shape[1]
        values, places = totals.flatten().topk(min(totals.numel(), beams.count * (1 + len(ends))))
        parents: list[int] = []
        found: list[Hypothesis] = []
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            parent, token = divmod(place, size)
            made = Hypothesis((*alive[parent].tokens, token), value, token in ends)
            if made.ended:
                ended.append(made)
            elif len(found) < beams.count:
                found.append(made)
                parents.append(parent)
        alive = found
        ended = sorted(ended, key=lambda h: -beams.score(h.log_probability, len(h.tokens)))[: beams.count]
        if _settled(alive, ended, max_tokens, beams):
            break
        if alive and len(alive[0].tokens) < max_tokens:
            logits = step(parents, [h.tokens[-1] for h in alive])
    return max([*ended, *alive], key=lambda h: beams.score(h.log_probability, len(h.tokens)))


def _settled(alive: Sequence[Hypothesis], ended: Sequence[Hypothesis], max_tokens: int, beams: Beams) -> bool:
    """Whether no text still growing can score better than those that have ended."""
    if not alive or len(ended) < beams.count:
        return False
    worst = beams.score(ended[-1].log_probability, len(ended[-1].tokens))
    # Log-probabilities only fall. The length penalty is extremal at the lengths now and at the end.
    best = max(max(beams.score(h.log_probability, n) for n in (len(h.tokens), max_tokens)) for h in alive)
    return best <= worst
