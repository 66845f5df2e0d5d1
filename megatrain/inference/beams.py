"""Beam search over the engine: the most probable texts are continued side by side (Sutskever et al., arXiv:1409.3215, section 3.2).

Each round asks for one more token of every text that grows. What the texts have in common lies in the engine's cache of prefixes, so a
round reads the tokens of a block at most, and other requests go on between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace

from megatrain.inference.engine import Engine
from megatrain.inference.requests import Answer, Request


@dataclass(frozen=True)
class Beams:
    """Settings of beam search."""

    count: int = 1
    """Number of beams; 1 is greedy decoding."""
    length_penalty: float = 0.0
    """alpha: the log-probability of n tokens is divided by ((5 + n) / 6)^alpha (arXiv:1609.08144, section 7); 0 is no penalty."""

    def score(self, log_probability: float, tokens: int) -> float:
        """The score that texts are ranked by: log-probability of a text of `tokens` tokens, with the length penalty."""
        return float(log_probability / ((5 + tokens) / 6) ** self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A text with its log-probability."""

    tokens: tuple[int, ...]
    log_probability: float
    ended: bool
    """Whether its last token is an end token."""

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """Its tokens without the end token."""
        return self.tokens[:-1] if self.ended else self.tokens


Texts = Sequence[tuple[int, ...]]
Next = Sequence[Sequence[tuple[int, float]]]
"""For each text: (token, log-probability) of the most probable tokens after it, as many as `width` says."""
Rounds = Generator[Texts, Next, Hypothesis]
"""Gives the texts to be continued, takes what may follow them, and returns the best text."""


def width(ends: Collection[int], beams: Beams) -> int:
    """Number of most probable tokens to be known of each text: so many of all can matter."""
    return beams.count * (1 + len(ends))


def beam_search(ends: Collection[int], max_tokens: int, beams: Beams) -> Rounds:
    """The best text found of at most `max_tokens` tokens, with its end token if it has ended; texts that have not ended compete too.

    Stops as soon as no text still growing can score better than `count` ended ones.
    """
    alive = [Hypothesis((), 0.0, False)]
    ended: list[Hypothesis] = []
    while alive and len(alive[0].tokens) < max_tokens and not _settled(alive, ended, max_tokens, beams):
        following = yield [h.tokens for h in alive]
        made = [
            Hypothesis((*h.tokens, token), h.log_probability + logprob, token in ends)
            for h, options in zip(alive, following, strict=True)
            for token, logprob in options
        ]
        made = sorted(made, key=lambda h: -h.log_probability)[: width(ends, beams)]
        alive = [h for h in made if not h.ended][: beams.count]
        ended += [h for h in made if h.ended]
        ended = sorted(ended, key=lambda h: -beams.score(h.log_probability, len(h.tokens)))[: beams.count]
    return max([*ended, *alive], key=lambda h: beams.score(h.log_probability, len(h.tokens)))


def _settled(alive: Sequence[Hypothesis], ended: Sequence[Hypothesis], max_tokens: int, beams: Beams) -> bool:
    """Whether no text still growing can score better than those that have ended."""
    if len(ended) < beams.count:
        return False
    worst = beams.score(ended[-1].log_probability, len(ended[-1].tokens))
    # Log-probabilities only fall. The length penalty is extremal at the lengths now and at the end.
    best = max(max(beams.score(h.log_probability, n) for n in (len(h.tokens), max_tokens)) for h in alive)
    return best <= worst


def searched(rounds: Rounds, ask: Callable[[Texts], Next]) -> Hypothesis:
    """The result of a search whose rounds are answered by `ask`."""
    try:
        texts = next(rounds)
        while True:
            texts = rounds.send(ask(texts))
    except StopIteration as result:
        return result.value


def questions(request: Request, texts: Texts, beams: Beams, vocab_size: int) -> list[Request]:
    """The requests of one round: a token after each of the texts, which follow the prompt of `request`."""
    one = replace(request, max_tokens=1, ends=frozenset(), stops=(), text=False, score_from=None)
    one = replace(one, sampling=replace(request.sampling, greedy=True), top=min(width(request.ends, beams), vocab_size))
    return [replace(one, tokens=(*request.tokens, *text)) for text in texts]


def following(answers: Sequence[Answer]) -> Next:
    """The tokens that may follow each text, from the answers to a round's requests."""
    return [answer.tokens[0].top for answer in answers]


def require_room(request: Request, positions: int) -> None:
    """Raise ValueError where prompt and tokens are more than model.max_positions: beam search cannot drop the start of the text."""
    length, room = len(request.tokens), positions - len(request.tokens)
    if request.max_tokens > room:
        advice = (
            f"Use --max-tokens {room}, or a shorter prompt"
            if room > 0
            else f"Use a prompt of {positions - 1} tokens at most, or --greedy, which goes on with the end of a long one"
        )
        raise ValueError(
            f"beam search of {request.max_tokens} tokens after a prompt of {length} needs a model.max_positions of their sum, and it is "
            f"{positions}. {advice}."
        )


def best_continuation(engine: Engine, request: Request, beams: Beams) -> Hypothesis:
    """The continuation of a request's prompt that beam search finds (collective). Raises ValueError where it does not fit the positions."""
    require_room(request, engine.max_length)
    beams = replace(beams, count=min(beams.count, engine.vocab_size))
    rounds = beam_search(request.ends, request.max_tokens, beams)
    return searched(rounds, lambda texts: following(engine.run(questions(request, texts, beams, engine.vocab_size))))
