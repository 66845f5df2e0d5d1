"""A model's chat template as tasks use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.chat.conversation import ChatMessage
from megatrain.chat.templates import Chat, open_chat
from megatrain.inference.opening import Opened


@dataclass(frozen=True)
class TemplateFormat:
    """A chat template as tasks use it."""

    chat: Chat

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.chat.ends

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return self.chat.stops

    def prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) turns, up to where the assistant's answer begins."""
        return self.chat.written([ChatMessage(role, content) for role, content in messages])

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of such a text."""
        return self.chat.encode(text)


def chat_of(model: Opened, choice: str | None = None) -> TemplateFormat:
    """The chat template of a model, or the one that is named. Raises ChatError."""
    return TemplateFormat(open_chat(model.codec, model.tokenizer_folders, choice, model.named_ids))
