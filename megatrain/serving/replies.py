"""Answers in the shape that OpenAI's clients read: whole, and as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.inference.requests import Scored
from megatrain.serving.token_texts import Offsets, TokenTexts

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, all its choices together; a prompt counts once."""

    prompt: int
    answers: int
    cached: int = 0

    def shape(self) -> dict[str, Any]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answers,
            "total_tokens": self.prompt + self.answers,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class ReplyHead:
    """The fields with which every answer and every chunk of one begins."""

    kind: str
    """"chat.completion" or "text_completion"."""
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, kind: str, model: str) -> ReplyHead:
        """The head of a new answer."""
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        return cls(kind, model, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
        """An answer."""
        return {**self._shape(self.kind), "choices": list(choices), "usage": usage.shape()}

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None, with_usage: bool) -> dict[str, Any]:
        """A part of one. with_usage: whether the client asked for a count of tokens, so that all chunks have the field."""
        kind = self.kind + ".chunk" * (self.kind == "chat.completion")
        return {**self._shape(kind), "choices": list(choices), **({"usage": usage} if with_usage else {})}

    def _shape(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def chat_logprobs(tokens: Iterable[Scored], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities as chats have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = texts.of(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}

    content = [{**entry(each.token, each.logprob), "top_logprobs": [entry(*one) for one in each.top]} for each in tokens]
    return {"content": content, "refusal": None}


@dataclass
class TextLogprobs:
    """Log-probabilities as completions have them, of one choice."""

    texts: TokenTexts
    top: int
    """Number of most probable tokens that are shown."""
    offsets: Offsets

    def of(self, tokens: Sequence[Scored], first: Sequence[int] = ()) -> dict[str, Any]:
        """Add the next tokens; first: tokens before them without a log-probability, as a text's first has none."""
        spelled = [self.texts.of(token) for token in [*first, *(each.token for each in tokens)]]
        nothing: list[None] = [None] * len(first)
        tops = [{self.texts.name(token): max(value, LEAST_LOGPROB) for token, value in each.top} for each in tokens]
        return {
            "tokens": [text for text, _ in spelled],
            "token_logprobs": [*nothing, *(max(each.logprob, LEAST_LOGPROB) for each in tokens)],
            "top_logprobs": [*nothing, *tops] if self.top else None,
            "text_offset": self.offsets.of(raw for _, raw in spelled),
        }
