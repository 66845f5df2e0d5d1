"""Answers one request: whole, or as a stream of events while it is written. Whoever goes away before the end frees the engine's blocks.

handler --submit--> desk --> engine ... parts --> inbox --take--> events --> client
   \\-- a watcher of the connection, and a timer: either ends the wait, and what is still being written with it
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatrain.inference.requests import Answer, Request
from megatrain.serving.bodies import ChatBody, CompletionBody
from megatrain.serving.desk import Desk, Inbox
from megatrain.serving.orders import PromptOrder
from megatrain.serving.refusal import Refusal
from megatrain.serving.replica import AnswerPart
from megatrain.serving.replies import ReplyHead, Usage
from megatrain.serving.styles import AnswerChoice, Style

CLIENT_GONE = 499
"""nginx's status of requests whose client closed the connection."""
PATIENCE_SECONDS = 5.0
"""How long a client that reads nothing may go on so when the time of its request is over."""
DONE = b"data: [DONE]\n\n"
STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}

Ended = Callable[[Sequence[AnswerChoice], Inbox, str], None]


@dataclass(frozen=True)
class Answering:
    """The answer to one request, an ASGI application."""

    desk: Desk
    order: PromptOrder
    body: ChatBody | CompletionBody
    style: Style
    head: ReplyHead
    seconds: float
    """How long the request may take."""
    ended: Ended
    """Called with the choices, their inbox and how it ended: done, gone (the client) or failed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises Refusal before anything is sent."""
        abort = scope.get("state", {}).get("abort", lambda: None)
        scored: list[Answer | None] = [None] * len(self.order.prompts)
        if self.body.stream and self.order.scores_prompts:
            async with self._attended(self.order.scoring(), receive, abort) as inbox:
                scored = [choice.answer for choice in await _collected(inbox, len(scored))]
        choices = [AnswerChoice() for _ in self.order.requests]
        how = "failed"
        async with self._attended(self.order.requests, receive, abort) as inbox:
            try:
                if self.body.stream:
                    await self._stream(inbox, choices, scored, send)
                else:
                    choices[:] = await _collected(inbox, len(choices))
                    await self._whole(choices)(scope, receive, send)
                how = "done"
            except Refusal as refusal:
                how = "gone" if refusal.status == CLIENT_GONE else "failed"
                if how == "failed":
                    raise
            finally:
                self.ended(choices, inbox, how)

    @asynccontextmanager
    async def _attended(self, requests: Sequence[Request], receive: Receive, abort: Callable[[], None]) -> AsyncIterator[Inbox]:
        """Requests that are being answered, as long as the client is there and their time lasts."""
        loop = asyncio.get_running_loop()
        inbox = self.desk.submit(requests)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.desk.leave(inbox)
            inbox.fail(Refusal("the client has gone.", status=CLIENT_GONE))

        def late() -> None:
            self.desk.leave(inbox)
            said = f"the request took longer than {self.seconds:g} s (--request-seconds). Ask for fewer tokens."
            inbox.fail(Refusal(said, status=504, code="timeout"))
            timers.append(loop.call_later(PATIENCE_SECONDS, abort))

        timers = [loop.call_later(self.seconds, late)]
        watcher = loop.create_task(watch())
        try:
            yield inbox
        finally:
            watcher.cancel()
            for timer in timers:
                timer.cancel()
            self.desk.leave(inbox)

    def _headers(self) -> dict[str, str]:
        return {"x-megatrain-sampling": self.order.header, "x-request-id": self.head.id}

    def _whole(self, choices: Sequence[AnswerChoice]) -> Response:
        """The answer in one piece."""
        shapes = [self.style.whole(place, choice) for place, choice in enumerate(choices)]
        body = {**self.head.whole(shapes, usage_of(self.order, choices)), **self.style.beside()}
        return Response(orjson.dumps(body), media_type="application/json", headers=self._headers())

    async def _stream(self, inbox: Inbox, choices: Sequence[AnswerChoice], scored: Sequence[Answer | None], send: Send) -> None:
        """The answer in events. Raises Refusal while nothing is sent, or where the client has gone; later failures are events."""
        parts = _required(await inbox.take())  # before it nothing is sent: what the engine refuses is a 400
        headers = [(key.encode(), value.encode()) for key, value in {**STREAM, **self._headers()}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        begun = [self.style.begin(place, scored[place // self.order.n] if scored else None) for place in range(len(choices))]
        events = [self._event(shape) for shape in begun if shape is not None]
        try:
            while True:
                for place, part in parts:
                    choices[place].add(part)
                    if part.text or part.last or (part.tokens and self.style.shows_tokens):
                        events.append(self._event(self.style.part(place, part.tokens, part.text, part.answer)))
                if all(choice.answer is not None for choice in choices):
                    break
                await _body(send, b"".join(events))
                events, parts = [], _required(await inbox.take())
            if self.body.include_usage:
                usage = usage_of(self.order, choices).shape()
                events.append(b"data: " + orjson.dumps(self.head.chunk([], usage, True)) + b"\n\n")
            await _body(send, b"".join([*events, DONE]), more=False)
        except Refusal as refusal:
            if refusal.status != CLIENT_GONE:
                await _body(send, b"data: " + orjson.dumps(refusal.body()) + b"\n\n", more=False)
                self.desk.meters.refused[refusal.status] += 1
            raise Refusal(refusal.message, status=CLIENT_GONE) from None

    def _event(self, shape: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(self.head.chunk([shape], None, self.body.include_usage)) + b"\n\n"


def usage_of(order: PromptOrder, choices: Sequence[AnswerChoice]) -> Usage:
    """Tokens that an order took so far."""
    prompts = sum(len(request.tokens) for request in order.requests[:: order.n])
    cached = sum(choice.answer.cached_tokens for choice in choices[:: order.n] if choice.answer is not None)
    return Usage(prompts, sum(len(choice.tokens) for choice in choices), cached)


async def _collected(inbox: Inbox, count: int) -> list[AnswerChoice]:
    """All choices, when all have ended. Raises Refusal."""
    choices = [AnswerChoice() for _ in range(count)]
    while any(choice.answer is None for choice in choices):
        for place, part in _required(await inbox.take()):
            choices[place].add(part)
    return choices


def _required(parts: list[tuple[int, AnswerPart]]) -> list[tuple[int, AnswerPart]]:
    """Parts, unless one is that the engine did not take the request. Raises Refusal."""
    wrong = next((part.error for _, part in parts if part.error is not None), None)
    if wrong is not None:
        raise Refusal(wrong)
    return parts


async def _body(send: Send, data: bytes, more: bool = True) -> None:
    with suppress(OSError):  # the client has gone: the watcher tells
        await send({"type": "http.response.body", "body": data, "more_body": more})
