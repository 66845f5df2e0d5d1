"""Log-probabilities of continuations and of whole documents, by the engine, under every layout.

Equal requests are worked on once, and those that begin alike come one after another, so that a context which several choices share is
computed once (the engine's cache of prefixes). Replicas get parts of that order of about as many tokens each; every rank gets all results,
in the caller's order.

A text longer than the model's positions is read in windows. With 4 positions, and a document 0..9 after <s>:

    read     <s> 0 1 2    3 4 5 6    5 6 7 8        a window reads 4 tokens, and the last one needs no reading
    predict    0 1 2 3    4 5 6 7        8 9        each token once; the last window is full, with as much context as fits

The beginning of a long context is cut off instead, unless the continuation alone is longer than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from megatrain.evaluation.joins import Join
from megatrain.inference.engine import Engine
from megatrain.inference.replicas import gathered, share
from megatrain.inference.requests import Answer, Request
from megatrain.inference.text_places import LEFT_TO_RIGHT, TextPlaces
from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import broadcast_text, lowest

Item = TypeVar("Item")
_AT_ONCE = 1024
"""Requests given to the engine at a time."""


@dataclass(frozen=True)
class Likelihood:
    """How probable a text is."""

    total: float
    """Sum of the log-probabilities of its tokens, in nats."""
    greedy: bool
    """Whether each token is the most probable one."""
    tokens: int
    """Number of tokens that were predicted."""
    truncated: bool = False
    """Whether some of them did not see all that comes before, as the text is longer than the model's positions."""


@dataclass(frozen=True, order=True)
class Window:
    """Tokens that fit the model, of which those from `first` (>= 1) on are predicted."""

    tokens: tuple[int, ...]
    first: int
    places: TextPlaces = field(default=LEFT_TO_RIGHT, compare=False)
    """Positions, which follow from the tokens."""


Advance = Callable[[int], None]
"""Told of the number of requests that are done since its last call."""


def windows_of(join: Join, positions: int) -> list[Window]:
    """The windows in which a continuation is scored: one, with the end of a long context, where the continuation fits."""
    tokens = (*join.context, *join.continuation)
    if len(join.continuation) > positions:
        return list(windows(tokens, len(join.context), positions))
    kept = tokens[-(positions + 1) :]
    return [Window(kept, len(kept) - len(join.continuation))]


def windows(tokens: tuple[int, ...], first: int, positions: int) -> Iterator[Window]:
    """Windows that predict each token from place `first` (>= 1) on once; a model of so many positions reads all but a window's last."""
    end = positions + 1 if first <= positions else first + positions
    while first < len(tokens):
        end = min(end, len(tokens))
        start = max(0, end - positions - 1)
        yield Window(tokens[start:end], first - start)
        first, end = end, end + positions


def sums_of(
    engine: Engine, parts: Sequence[Sequence[Window]], ctx: ParallelContext | None = None, advance: Advance = lambda _: None
) -> list[tuple[float, bool]]:
    """(sum of log-probabilities, whether all are the most probable) of texts, of which each has some windows; the same on every rank.

    Collective: the data-parallel replicas of `ctx` share the work. advance: told of windows, equal ones once. Raises ValueError for a token
    that the model does not have.
    """
    # Like ones are neighbours, so that their common beginning is computed once.
    ordered = sorted({window for of in parts for window in of})

    def work(part: Sequence[Window]) -> list[list[float]]:
        requests = [Request(window.tokens, 0, score_from=window.first, places=window.places) for window in part]
        answers = answers_of(engine, requests, advance)
        return [[math.fsum(of.logprob for of in a.prompt), all(of.greedy for of in a.prompt)] for a in answers]

    scored = on_replicas(engine, ordered, lambda window: len(window.tokens), work, ctx)
    found = dict(zip(ordered, scored, strict=True))
    return [(math.fsum(found[one][0] for one in of), all(bool(found[one][1]) for one in of)) for of in parts]


def answers_of(engine: Engine, requests: Sequence[Request], advance: Advance = lambda _: None) -> list[Answer]:
    """The answers of requests, in order, as `engine.run`; `advance` is told of each that ends."""
    places = {engine.add(request): place for place, request in enumerate(requests)}
    found: dict[int, Answer] = {}
    while len(found) < len(requests):
        for update in engine.step():
            if update.finish is not None and update.number in places:
                found[places[update.number]] = engine.answer(update.number)
                advance(1)
    return [found[place] for place in range(len(requests))]


def on_replicas(
    engine: Engine,
    items: Sequence[Item],
    tokens: Callable[[Item], int],
    work: Callable[[Sequence[Item]], list[Any]],
    ctx: ParallelContext | None = None,
) -> list[Any]:
    """The result of `work` for each item, in order, on every rank (collective). Each replica gets items that follow one another, of about
    as many tokens, and works on some of them at a time.

    engine: that `work` asks; tokens: of an item; results are made of what JSON has. A ValueError of one replica is raised by all.
    """
    ctx = ctx or ParallelContext.single()
    mine: list[list[Any]] = []
    failure: ValueError | None = None
    try:
        for part in share(dealt(items, [tokens(item) for item in items], ctx.dp.size), ctx):
            mine.append([result for at in range(0, len(part), _AT_ONCE) for result in work(part[at : at + _AT_ONCE])])
    except ValueError as error:  # of one replica, whose ranks all raise it: the others would wait for its results
        failure = error
    try:
        engine.settle()
    except ValueError as error:
        failure = failure or error
    culprit = lowest(failure is not None, ctx.dp.group, ctx.device)
    if culprit is not None:
        message = broadcast_text(str(failure), ctx.dp.group, ctx.device, culprit)
        raise failure or ValueError(message)
    return [result for part in gathered(mine, ctx) for result in part]


def dealt(items: Sequence[Item], weights: Sequence[int], parts: int) -> list[Sequence[Item]]:
    """So many parts that follow one another, of about the same weight."""
    total = sum(weights)
    ends, seen = [0], 0
    for place, weight in enumerate(weights):
        while len(ends) < parts and seen * parts >= total * len(ends):
            ends.append(place)
        seen += weight
    ends += [len(items)] * (parts + 1 - len(ends))
    return [items[a:b] for a, b in pairwise(ends)]
