"""Prompts for `megatrain generate` from the command line or a file, and rows of what was written.

{"prompt": "Once upon", "max_tokens": 8, "seed": 3}                    a row of --input; keys beside the prompt replace options
{"messages": [{"role": "user", "content": "Hello"}], "id": "q1"}       a conversation, in the model's chat template; "id" is given back

{"index": 0, "sample": 0, "text": " a time", "finish_reason": "stop", "prompt_tokens": 2, "tokens": [17, 5]}      a row of --output
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megatrain.chat.conversation import ChatError, ChatMessage, conversation_of
from megatrain.files import HEAD_BYTES, brief, not_text
from megatrain.inference.beams import Beams
from megatrain.inference.requests import Sampling
from megatrain.inference.text_plans import PlannedText
from megatrain.untrusted import parse_json, read_plain

LARGEST_INPUT = 1 << 28
"""Bytes of --input."""
ROW_SUFFIXES = (".jsonl", ".ndjson")
_PROMPT, _MESSAGES, _ID, _CONTINUE = "prompt", "messages", "id", "continue_final_message"


@dataclass(frozen=True)
class Wishes:
    """How texts are to be written, from the command line or a row."""

    max_tokens: int = 64
    seed: int = 1234
    n: int = 1
    """Texts for each prompt; text k has the seed + k."""
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    beams: int | None = None
    length_penalty: float = 0.0
    logprobs: int | None = None
    """Number of most probable tokens told with each token; 0: the token's log-probability alone; None: nothing."""

    def sampling(self) -> Sampling:
        """How a token is chosen; a beam means the most probable one. Raises ValueError."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        greedy = self.greedy or self.beams is not None
        return Sampling(greedy, self.temperature, self.top_k, self.top_p, self.min_p, *penalties)

    def beam_search(self) -> Beams | None:
        """Beam search; None for texts that are chosen token by token."""
        return Beams(self.beams, self.length_penalty) if self.beams is not None and self.beams > 1 else None


@dataclass(frozen=True)
class PromptRow:
    """A prompt with its wishes."""

    where: str
    """Its place, for messages."""
    wishes: Wishes
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] = ()
    continued: bool = False
    """Whether the last message is an answer to go on with."""
    id: Any = None


_SAMPLES = ("temperature", "top_k", "top_p", "min_p")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("max_tokens", "seed", "n", "top_k", "logprobs", "beams"), ((int,), "a whole number")),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"),
        ((int, float), "a number"),
    ),
    "greedy": ((bool,), "true or false"),
}
_LEAST = {"max_tokens": 1, "seed": 0, "n": 1, "logprobs": 0, "beams": 1}
_NONE = ("top_k", "top_p", "min_p", "logprobs", "beams")
"""Keys for which null means that there is no limit."""


def read_input(path: str) -> str:
    """The text of a file, or of standard input for `-`. Raises ValueError, or OSError."""
    name = named(path)
    try:
        data = sys.stdin.buffer.read(LARGEST_INPUT + 1) if path == "-" else read_plain(path, LARGEST_INPUT)
        if len(data) > LARGEST_INPUT:
            raise ValueError(f"it has more than {LARGEST_INPUT:,} bytes")
        if problem := not_text(data[:HEAD_BYTES]):
            raise ValueError(problem)
        return data.decode("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {brief(error)}. Give text in UTF-8, or rows of JSON.") from None


def named(path: str) -> str:
    """The name of an input in messages."""
    return "standard input" if path == "-" else path


def rows_of_text(text: str, path: str, wishes: Wishes) -> tuple[list[PromptRow], bool]:
    """(the prompts of an input, whether it is rows of JSON: else all of it is one prompt, without a last line end).

    Raises ValueError that names file and line.
    """
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    # one row among lines of which the first looks like one is enough: a mistake in the first is told, not continued as a text
    if not (path.endswith(ROW_SUFFIXES) or (_looks_like_row(first) and any(map(_is_row, lines)))):
        return [PromptRow(named(path), wishes, text.removesuffix("\n"))], False
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f'{named(path)} has no rows. Give one a line: {{"prompt": "Once upon"}}.')
    return [row_of(line, f"{named(path)}, line {number}", wishes) for number, line in numbered], True


def row_of(line: str, where: str, wishes: Wishes) -> PromptRow:
    """The prompt of a row of JSON. Raises ValueError."""
    try:
        found = parse_json(line)
    except ValueError as error:
        raise ValueError(f'{where}: it is not JSON ({brief(error)}). A row is {{"prompt": "Once upon"}}.') from None
    if not isinstance(found, dict) or (_PROMPT in found) == (_MESSAGES in found):
        raise ValueError(f'{where}: a row is an object with either "prompt" or "messages": {{"prompt": "Once upon"}}.')
    _require_unicode(json.dumps(found.get(_ID), ensure_ascii=False), where, _ID)
    asked = {key: value for key, value in found.items() if key not in (_PROMPT, _MESSAGES, _ID, _CONTINUE)}
    wishes = changed(wishes, asked, where)
    if _PROMPT in found:
        if not isinstance(found[_PROMPT], str) or found.get(_CONTINUE):
            raise ValueError(f'{where}: "prompt" is a text, and it is gone on with anyway: {{"prompt": "Once upon"}}.')
        _require_unicode(found[_PROMPT], where, "the prompt")
        return PromptRow(where, wishes, found[_PROMPT], id=found.get(_ID))
    continued = found.get(_CONTINUE, False)
    if not isinstance(continued, bool):
        raise ValueError(f"{where}: {_CONTINUE} is {json.dumps(continued)[:40]}. Use true or false.")
    try:
        messages = conversation_of(found[_MESSAGES])
    except ChatError as error:
        raise ValueError(f"{where}: {error}") from None
    return PromptRow(where, wishes, None, messages, continued, found.get(_ID))


def changed(wishes: Wishes, asked: Mapping[str, Any], where: str) -> Wishes:
    """Wishes with those of a row in their place. Raises ValueError."""
    values: dict[str, Any] = {}
    for key, value in asked.items():
        if key == "stop":
            values[key] = _stops(value, where)
        elif key not in _KINDS:
            known = [_PROMPT, _MESSAGES, _ID, _CONTINUE, *(item.name for item in fields(Wishes))]
            raise ValueError(f"{where}: {key!r} is not known. A row has {', '.join(known)}.")
        else:
            values[key] = _value(key, value, where)
    drawn = next((key for key in _SAMPLES if values.get(key) is not None), None)
    if drawn is not None:
        values.setdefault("greedy", False)
        if values.setdefault("beams", None) is None:
            values.setdefault("length_penalty", 0.0)
    found = replace(wishes, **values)
    try:
        found.sampling()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if said := _contradiction(found, drawn):
        raise ValueError(f"{where}: {said}")
    return found


def _contradiction(wishes: Wishes, drawn: str | None) -> str | None:
    """The message for wishes that do not go together; None if they do. drawn: a key beside them that tells how tokens are drawn."""
    several = wishes.beams is not None and wishes.beams > 1
    which = "greedy" if wishes.beams is None else f"beams={wishes.beams}"
    if wishes.greedy or wishes.beams is not None:
        if drawn is not None:
            return f"{which} takes what is most probable, so {drawn} means nothing. Leave one out."
        if wishes.n > 1:
            return f"{which} gives one text for a prompt, {wishes.n} times the same. Use n=1."
    penalties = (wishes.repetition_penalty, wishes.presence_penalty, wishes.frequency_penalty) != (1.0, 0.0, 0.0)
    if several and (penalties or wishes.logprobs is not None):
        return f"{which} ranks whole texts by the model's own probabilities: leave penalties and logprobs out."
    if wishes.length_penalty and not several:
        return "length_penalty ranks texts of several beams, and there is one. Leave it out, or use beams=4."
    return None


def output_row(number: int, sample: int, row: PromptRow, prompt_tokens: int, writing: PlannedText) -> str:
    """A row of --output, without a line end."""
    found: dict[str, Any] = {"index": number, "sample": sample}
    if row.id is not None:
        found["id"] = row.id
    found |= {"text": writing.text, "finish_reason": writing.finish, "prompt_tokens": prompt_tokens}
    found["tokens"] = [scored.token for scored in writing.tokens]
    if writing.pieces:
        found["blanks"] = [piece.text for piece in writing.pieces]
    if writing.log_probability is not None:
        found["log_probability"] = writing.log_probability
    elif row.wishes.logprobs is not None:
        found["logprobs"] = [scored.logprob for scored in writing.tokens]
        if row.wishes.logprobs:
            found["top_logprobs"] = [[list(pair) for pair in scored.top] for scored in writing.tokens]
    return json.dumps(found, ensure_ascii=False)


def _looks_like_row(line: str) -> bool:
    return line.lstrip().startswith("{")


def _is_row(line: str) -> bool:
    """Whether a line is a row of JSON with a prompt or messages."""
    if not _looks_like_row(line):
        return False
    try:
        found = parse_json(line)
    except ValueError:
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint({_PROMPT, _MESSAGES})


def _value(key: str, value: Any, where: str) -> Any:
    kinds, said = _KINDS[key]
    if value is None and key in _NONE:
        return None
    right = isinstance(value, kinds) and (isinstance(value, bool) == (key == "greedy"))
    if not right or (isinstance(value, float) and not math.isfinite(value)) or value < _LEAST.get(key, value):
        least = f" of {_LEAST[key]} or more" if key in _LEAST else ""
        raise ValueError(f"{where}: {key} is {json.dumps(value)[:40]}. Use {said}{least}.")
    if key == "seed" and value >= 1 << 63:
        raise ValueError(f"{where}: seed is {value}. Use a whole number below 2^63.")
    return value


def _stops(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            f'{where}: stop is {json.dumps(value)[:40]}. Use a text that is not empty, or a list of them: ["\\n\\n"].'
        )
    return tuple(texts)


def _require_unicode(text: str, where: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {what} is no text of Unicode: {text[error.start]!a} is half of a character.") from None
