"""Questions to the engine and its answers: `Request`, `Sampling`, `Scored`, `StepUpdate`, `Answer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatrain.inference.text_places import LEFT_TO_RIGHT, TextPlaces

Finish = Literal["stop", "length"]
"""Why an answer ended: with an end token or a stop string, or because there is no room for more tokens."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits: bias, penalties, temperature, then top-k, top-p and min-p. Raises ValueError."""

    greedy: bool = False
    """Take the most probable token, after bias and penalties; temperature, top_k, top_p and min_p are then ignored."""
    temperature: float = 1.0
    """The logits are divided by it; above 0."""
    top_k: int | None = None
    """Sample among the k most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest most probable tokens whose probabilities sum to this (nucleus sampling, arXiv:1904.09751)."""
    min_p: float | None = None
    """Sample among the tokens that are at least this times as probable as the most probable one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and answer are divided by it where positive, multiplied where negative (arXiv:1909.05858, section 4.1)."""
    presence_penalty: float = 0.0
    """Is subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Is subtracted from a token's logit for each time that the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    never: tuple[int, ...] = ()
    """Tokens that the model cannot say: they are not in the distribution that probabilities are of."""

    def __post_init__(self) -> None:
        within = {
            "temperature": (self.temperature, self.temperature > 0, "a number above 0; greedy for the most probable token"),
            "top_k": (self.top_k, self.top_k is None or self.top_k >= 1, "a number from 1 on"),
            "top_p": (self.top_p, self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1"),
            "min_p": (self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty, self.repetition_penalty > 0, "a number above 0; 1 is none"),
        }
        for name, (value, right, advice) in within.items():
            if not right or not math.isfinite(value or 0):
                raise ValueError(f"{name}={value} cannot be: use {advice}.")
        numbers = [self.presence_penalty, self.frequency_penalty, *(bias for _, bias in self.logit_bias)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("presence_penalty, frequency_penalty and logit_bias are finite numbers.")

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far matter."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Request:
    """A prompt to be continued, or only to be scored."""

    tokens: tuple[int, ...]
    """The prompt: at least one token."""
    max_tokens: int = 16
    """Number of new tokens at most; 0: the prompt's tokens are scored and nothing is added."""
    sampling: Sampling = Sampling()
    seed: int = 0
    """Token n of the answer is drawn from (seed, n): it does not depend on other requests."""
    first_draw: int = 0
    """n of the answer's first token: of a text that goes on where another answer ended."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer and are no part of it."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer; the first is where its text is cut."""
    text: bool = False
    """Whether updates and answers come with text; they do where there are `stops`."""
    top: int | None = None
    """Number of most probable tokens to be told at each place; None: none."""
    score_from: int | None = None
    """First of the prompt's tokens to be scored, from 1 on; None: none are."""
    places: TextPlaces = LEFT_TO_RIGHT
    """Positions of the tokens."""

    @property
    def fed(self) -> int:
        """Number of prompt tokens that the model reads: the last one is only scored where nothing follows, but one is always read."""
        return max(1, len(self.tokens) - (self.max_tokens == 0))


@dataclass(frozen=True)
class Scored:
    """A token with its probability, before bias, penalties, temperature and cuts."""

    token: int
    logprob: float
    """Natural logarithm of its probability."""
    greedy: bool
    """Whether no token is more probable."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the most probable ones, as many as were asked for."""


@dataclass(frozen=True)
class StepUpdate:
    """The tokens that one step has added to an answer."""

    number: int
    """The number that `Engine.add` gave the request."""
    tokens: tuple[Scored, ...]
    text: str
    """Text that is certain now, to be shown after that of earlier updates; empty where no text was asked for."""
    finish: Finish | None
    """Set in the last update of a request."""


@dataclass(frozen=True)
class Answer:
    """All that a request has led to."""

    tokens: tuple[Scored, ...]
    """The new tokens, without an end token; of a stop string those that it was read from are among them."""
    text: str
    finish: Finish
    stop: int | str | None
    """The end token or the stop string that ended it, if one did."""
    prompt: tuple[Scored, ...]
    """The prompt's tokens from `score_from` on."""
    cached_tokens: int
    """Number of prompt tokens whose keys and values were there already."""
