"""Texts that a model writes for many prompts at once: each prompt has a plan, which asks the engine for one thing after the other.

    continuation    one request; another one where the model's positions are used up, which goes on with the end of the text
    beam search     the texts that grow, a token more of each
    blanks          one blank after the other, each a continuation or a beam search

Plans run side by side, in as many requests as the engine takes, and each gives the text that it would give alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.beams import Beams, beam_search, following, questions, require_room
from megatrain.inference.engine import Engine
from megatrain.inference.infill import Filling
from megatrain.inference.overflow import fitted, going_on
from megatrain.inference.requests import Answer, Finish, Request, Scored
from megatrain.inference.text import TextStream

Show = Callable[[str], None]
"""Takes text that is certain."""


@dataclass(frozen=True)
class PlannedText:
    """A text that was written."""

    text: str
    tokens: tuple[Scored, ...]
    finish: Finish
    pieces: tuple[PlannedText, ...] = ()
    """The texts in the blanks of the prompt, each of its own, where it has some."""
    log_probability: float | None = None
    """The log-probability of the whole text, where beam search has found it."""


@dataclass(frozen=True)
class Asked:
    """A request of a plan."""

    request: Request
    seen: Callable[[Scored], bool] | None = None
    """Takes its tokens as they come; True: that is enough."""


Result = TypeVar("Result")
Plan = Generator[Sequence[Asked], Sequence[Answer], Result]
"""Gives requests, takes their answers, and returns what it was made for."""


@dataclass(frozen=True)
class PlanSettings:
    """How a text is written."""

    codec: Tokenizer
    positions: int
    """Number of positions that the model has."""
    vocab_size: int
    stops: tuple[str, ...] = ()
    beams: Beams | None = None
    goes_on: bool = True
    """Whether a text goes on where the positions are used up."""
    enough: Callable[[], bool] = lambda: False
    """Asked after each token: whether the text is to end here."""


def written(request: Request, manner: PlanSettings, before: Sequence[int], show: Show | None = None) -> Plan[PlannedText]:
    """A text after the prompt of a request. before: tokens whose text comes before it, if others than the prompt.

    Raises ValueError where a beam search does not fit the positions.
    """
    stream = TextStream(manner.codec, before, manner.stops)
    if manner.beams is not None:
        return (yield from _searched(request, manner, manner.beams, stream, show))
    told = _Told(stream, show, manner.enough)
    rest: Request | None = fitted(request, manner.positions) if manner.goes_on else request
    finish: Finish = "length"
    while rest is not None:
        (answer,) = yield [Asked(rest, told.take)]
        finish = answer.finish
        more = manner.goes_on and finish == "length" and stream.stopped is None
        rest = going_on(rest, [scored.token for scored in answer.tokens], manner.positions) if more else None
    told.end()
    return PlannedText(told.text, tuple(told.tokens), finish if stream.stopped is None else "stop")


def filled(
    filling: Filling, texts: Sequence[str], encoded: Sequence[Sequence[int]], asked: Request, manner: PlanSettings, show: Show
) -> Plan[PlannedText]:
    """The texts of a prompt with its blanks filled, one after the other. asked: as for `Filling.request`.

    texts, encoded: those around the blanks; show: takes all of it.
    """
    whole: list[str] = []

    def add(piece: str) -> None:
        whole.append(piece)
        show(piece)

    before: list[int] = []
    found: list[PlannedText] = []
    for number, text in enumerate(texts):
        add(text)
        before += encoded[number]
        if number + 1 < len(texts):
            draws = number * min(asked.max_tokens, manner.positions)  # each blank has random numbers of its own
            request = filling.request(replace(asked, first_draw=draws))
            writing = yield from written(request, manner, before, add)
            found.append(writing)
            tokens = [scored.token for scored in writing.tokens]
            before += [token for token in tokens if manner.codec.special_id(manner.codec.name_of(token)) is None]
            filling.fill(request, tokens)
    tokens_of_all = tuple(scored for writing in found for scored in writing.tokens)
    finish: Finish = "length" if any(writing.finish == "length" for writing in found) else "stop"
    return PlannedText("".join(whole), tokens_of_all, finish, tuple(found))


def write(engine: Engine, plans: Sequence[Plan[Result]], done: Callable[[int, Result], None]) -> None:
    """Carry out plans side by side (collective). done: takes the number of a plan and its result, in the order in which they end.

    Raises what a plan raises, and ValueError for a request that the engine refuses.
    """
    asked: dict[int, tuple[_UnderWay, int]] = {}

    def go_on(number: int, plan: Plan[Result], answers: list[Answer] | None) -> None:
        try:
            wanted = next(plan) if answers is None else plan.send(answers)
        except StopIteration as end:
            done(number, end.value)
            return
        pending = _UnderWay(number, wanted)
        for place, one in enumerate(wanted):
            asked[engine.add(one.request)] = (pending, place)

    for number, plan in enumerate(plans):
        go_on(number, plan, None)
    while asked:
        for update in engine.step():
            pending, place = asked[update.number]
            answer = pending.take(place, update.tokens)
            if answer is not None:
                engine.cancel(update.number)
            elif update.finish is not None:
                answer = engine.answer(update.number)
            if answer is None:
                continue
            del asked[update.number]
            pending.answers[place] = answer
            if len(pending.answers) == len(pending.asked):
                ordered = [pending.answers[one] for one in range(len(pending.asked))]
                go_on(pending.number, plans[pending.number], ordered)


@dataclass
class _UnderWay:
    """Requests of a plan that are under way."""

    number: int
    asked: Sequence[Asked]
    answers: dict[int, Answer] = field(default_factory=dict)
    _tokens: dict[int, list[Scored]] = field(default_factory=dict)

    def take(self, place: int, tokens: Sequence[Scored]) -> Answer | None:
        """Pass tokens on; the answer, if they are enough."""
        seen = self.asked[place].seen
        if seen is None:
            return None
        kept = self._tokens.setdefault(place, [])
        for scored in tokens:
            kept.append(scored)
            if seen(scored):
                return Answer(tuple(kept), "", "stop", None, (), 0)
        return None


class _Told:
    """Tokens as they come, and their text."""

    def __init__(self, stream: TextStream, show: Show | None, enough: Callable[[], bool]) -> None:
        self._stream, self._show, self._enough = stream, show, enough
        self.tokens: list[Scored] = []
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def take(self, scored: Scored) -> bool:
        self.tokens.append(scored)
        self._add(self._stream.push(scored.token))
        return self._stream.stopped is not None or self._enough()

    def end(self) -> None:
        self._add(self._stream.finish())

    def _add(self, piece: str) -> None:
        self._pieces.append(piece)
        if piece and self._show is not None:
            self._show(piece)


def _searched(request: Request, manner: PlanSettings, beams: Beams, stream: TextStream, show: Show | None) -> Plan[PlannedText]:
    """The most probable text."""
    require_room(request, manner.positions)
    beams = replace(beams, count=min(beams.count, manner.vocab_size))
    rounds = beam_search(request.ends, request.max_tokens, beams)
    try:
        texts = next(rounds)
        while True:
            answers = yield [Asked(question) for question in questions(request, texts, beams, manner.vocab_size)]
            texts = rounds.send(following(answers))
    except StopIteration as result:
        best = result.value
    told = _Told(stream, show, manner.enough)
    for token in best.text_tokens:
        if told.take(Scored(token, 0.0, greedy=False)):
            break
    told.end()
    ended = best.ended or stream.stopped is not None
    tokens = tuple(told.tokens)
    return PlannedText(told.text, tokens, "stop" if ended else "length", log_probability=best.log_probability)
