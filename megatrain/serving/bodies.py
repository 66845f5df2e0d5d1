"""The fields of each kind of request: OpenAI's names, and vLLM's for what OpenAI has not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from megatrain.chat.conversation import ChatError, ChatMessage, conversation_of
from megatrain.serving.fields import (
    Unsupported,
    bias,
    given,
    ids,
    number,
    one_of,
    options,
    proper,
    several,
    shown_value,
    stops,
    switch,
    text,
    wanted,
    whole,
)
from megatrain.serving.refusal import Refusal

MOST_CHARACTERS, MOST_IDS = 1 << 26, 1 << 22
"""Bounds of what is looked at; the limit of a body's bytes and the model's context are tighter."""
MOST_PROMPTS, MOST_CHOICES, MOST_TOP = 256, 64, 20
_SEEDS = 1 << 63
Prompt: TypeAlias = "str | tuple[int, ...]"


def prompts(key: str, value: Any) -> tuple[Prompt, ...]:
    """A text, a list of ids, or a list of either."""
    if isinstance(value, str):
        return (text(MOST_CHARACTERS)(key, value),)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        found: tuple[Prompt, ...] = several(text(MOST_CHARACTERS), MOST_PROMPTS, ["Hello"], 1)(key, value)
        return found
    if isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        return tuple(several(ids(MOST_IDS, 1), MOST_PROMPTS, [[1, 2]], 1)(key, value))
    if isinstance(value, list) and value and type(value[0]) is int:
        return (ids(MOST_IDS, 1)(key, value),)
    raise Refusal(
        f'{key}: {shown_value(value)} is no text, list of token ids, or list of either. Try "Hello".', key, code="invalid_value"
    )


def messages(key: str, value: Any) -> tuple[ChatMessage, ...]:
    """Messages with a role and a text each, one at least."""
    try:
        found = conversation_of(value)
    except ChatError as error:
        raise Refusal(str(error), key, code="invalid_value") from None
    for place, message in enumerate(found):
        proper(f"{key}[{place}].content", message.content)
    return found


def variables(key: str, value: Any) -> dict[str, Any]:
    """An object of variables that a chat template reads."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise Refusal(
            f'{key}: {shown_value(value)} is no object of names. Try {{"enable_thinking": false}}.', key, code="invalid_value"
        )
    return value


@dataclass(frozen=True)
class Decoding:
    """The fields that completions and chats have in common."""

    model: str | None = given(text(1000))
    max_tokens: int | None = given(whole(0, MOST_IDS, 100))
    n: int = given(whole(1, MOST_CHOICES, 1), 1)
    seed: int | None = given(whole(-_SEEDS, _SEEDS - 1, 1))
    stop: tuple[str, ...] = given(stops, ())
    stop_token_ids: tuple[int, ...] = given(ids(64), ())
    stream: bool = given(switch, False)
    stream_options: dict[str, Any] | None = given(options(include_usage=switch))
    temperature: float = given(number(0, 2, 0.7), 1.0)
    top_p: float = given(number(0, 1, 0.9, above=True), 1.0)
    top_k: int = given(whole(-1, MOST_IDS, 50), 0)
    min_p: float = given(number(0, 1, 0.05), 0.0)
    presence_penalty: float = given(number(-2, 2, 0.5), 0.0)
    frequency_penalty: float = given(number(-2, 2, 0.5), 0.0)
    repetition_penalty: float = given(number(0, 10, 1.1, above=True), 1.0)
    logit_bias: tuple[tuple[int, float], ...] = given(bias, ())
    ignore_eos: bool = given(switch, False)
    return_token_ids: bool = given(switch, False)
    user: str | None = given(text(1000))

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


@dataclass(frozen=True, kw_only=True)
class CompletionBody(Decoding):
    """POST /v1/completions."""

    prompt: tuple[Prompt, ...] = wanted(prompts)
    echo: bool = given(switch, False)
    logprobs: int | None = given(whole(0, MOST_TOP, 1))
    suffix: str | None = given(text(MOST_CHARACTERS))
    add_special_tokens: bool = given(switch, True)


@dataclass(frozen=True, kw_only=True)
class ChatBody(Decoding):
    """POST /v1/chat/completions."""

    messages: tuple[ChatMessage, ...] = wanted(messages)
    max_completion_tokens: int | None = given(whole(1, MOST_IDS, 100))
    logprobs: bool = given(switch, False)
    top_logprobs: int = given(whole(0, MOST_TOP, 5), 0)
    continue_final_message: bool = given(switch, False)
    response_format: dict[str, Any] | None = given(options(type=one_of("text")))
    chat_template_kwargs: dict[str, Any] | None = given(variables)


@dataclass(frozen=True)
class TokenizeBody:
    """POST /tokenize."""

    model: str | None = given(text(1000))
    prompt: str | None = given(text(MOST_CHARACTERS))
    messages: tuple[ChatMessage, ...] | None = given(messages)
    add_special_tokens: bool = given(switch, True)
    continue_final_message: bool = given(switch, False)
    return_token_strs: bool = given(switch, False)


@dataclass(frozen=True)
class DetokenizeBody:
    """POST /detokenize."""

    tokens: tuple[int, ...] = wanted(ids(MOST_IDS))
    model: str | None = given(text(1000))


@dataclass(frozen=True)
class FeedbackBody:
    """POST /feedback: a thumb of the chat page."""

    messages: tuple[ChatMessage, ...] = wanted(messages)
    answer: str = wanted(text(MOST_CHARACTERS))
    rating: str = wanted(one_of("up", "down"))
    request: str | None = given(text(100))
    model: str | None = given(text(1000))


_TOOLS = "the model's text is all there is; tool calls need a server that parses them (vLLM, SGLang)."
_ONE_TEXT = "answers are texts."
UNSUPPORTED = {
    "best_of": Unsupported("ask for n choices with logprobs and take the best.", (1,)),
    "use_beam_search": Unsupported("use `megatrain generate --beams 4`.", (False,)),
    "prompt_logprobs": Unsupported("use /v1/completions with echo, logprobs and max_tokens 0.", (False,)),
    "min_tokens": Unsupported("use ignore_eos with max_tokens, or a logit_bias on the end token.", (0,)),
    "priority": Unsupported("requests are answered in the order of their arrival.", (0,)),
    "metadata": Unsupported("nothing is kept of a request.", ({},)),
    "store": Unsupported("nothing is kept of a request.", (False,)),
    "service_tier": Unsupported("there is one.", ("auto", "default")),
    "add_generation_prompt": Unsupported(
        "an answer is what is asked for; to go on with one use continue_final_message.", (True,)
    ),
}
"""Fields of any kind of request."""
UNSUPPORTED_CHAT = {
    **UNSUPPORTED,
    "tools": Unsupported(_TOOLS, ([],)),
    "tool_choice": Unsupported(_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Unsupported(_TOOLS, (True, False)),
    "functions": Unsupported(_TOOLS, ([],)),
    "function_call": Unsupported(_TOOLS, ("none", "auto")),
    "modalities": Unsupported(_ONE_TEXT, (["text"],)),
    "audio": Unsupported(_ONE_TEXT),
    "prediction": Unsupported("the answer is decoded token by token."),
    "reasoning_effort": Unsupported("say it in the system message, as the model's template has it.", ("none",)),
    "verbosity": Unsupported("say it in the system message.", ("medium",)),
    "web_search_options": Unsupported("there is no search."),
    "chat_template": Unsupported("the model's own template is used, or that of --chat-template."),
    "echo": Unsupported("use /v1/completions.", (False,)),
}
