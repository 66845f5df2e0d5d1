"""Texts of a task as what the engine is asked: token ids, where scores begin, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatrain.data.tokenizer import Tokenizer, prompt_ids
from megatrain.evaluation.joins import Encode, joined, start_of_text
from megatrain.evaluation.prompts import ChatFormat
from megatrain.evaluation.scoring import Window, windows, windows_of
from megatrain.inference.text_places import LEFT_TO_RIGHT, TextPlaces


@dataclass(frozen=True)
class ToScore:
    """A text whose tokens are scored, in windows that fit the model."""

    windows: tuple[Window, ...]
    tokens: int
    """Number of tokens that are scored."""
    cut: bool = False
    """Whether some of them do not see all that comes before, as the text is longer than the model."""
    spanned: bool = False
    """Whether a token would have spanned the join of context and answer, so that the answer was encoded alone."""


@dataclass(frozen=True)
class ToContinue:
    """A prompt."""

    tokens: tuple[int, ...]
    places: TextPlaces = LEFT_TO_RIGHT
    cut: bool = False
    """Whether its beginning was cut, as it is longer than the model."""


class Preparing(Protocol):
    """How texts become what the engine is asked."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, beside those of a task."""

    @property
    def never(self) -> tuple[int, ...]:
        """Tokens that no answer has."""

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[ToScore]:
        """(context, answer) texts, of which the answer is scored. Raises ValueError."""

    def prompt(self, text: str, most: int) -> ToContinue:
        """A context, to be continued by up to `most` tokens."""

    def document(self, text: str) -> ToScore:
        """A document whose every token is scored once."""


@dataclass(frozen=True)
class LeftToRightTexts:
    """Texts for a model that reads from left to right."""

    codec: Tokenizer
    max_length: int
    """Positions of the model. It scores one token more than it reads."""
    chat: ChatFormat | None = None
    """Whose contexts have tokens of a template."""
    _numbers: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    """Each id once: as an object of its own every token of every choice would take 28 bytes more."""

    @property
    def encode(self) -> Encode:
        """How contexts become tokens."""
        return self.codec.encode if self.chat is None else self.chat.encode

    @property
    def ends(self) -> frozenset[int]:
        """The tokenizer's ends of a document, and a template's ends of an answer."""
        return frozenset(self.codec.ending.stops) | (frozenset() if self.chat is None else self.chat.ends)

    @property
    def stops(self) -> tuple[str, ...]:
        """A template's ends of an answer."""
        return () if self.chat is None else self.chat.stops

    @property
    def never(self) -> tuple[int, ...]:
        """None."""
        return ()

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[ToScore]:
        """(context, answer) texts; one that is longer than the model loses the beginning of its context."""
        found = []
        for one in joined(self.codec, pairs, self.encode):
            long = len(one.context) + len(one.continuation) > self.max_length + 1
            slim = replace(one, context=self._slim(one.context), continuation=self._slim(one.continuation))
            found.append(ToScore(tuple(windows_of(slim, self.max_length)), len(one.continuation), long, one.spanned))
        return found

    def prompt(self, text: str, most: int) -> ToContinue:
        """A context; one that leaves no room for `most` tokens loses its beginning."""
        ids = prompt_ids(self.codec, self.encode(text) if text else ()) or start_of_text(self.codec)
        kept = tuple(ids[-max(self.max_length - most, 1) :])
        return ToContinue(kept, cut=len(kept) < len(ids))

    def document(self, text: str) -> ToScore:
        """Windows of a document: its first token is conditioned on what opens a text, later windows on as many tokens as fit."""
        start, ids = start_of_text(self.codec), self.codec.encode(text)
        cut = len(start) + len(ids) > self.max_length + 1
        return ToScore(tuple(windows(self._slim((*start, *ids)), len(start), self.max_length)), len(ids), cut)

    def _slim(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids, of which equal ones are the same object."""
        return tuple(map(self._numbers.setdefault, ids, ids))
