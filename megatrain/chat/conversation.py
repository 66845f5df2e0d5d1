"""A conversation: messages, each with a role and a text, checked before any template sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.files import OneLine

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, "developer", USER, ASSISTANT, "tool", "observation")
"""Roles that templates of models know; each template takes some of them."""


class ChatError(OneLine, ValueError):
    """A conversation that cannot be put to a model, or a template that cannot be used; the message says what to do."""


class RefusedByTemplateError(ChatError):
    """A conversation that a chat template says it cannot write."""


@dataclass(frozen=True)
class ChatMessage:
    """A part of a conversation that one side has said."""

    role: str
    content: str


def conversation_of(values: object) -> tuple[ChatMessage, ...]:
    """The messages of a JSON value, a list of {"role": ..., "content": ...}; content is a text, or a list of {"type": "text", "text": ...}.

    Raises ChatError that names the message by its place.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ChatError(f'messages is {_kind(values)}. Give a list: [{{"role": "user", "content": "Hello"}}].')
    if not values:
        raise ChatError('messages is empty. Give at least one: [{"role": "user", "content": "Hello"}].')
    return tuple(_message(number, value) for number, value in enumerate(values))


def require_turns(messages: Sequence[ChatMessage], continued: bool) -> None:
    """Raise ChatError if there is nothing to answer, or, with `continued`, nothing to go on with."""
    if not messages:
        raise ChatError('messages is empty. Give at least one: [{"role": "user", "content": "Hello"}].')
    last = messages[-1].role
    if continued and last != ASSISTANT:
        raise ChatError(f"continue_final_message goes on with an answer, and the last message is of role {last}. Leave it out.")
    if not continued and last == ASSISTANT:
        raise ChatError(
            "the last message is the assistant's, so there is nothing to answer. End with a message of role user, or go on with "
            "that answer: continue_final_message."
        )


def _message(number: int, value: object) -> ChatMessage:
    where = f"messages[{number}]"
    if not isinstance(value, Mapping):
        raise ChatError(f'{where} is {_kind(value)}. Give an object: {{"role": "user", "content": "Hello"}}.')
    role = value.get("role")
    if role not in ROLES:
        said = "has no role" if role is None else f"has the role {role!r}"
        raise ChatError(f"{where} {said}. Roles are {', '.join(ROLES)}.")
    others = sorted(str(key) for key, given in value.items() if key not in ("role", "content") and given is not None)
    if others:
        raise ChatError(f"{where} has {others[0]!r}, which is not supported: a message has a role and a content. Leave it out.")
    text = _text(where, value.get("content"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(f"{where}.content is no text of Unicode: {text[error.start]!a} is half of a character.") from None
    return ChatMessage(str(role), text)


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        said = "has no content" if content is None else f"has a content that is {_kind(content)}"
        raise ChatError(f'{where} {said}. Give a text: "content": "Hello".')
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
        if not isinstance(text, str):
            raise ChatError(
                f'{where}.content[{number}] is {kind!r}, and only texts are understood: {{"type": "text", "text": "Hello"}}.'
            )
        texts.append(text)
    return "\n".join(texts)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")
