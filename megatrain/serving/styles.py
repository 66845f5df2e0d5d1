"""How one choice looks, whole and in parts of a stream: in a chat and in a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

from megatrain.inference.requests import Answer, Scored
from megatrain.serving.bodies import ChatBody, CompletionBody
from megatrain.serving.orders import PromptOrder
from megatrain.serving.replica import AnswerPart
from megatrain.serving.replies import TextLogprobs, chat_logprobs
from megatrain.serving.served import Served
from megatrain.serving.token_texts import Offsets


@dataclass
class AnswerChoice:
    """One choice as far as it has come."""

    tokens: list[Scored] = field(default_factory=list)
    text: str = ""
    answer: Answer | None = None

    def add(self, part: AnswerPart) -> None:
        """Add what has come."""
        self.tokens += part.tokens
        self.text += part.text
        self.answer = part.answer


class Style(Protocol):
    """The shape of choices."""

    kind: str
    shows_tokens: bool
    """Whether tokens without text are shown too."""

    def begin(self, place: int, scored: Answer | None) -> dict[str, Any] | None:
        """The first part of a stream of the choice at a place; scored: its prompt, where that was asked for."""

    def part(self, place: int, tokens: Sequence[Scored], text: str, answer: Answer | None) -> dict[str, Any]:
        """A part of a stream."""

    def whole(self, place: int, choice: AnswerChoice) -> dict[str, Any]:
        """The choice at a place, that has ended."""

    def beside(self) -> dict[str, Any]:
        """Fields beside the choices."""


class ChatStyle:
    """Choices of a chat."""

    kind = "chat.completion"

    def __init__(self, body: ChatBody, order: PromptOrder, served: Served) -> None:
        self._body, self._order, self._served = body, order, served
        self.shows_tokens = body.logprobs or body.return_token_ids
        self._leading = [served.chat.leading] * len(order.requests)

    def begin(self, place: int, _scored: Answer | None) -> dict[str, Any] | None:
        """The role."""
        return self._shape(place, {"delta": {"role": "assistant", "content": ""}}, (), None)

    def part(self, place: int, tokens: Sequence[Scored], text: str, answer: Answer | None) -> dict[str, Any]:
        """Some text."""
        text = self._without_leading(place, text)
        return self._shape(place, {"delta": {"content": text} if text or answer is None else {}}, tokens, answer)

    def whole(self, place: int, choice: AnswerChoice) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": self._without_leading(place, choice.text), "refusal": None}
        return self._shape(place, {"message": message}, choice.tokens, choice.answer)

    def beside(self) -> dict[str, Any]:
        """The prompt's tokens, where they were asked for."""
        return {"prompt_token_ids": list(self._order.requests[0].tokens)} if self._body.return_token_ids else {}

    def _without_leading(self, place: int, text: str) -> str:
        """The text without what the model writes before an answer, of which parts may come one by one."""
        leading = self._leading[place]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(leading, text, strict=False)))
        self._leading[place] = leading[shared:] if shared == len(text) else ""
        return text[shared:]

    def _shape(self, place: int, content: dict[str, Any], tokens: Sequence[Scored], answer: Answer | None) -> dict[str, Any]:
        shown = chat_logprobs(tokens, self._served.texts) if self._body.logprobs and (tokens or answer) else None
        return {"index": place, **content, "logprobs": shown, **_ending(answer), **_ids(self._body, tokens)}


class TextStyle:
    """Choices of a completion."""

    kind = "text_completion"

    def __init__(self, body: CompletionBody, order: PromptOrder, served: Served) -> None:
        self._body, self._order = body, order
        self.shows_tokens = body.logprobs is not None or body.return_token_ids
        top = body.logprobs or 0
        self._logprobs = [TextLogprobs(served.texts, top, Offsets()) for _ in order.requests]

    def begin(self, place: int, scored: Answer | None) -> dict[str, Any] | None:
        """The prompt, where it is echoed."""
        if not self._body.echo:
            return None
        return self._shape(place, self._echoed(place), self._prompt_logprobs(place, scored), (), None)

    def part(self, place: int, tokens: Sequence[Scored], text: str, answer: Answer | None) -> dict[str, Any]:
        """Some text."""
        shown = None if self._body.logprobs is None else self._logprobs[place].of(tokens)
        return self._shape(place, text, shown, tokens, answer)

    def whole(self, place: int, choice: AnswerChoice) -> dict[str, Any]:
        """The text, behind the prompt where that is echoed."""
        if self._body.echo:
            shown = self._prompt_logprobs(place, choice.answer, choice.tokens)
            return self._shape(place, self._echoed(place) + choice.text, shown, choice.tokens, choice.answer)
        return self.part(place, choice.tokens, choice.text, choice.answer)

    def beside(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _echoed(self, place: int) -> str:
        return self._order.prompts[place // self._order.n]

    def _prompt_logprobs(self, place: int, scored: Answer | None, tokens: Sequence[Scored] = ()) -> dict[str, Any] | None:
        """Log-probabilities of a prompt, whose first token has none, and of tokens behind it."""
        if self._body.logprobs is None or scored is None:
            return None
        return self._logprobs[place].of([*scored.prompt, *tokens], self._order.requests[place].tokens[:1])

    def _shape(
        self, place: int, text: str, shown: dict[str, Any] | None, tokens: Sequence[Scored], answer: Answer | None
    ) -> dict[str, Any]:
        request = self._order.requests[place]
        ids = _ids(self._body, tokens)
        if ids and answer is not None:
            ids["prompt_token_ids"] = list(request.tokens)
        return {"index": place, "text": text, "logprobs": shown, **_ending(answer), **ids}


def _ending(answer: Answer | None) -> dict[str, Any]:
    """Why a choice ended, and at which stop string or token."""
    if answer is None:
        return {"finish_reason": None}
    return {"finish_reason": answer.finish, "stop_reason": answer.stop}


def _ids(body: ChatBody | CompletionBody, tokens: Sequence[Scored]) -> dict[str, Any]:
    return {"token_ids": [each.token for each in tokens]} if body.return_token_ids else {}
