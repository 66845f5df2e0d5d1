"""The model that is served: what requests to it need to know, and how texts and conversations become prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatrain.chat.conversation import ChatMessage
from megatrain.data.tokenizer import Tokenizer, prompt_ids
from megatrain.inference.requests import Request
from megatrain.inference.text_places import TextPlaces
from megatrain.serving.bodies import Prompt
from megatrain.serving.refusal import Refusal
from megatrain.serving.token_texts import TokenTexts


class Conversing(Protocol):
    """How a model wants a conversation."""

    ends: frozenset[int]
    """Tokens that end an answer."""
    stops: tuple[str, ...]
    """Texts that end an answer."""
    leading: str
    """Text that a model writes before an answer, and is no part of it."""

    def tokens(
        self, messages: Sequence[ChatMessage], continue_final_message: bool, variables: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """The prompt of a conversation. Raises ValueError where the template refuses it; called from several threads."""


@dataclass(frozen=True)
class Served:
    """A model, its tokenizer and how it wants prompts."""

    name: str
    codec: Tokenizer
    max_length: int
    """Positions of the model."""
    vocab_size: int
    places: Callable[[Sequence[int]], TextPlaces]
    """Positions of a prompt's tokens."""
    closed: Callable[[Sequence[int]], Sequence[int]]
    """A text's tokens as a prompt, with the marks behind it that the model answers to."""
    conversing: Conversing | str
    """How it wants a conversation; or why it has no chat template, and what to do."""
    infill: Callable[[str, str | None, Request], Request] | None
    """(prompt, what follows the blank, a request) -> the request with the prompt, for a model that fills blanks; raises ValueError."""
    attention: str
    """How attention is computed."""
    source: str
    layout: str
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    def require_model(self, asked: str | None) -> None:
        """Raise Refusal where another model is asked for."""
        if asked is not None and asked != self.name:
            raise Refusal(
                f"there is no model {asked[:80]!r} here; this server has {self.name!r}.",
                "model",
                status=404,
                code="model_not_found",
            )

    def ends(self, chat: bool) -> frozenset[int]:
        """Tokens that end a text, or an answer in a chat."""
        return self.chat.ends if chat else frozenset(self.codec.ending.stops)

    def encode(self, prompt: Prompt, opening: bool = True) -> tuple[int, ...]:
        """The tokens of a prompt; opening: whether those that begin and close a prompt are put. Raises Refusal for an empty prompt."""
        if not isinstance(prompt, str):
            return prompt
        encoded = self.codec.encode(prompt)
        ids = tuple(self.closed(prompt_ids(self.codec, encoded)) if opening else encoded)
        if not ids:
            raise Refusal('prompt is empty, and no token of the tokenizer is known to begin a text. Try "Hello".', "prompt")
        return ids

    @property
    def chat(self) -> Conversing:
        """How the model wants a conversation. Raises Refusal."""
        if isinstance(self.conversing, str):
            raise Refusal(f"{self.conversing} Or use /v1/completions.", "messages", code="no_chat_template")
        return self.conversing

    def converse(
        self, messages: Sequence[ChatMessage], continue_final_message: bool, variables: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """The tokens of a conversation. Raises Refusal."""
        chat = self.chat
        try:
            return chat.tokens(messages, continue_final_message, variables or {})
        except ValueError as error:
            raise Refusal(f"the chat template cannot take these messages: {error}", "messages", code="invalid_value") from None

    def require_fits(self, tokens: Sequence[int], max_tokens: int | None, param: str) -> int:
        """Number of new tokens, if the prompt leaves room for them. Raises Refusal with the numbers."""
        length, most = len(tokens), self.max_length
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise Refusal(f"{param} has the token {wrong}, and the model's vocabulary has {self.vocab_size} tokens.", param)
        if length > most - (max_tokens != 0):
            raise Refusal(
                f"the prompt has {length} tokens, and the model's context has room for {most}, the answer included. Use a shorter prompt.",
                param,
                code="context_length_exceeded",
            )
        if max_tokens is not None and length + max_tokens > most:
            raise Refusal(
                f"the prompt has {length} tokens, and with max_tokens={max_tokens} that makes {length + max_tokens}; the model's context "
                f"has room for {most}. Use max_tokens={most - length} or fewer.",
                "max_tokens",
                code="context_length_exceeded",
            )
        return most - length if max_tokens is None else max_tokens
