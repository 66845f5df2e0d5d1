"""`megatrain generate --chat`: a conversation in the terminal, or line by line through a pipe.

    > Hello                         the answer appears as it is written; Ctrl-C ends it there, and what was said stays
    > /system Be short.             what the model is told at the beginning; /system alone takes it away
    > /reset                        begin anew
    > /exit                         or Ctrl-D

The first rank reads, and all ranks do what was said.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from megatrain.chat.conversation import ASSISTANT, SYSTEM, USER, ChatError, ChatMessage, conversation_of
from megatrain.chat.templates import ChatPrompt
from megatrain.inference.opening import Opened
from megatrain.inference.text_plans import PlannedText, write, written
from megatrain.stderr import note
from megatrain.transport.consensus import broadcast_text, lowest
from megatrain.verbs.prompt_plans import Planner
from megatrain.verbs.prompt_rows import PromptRow, Wishes
from megatrain.verbs.showing import shower, without

COMMANDS = "/system TEXT, /reset, /exit"
LONGEST_LINE = 1 << 20
"""Characters of a line that is read: one of a device never ends."""
_PROMPT = "> "


@dataclass
class _Talk:
    """A conversation so far."""

    model: Opened
    planner: Planner
    wishes: Wishes
    system: str | None
    keyboard: _Keyboard
    said: list[ChatMessage] = field(default_factory=list)
    answers: int = 0

    def mention(self, text: str) -> None:
        """Say something beside the conversation."""
        if self.model.is_first:
            note(f"megatrain: {text}")

    def messages(self, begin: int = 0) -> list[ChatMessage]:
        """All that the model is told, from a message on."""
        return [*([] if self.system is None else [ChatMessage(SYSTEM, self.system)]), *self.said[begin:]]


def talk(model: Opened, planner: Planner, wishes: Wishes, system: str | None) -> int:
    """Answer until the input ends. Returns 0. Raises ChatError where the model has no chat template."""
    name = planner.chat.name
    conversation = _Talk(model, planner, wishes, system, _Keyboard(model))
    if model.is_first and sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415  lines can be edited once it is imported
        note(f"megatrain: the chat template is {name}. {COMMANDS}; Ctrl-C ends an answer, Ctrl-D the conversation.")
    with conversation.keyboard:
        while (line := _heard(conversation)) is not None:
            command, _, rest = line.strip().partition(" ")
            if command == "/exit":
                break
            if command == "/reset":
                conversation.said.clear()
            elif command == "/system":
                conversation.system = rest.strip() or None
            elif line.strip():
                _answer(conversation, line)
    return 0


def _answer(conversation: _Talk, line: str) -> None:
    """Answer a line; one that cannot be answered is told, and forgotten."""
    said = conversation.said
    conversation.keyboard.begin_answer()
    try:
        said += conversation_of([{"role": USER, "content": line}])
        prompt = _fitted(conversation)
    except ChatError as error:
        if said and said[-1].role == USER:
            said.pop()
        conversation.mention(f"error: {error}")
        return
    writing, interrupted = _written(conversation, prompt)
    text = writing.text.removeprefix(conversation.planner.chat.leading)
    if interrupted and not text:
        said.pop()
        return
    said.append(ChatMessage(ASSISTANT, text))
    if writing.finish == "length" and not interrupted:
        conversation.mention(f"the answer has used up its {len(writing.tokens)} tokens (--max-tokens, model.max_positions)")


def _fitted(conversation: _Talk) -> ChatPrompt:
    """The conversation as the model reads it, without its first messages where it is longer than the model. Raises ChatError."""
    positions = conversation.model.engine.max_length
    room = min(conversation.wishes.max_tokens, positions // 4)
    chat, said = conversation.planner.chat, conversation.said
    begin = 0
    while len((prompt := chat.prompt(conversation.messages(begin))).tokens) + room > positions and begin + 2 < len(said):
        begin += 2
    if len(prompt.tokens) >= positions:
        raise ChatError(
            f"this message makes a conversation of {len(prompt.tokens)} tokens, and model.max_positions is {positions}. Say it shorter."
        )
    if begin:
        del said[:begin]
        conversation.mention(
            f"the conversation is longer than model.max_positions={positions}: its first {begin} messages are left out"
        )
    return prompt


def _written(conversation: _Talk, prompt: ChatPrompt) -> tuple[PlannedText, bool]:
    """(an answer, shown as it comes, whether Ctrl-C ended it)."""
    model, planner = conversation.model, conversation.planner
    wishes = replace(conversation.wishes, seed=conversation.wishes.seed + conversation.answers)
    conversation.answers += 1
    request, manner = planner.answer(PromptRow("", wishes, messages=tuple(conversation.messages())), prompt.tokens)
    show, found = shower(model), []
    settings = replace(manner, enough=conversation.keyboard.ended)
    plan = written(request, settings, prompt.tokens, without(planner.chat.leading, show))
    write(model.engine, [plan], lambda _number, writing: found.append(writing))
    interrupted = conversation.keyboard.ended()
    show("\n")
    return found[0], interrupted


class _Keyboard:
    """Ctrl-C: while a line is read it gives that up, while an answer is written it ends that, and between it does nothing."""

    def __init__(self, model: Opened) -> None:
        self._model = model
        self._reading = self._pressed = False
        self._before: Any = None

    def __enter__(self) -> _Keyboard:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def begin_answer(self) -> None:
        """Forget what was pressed before."""
        self._pressed = False

    def ended(self) -> bool:
        """Whether it was pressed on any rank since the answer began, alike on all (collective)."""
        return lowest(self._pressed, self._model.ctx.world.group, self._model.ctx.device) is not None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it a press is a KeyboardInterrupt."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def _press(self, _number: int, _frame: object) -> None:
        self._pressed = True
        if self._reading:
            raise KeyboardInterrupt


def _heard(conversation: _Talk) -> str | None:
    """The next line, on every rank; None at the end."""
    model = conversation.model
    line = _read(conversation.keyboard) if model.is_first else None
    heard: str | None = json.loads(broadcast_text(json.dumps(line), model.ctx.world.group, model.ctx.device))
    if len(heard or "") > LONGEST_LINE:
        raise ChatError(f"a line of standard input has more than {LONGEST_LINE:,} characters. Break it into lines.")
    return heard


def _read(keyboard: _Keyboard) -> str | None:
    """A line of standard input without its end; None at the end. In a terminal Ctrl-C gives up a line that has been begun.

    Raises KeyboardInterrupt elsewhere.
    """
    if not sys.stdin.isatty():
        with keyboard.reading():
            line = sys.stdin.readline(LONGEST_LINE + 1)
        return line.removesuffix("\n") if line else None
    while True:
        try:
            with keyboard.reading():
                return input(_PROMPT)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except EOFError:
            sys.stdout.write("\n")
            return None
