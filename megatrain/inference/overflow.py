"""Texts that are longer than the model's positions: it goes on with their end, half as long as there are positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatrain.inference.engine import Engine
from megatrain.inference.requests import Answer, Request


def fitted(request: Request, positions: int) -> Request:
    """A request whose prompt is at most as long as there are positions: a longer one is cut to its end."""
    if len(request.tokens) <= positions:
        return request
    return replace(request, tokens=request.tokens[-max(1, positions // 2) :])


def going_on(request: Request, tokens: Sequence[int], positions: int) -> Request | None:
    """The rest of a request whose answer ended with `tokens` for want of positions; None where it has all it asked for."""
    left = request.max_tokens - len(tokens)
    if left <= 0:
        return None
    rest = replace(request, max_tokens=left, first_draw=request.first_draw + len(tokens), score_from=None)
    return fitted(replace(rest, tokens=(*request.tokens, *tokens)), positions)


def whole_answers(engine: Engine, requests: Sequence[Request]) -> list[list[Answer]]:
    """The answers to requests, each in as many parts as it takes (collective)."""
    parts: list[list[Answer]] = [[] for _ in requests]
    open_ones = {number: fitted(request, engine.max_length) for number, request in enumerate(requests)}
    while open_ones:
        answers = engine.run(list(open_ones.values()))
        following = {}
        for (number, request), answer in zip(open_ones.items(), answers, strict=True):
            parts[number].append(answer)
            rest = going_on(request, [scored.token for scored in answer.tokens], engine.max_length)
            if answer.finish == "length" and rest is not None:
                following[number] = rest
        open_ones = following
    return parts
