"""A model's way of conversing: its chat template and its tokenizer, which together make token ids of a conversation.

    chat = open_chat(codec, folder)                        # the model's own template, or an error that says how to choose one
    prompt = chat.prompt(conversation_of(messages))        # prompt.tokens for the engine, prompt.text to look at
    Request(prompt.tokens, ends=chat.ends, stops=chat.stops)

What people have written never becomes a special token (marks.py). A base model has no template, and none is guessed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatrain.chat.built_in import BUILT_IN, BuiltIn, controls_of, require_roles
from megatrain.chat.conversation import ASSISTANT, USER, ChatError, ChatMessage, RefusedByTemplateError, require_turns
from megatrain.chat.jinja_template import DEFAULT, JinjaProcess, template_of, templates_beside, token_variables
from megatrain.chat.marks import LAST, MarkedText
from megatrain.data.boundaries import NamedToken
from megatrain.data.tokenizer import Tokenizer

_PROBE = "the answer of a probe"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as a model reads it."""

    tokens: tuple[int, ...]
    text: str
    """With special tokens by their names."""


class _Template(Protocol):
    """Writes messages, whose texts are marked, as one marked text."""

    name: str
    stops: tuple[str, ...]
    leading: str
    opened: bool

    def write(self, messages: Sequence[ChatMessage], ask: bool, variables: Mapping[str, Any]) -> str:
        """ask: whether an answer is asked for; else the last message is left open. Raises ChatError."""


class Chat:
    """A chat template with a tokenizer."""

    def __init__(self, template: _Template, codec: Tokenizer, marks: MarkedText, ends: Iterable[int]) -> None:
        self._template, self._codec, self._marks = template, codec, marks
        self.name = template.name
        self.ends = frozenset(ends)
        """Tokens that end an answer."""
        self.stops = template.stops
        """Texts that end an answer."""
        self.leading = template.leading
        """Text that a model writes before an answer, which is no part of it."""

    def prompt(
        self,
        messages: Sequence[ChatMessage],
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation, and the beginning of an answer; or with its last answer left open. variables: further ones of the template.

        Raises ChatError where the conversation is none that the template can write.
        """
        text = self.written(messages, continue_final_message=continue_final_message, variables=variables)
        tokens = tuple(self.encode(text))
        if not tokens:
            raise ChatError(
                f"the chat template {self.name} writes nothing for this conversation. Choose another one: --chat-template."
            )
        return ChatPrompt(tokens, self._marks.plain(text))

    def written(
        self,
        messages: Sequence[ChatMessage],
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, with marks around names of special tokens that people have written: for `encode`."""
        require_turns(messages, continue_final_message)
        marked = [ChatMessage(said.role, self._marks.marked(said.content, said.role == ASSISTANT)) for said in messages]
        return self._template.write(marked, not continue_final_message, self._marks.marked(dict(variables or {})))

    def encode(self, text: str) -> list[int]:
        """Ids of what `written` gives, or of such a text and more behind it; what opens a text is there once."""
        ids = self._marks.encode(text)
        return self._codec.beginning.before(ids) if self._template.opened else ids


def open_chat(
    codec: Tokenizer, folders: Sequence[Path] = (), choice: str | None = None, tokens: Mapping[str, int] | None = None
) -> Chat:
    """The chat of a model.

    folders: where its tokenizer files are, the first that has a template counts. choice: a built-in template's name, the name of one
    that the model has, or a file; None: the model's own. tokens: ids of special tokens that the tokenizer does not know.
    Raises ChatError.
    """
    found = next(((folder, named) for folder in folders if (named := templates_beside(folder))), None)
    own: dict[str, str] = {} if found is None else found[1]
    folder = next(iter(folders), None) if found is None else found[0]
    if choice is None:
        if DEFAULT not in own:
            raise ChatError(_none_of(codec, own))
        return _jinja(codec, own[DEFAULT], f"of {folder}", folder)
    if choice in BUILT_IN:
        return _built_in(BUILT_IN[choice], codec, tokens or {})
    if choice in own:
        return _jinja(codec, own[choice], choice, folder)
    if Path(choice).is_file():
        return _jinja(codec, template_of(Path(choice)), choice, folder)
    others = f"; {', '.join(own)} of the model" if own else ""
    raise ChatError(
        f"--chat-template {choice}: there is no such template and no such file. Built in are {', '.join(BUILT_IN)}{others}."
    )


class _Rendered:
    """A template in Jinja."""

    stops: tuple[str, ...] = ()
    leading = ""
    opened = False

    def __init__(self, name: str, source: str, variables: Mapping[str, Any]) -> None:
        self.name, self._source, self._variables = name, source, variables
        self._process = JinjaProcess()

    def write(self, messages: Sequence[ChatMessage], ask: bool, variables: Mapping[str, Any]) -> str:
        said = [{"role": message.role, "content": message.content} for message in messages]
        tag = f"{LAST} "  # where a template trims messages, the blank goes
        if not ask:
            said[-1]["content"] += tag
        given = {"messages": said, "tools": None, "documents": None, "add_generation_prompt": ask}
        text = self._process.render(self._source, {**self._variables, **variables, **given}, self.name)
        if ask:
            return text
        at = text.rfind(LAST)
        if at < 0:
            raise ChatError(f"the chat template {self.name} leaves out the last answer, so there is nothing to go on with.")
        return text[:at] if text[at : at + len(tag)] == tag else text[:at].rstrip()


class _Written:
    """A template that is built in."""

    def __init__(self, template: BuiltIn) -> None:
        self._template, self.name = template, template.name
        self.stops, self.leading, self.opened = template.stops, template.leading, template.opened

    def write(self, messages: Sequence[ChatMessage], ask: bool, variables: Mapping[str, Any]) -> str:
        if variables:
            raise ChatError(f"the chat template {self.name} has no variable {next(iter(variables))!r}. Leave it out.")
        require_roles(self._template, messages)
        return self._template.write(messages, ask)


def _built_in(template: BuiltIn, codec: Tokenizer, tokens: Mapping[str, int]) -> Chat:
    controls = controls_of(template, codec, tokens)
    ends = [control.token for control in controls if control.name in template.ends]
    return Chat(_Written(template), codec, MarkedText(codec, controls), [*codec.ending.stops, *ends])


def _jinja(codec: Tokenizer, source: str, name: str, folder: Path | None) -> Chat:
    """A chat with a template in Jinja, which is tried out: it must render, and the token behind an answer ends one."""
    named = [token for token in codec.named_tokens if not token.name.isspace()]
    marks = MarkedText(codec, [token for token in named if token.special or token.name in source])
    template = _Rendered(name, source, token_variables(folder))
    end = _end_of_answer(template, marks)
    return Chat(template, codec, marks, [*codec.ending.stops, *(() if end is None else (end.token,))])


def _end_of_answer(template: _Rendered, marks: MarkedText) -> NamedToken | None:
    """The control token that a template puts behind an answer. Raises ChatError for a template that cannot be rendered."""
    asked = ChatMessage(USER, "a question")
    with suppress(RefusedByTemplateError):  # it may want a system message, or a single question
        template.write([asked], True, {})
        text = template.write([asked, ChatMessage(ASSISTANT, _PROBE), asked], True, {})
        at = text.find(_PROBE)
        return marks.first_control(text[at + len(_PROBE) :]) if at >= 0 else None
    return None


def _none_of(codec: Tokenizer, own: Mapping[str, str]) -> str:
    if own:
        return f"the model has no default chat template. Choose one: --chat-template {'|'.join(own)}."
    return (
        f"there is no chat template beside {codec.label}: a base model goes on with texts and holds no conversations (--prompt). If it was "
        f"tuned with one, say which: --chat-template {'|'.join(BUILT_IN)}, or a FILE.jinja."
    )
