"""A plan for each prompt: what the engine is asked for, whether the prompt is a text, a text with blanks, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatrain.chat.templates import Chat, open_chat
from megatrain.data.samples.sentinels import resolve
from megatrain.data.tokenizer import Tokenizer, prompt_ids
from megatrain.inference.beams import require_room
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.opening import Opened
from megatrain.inference.requests import Request
from megatrain.inference.text_places import LEFT_TO_RIGHT
from megatrain.inference.text_plans import Plan, PlannedText, PlanSettings, Show, filled, written
from megatrain.verbs.prompt_rows import PromptRow, Wishes


@dataclass(frozen=True)
class Prompted:
    """A prompt, ready to be written to."""

    row: PromptRow
    tokens: int
    """Number of the prompt's tokens."""
    plan: Callable[[int, Show], Plan[PlannedText]]
    """The plan of the text of a number, given what takes the text."""
    shown: str = ""
    """The prompt's text, where the plan does not write it."""
    leading: str = ""
    """Text before an answer that is no part of it."""

    def text_of(self, writing: PlannedText) -> PlannedText:
        """A text without what stands before an answer."""
        return replace(writing, text=writing.text.removeprefix(self.leading)) if self.leading else writing


class Planner:
    """Makes plans for the prompts of one model."""

    def __init__(self, model: Opened, template: str | None) -> None:
        """template: the chat template that is chosen; None: the model's own."""
        self._model, self._template = model, template
        self._chat: Chat | None = None

    @property
    def chat(self) -> Chat:
        """The model's chat. Raises ChatError where it has none."""
        if self._chat is None:
            self._chat = open_chat(self._model.codec, self._model.tokenizer_folders, self._template, self._model.named_ids)
        return self._chat

    def prompted(self, row: PromptRow) -> Prompted:
        """The plan of a prompt. Raises ValueError."""
        try:
            if (row.wishes.logprobs or 0) > (most := self._model.engine.vocab_size):
                raise ValueError(
                    f"logprobs is {row.wishes.logprobs}, and the vocabulary has {most} tokens. Use {most} or less."
                )
            if row.prompt is None:
                return self._answer(row)
            return self._blanks(row, row.prompt) if self._model.config.data.objective == "glm" else self._text(row, row.prompt)
        except ValueError as error:
            if row.where == "":
                raise
            raise ValueError(f"{row.where}: {error}") from error

    def answer(self, row: PromptRow, tokens: Sequence[int]) -> tuple[Request, PlanSettings]:
        """The request for the answer to a conversation of so many tokens, and how it is written."""
        request = replace(_request(row.wishes, tokens, self.chat.ends), places=self._model.places(tokens))
        return self._limited(request), self._manner(row, self.chat.stops)

    def _limited(self, request: Request) -> Request:
        """A request whose answer ends where the positions do."""
        room = max(1, self._model.engine.max_length - len(request.tokens))
        return replace(request, max_tokens=min(request.max_tokens, room))

    def _require_fits(self, tokens: Sequence[int], what: str, advice: str) -> None:
        """Raise ValueError where a prompt has more tokens than the model has positions."""
        positions = self._model.engine.max_length
        if len(tokens) > positions:
            raise ValueError(f"the {what} has {len(tokens)} tokens, and model.max_positions is {positions}. {advice}.")

    def _answer(self, row: PromptRow) -> Prompted:
        tokens = self.chat.prompt(row.messages, continue_final_message=row.continued).tokens
        self._require_fits(tokens, "conversation", "Leave its first messages out")
        request, manner = self.answer(row, tokens)
        return Prompted(
            row,
            len(tokens),
            lambda number, show: written(_of(request, number), manner, tokens, show),
            leading="" if row.continued else self.chat.leading,
        )

    def _text(self, row: PromptRow, prompt: str) -> Prompted:
        codec, manner, before = self._model.codec, self._manner(row), self._model.codec.encode(prompt)
        tokens = self._model.closed(encoded_prompt(codec, prompt, self._model.engine.vocab_size))
        request = _request(row.wishes, tokens, codec.ending.stops)
        if (places := self._model.places(tokens)) is not LEFT_TO_RIGHT:
            self._require_fits(tokens, "prompt", "Shorten it")
            ends = request.ends | {token for name, token in self._model.named_ids.items() if name == "<eop>"}
            request, manner = self._limited(replace(request, places=places, ends=ends)), replace(manner, goes_on=False)
        if manner.beams is not None:
            require_room(request, manner.positions)
        return Prompted(
            row, len(tokens), lambda number, show: written(_of(request, number), manner, before, show), shown=prompt
        )

    def _blanks(self, row: PromptRow, prompt: str) -> Prompted:
        codec, engine, manner = self._model.codec, self._model.engine, self._manner(row)
        ids, text_vocab = resolve(self._model.config.data.glm, codec, engine.vocab_size)
        texts, masks = parsed(prompt, ids)
        encoded = [codec.encode(text) for text in texts]
        request = _request(row.wishes, (ids.cls,), ())

        def plan(number: int, show: Show) -> Plan[PlannedText]:
            filling = Filling(engine, encoded, masks, ids, text_vocab)
            return filled(filling, texts, encoded, _of(request, number), manner, show)

        return Prompted(row, len(Filling(engine, encoded, masks, ids, text_vocab).tokens), plan)

    def _manner(self, row: PromptRow, stops: Sequence[str] = ()) -> PlanSettings:
        engine, texts = self._model.engine, (*stops, *row.wishes.stop)
        goes_on = row.prompt is not None
        return PlanSettings(self._model.codec, engine.max_length, engine.vocab_size, texts, row.wishes.beam_search(), goes_on)


def encoded_prompt(codec: Tokenizer, prompt: str, vocab_size: int) -> list[int]:
    """Token ids of the prompt, after the tokens that the tokenizer puts before a text; for an empty prompt, a start-of-document token."""
    ids = prompt_ids(codec, codec.encode(prompt))
    if not ids:
        raise ValueError(
            'the prompt is empty, and no token of the tokenizer is known to end or begin a document. Give a --prompt "TEXT".'
        )
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer made token {max(ids)} of the prompt, and the checkpoint's vocabulary has {vocab_size} tokens. "
            "Give the tokenizer that the run was trained with: --tokenizer TOKENIZER.json."
        )
    return ids


def _request(wishes: Wishes, tokens: Sequence[int], ends: Iterable[int]) -> Request:
    return Request(tuple(tokens), wishes.max_tokens, wishes.sampling(), wishes.seed, ends=frozenset(ends), top=wishes.logprobs)


def _of(request: Request, number: int) -> Request:
    """The request for text `number` of a prompt."""
    return replace(request, seed=request.seed + number)
