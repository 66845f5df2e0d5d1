"""The paths of the server: OpenAI's API, tokens, health, counts, and the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from megatrain.serving.answering import Answering
from megatrain.serving.bodies import (
    UNSUPPORTED,
    UNSUPPORTED_CHAT,
    ChatBody,
    CompletionBody,
    Decoding,
    DetokenizeBody,
    FeedbackBody,
    TokenizeBody,
)
from megatrain.serving.chat_page import page_response
from megatrain.serving.desk import Desk, Inbox
from megatrain.serving.exposition import CONTENT_TYPE, exposed
from megatrain.serving.fields import Unsupported, parsed
from megatrain.serving.gate import Gate
from megatrain.serving.orders import PromptOrder, chat_order, completion_order
from megatrain.serving.refusal import Refusal
from megatrain.serving.replies import ReplyHead
from megatrain.serving.served import Served
from megatrain.serving.serving_limits import ServingLimits
from megatrain.serving.styles import AnswerChoice, ChatStyle, Style, TextStyle
from megatrain.serving.traffic_log import TrafficLog, write_thumb
from megatrain.untrusted import parse_json

Body = TypeVar("Body")
HEARD_OUT = 4
"""Times the longest body: whoever sends more is cut off."""
LONG = 20_000
"""Bytes of a body from which on its texts are encoded in another thread, so that streams go on meanwhile."""


class Endpoints:
    """The handlers, and what they share."""

    def __init__(self, desk: Desk, limits: ServingLimits, log: TrafficLog | None, feedback: Path | None) -> None:
        """log: of requests; feedback: file of thumbs; None: none."""
        self.desk, self.limits, self.log, self.feedback = desk, limits, log, feedback
        self.served: Served | None = None
        """Set when the model is loaded."""

    def app(self) -> ASGIApp:
        """The application, behind its gate."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/feedback", self._feedback, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/", self._page),
        ]
        handlers: Any = {
            Refusal: self._refused,
            HTTPException: self._refused,
            ClientDisconnect: _nothing,
            Exception: self._failed,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers)
        return Gate(inner, self.limits.key, self.limits.hosts, self._told)

    def ready(self) -> Served:
        """The model. Raises Refusal while there is none."""
        self.desk.require_ready()
        if self.served is None:
            raise Refusal("the model is being loaded.", status=503, retry_after=5)
        return self.served

    # --- OpenAI's paths -----------------------------------------------------------------------------------------------------------

    async def _models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self.ready().require_model(request.path_params["name"])
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        served = self.ready()
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "megatrain"}
        more = {
            "root": served.source,
            "max_model_len": served.max_length,
            "chat_template": not isinstance(served.conversing, str),
        }
        return {**card, **more}

    async def _completions(self, request: Request) -> Answering:
        body, size = await self._body(CompletionBody, request, UNSUPPORTED)
        served = self.ready()
        order = await self._order(completion_order, body, served, size)
        asked = [prompt if isinstance(prompt, str) else list(prompt) for prompt in body.prompt]
        return self._answering(order, body, TextStyle(body, order, served), {"prompt": asked, "suffix": body.suffix})

    async def _chat(self, request: Request) -> Answering:
        body, size = await self._body(ChatBody, request, UNSUPPORTED_CHAT)
        served = self.ready()
        order = await self._order(chat_order, body, served, size)
        asked = {"messages": [asdict(message) for message in body.messages]}
        return self._answering(order, body, ChatStyle(body, order, served), asked)

    async def _order(
        self, make: Callable[[Any, Served], PromptOrder], body: Decoding, served: Served, size: int
    ) -> PromptOrder:
        served.require_model(body.model)
        elsewhere = size > LONG or isinstance(body, ChatBody)  # a template is rendered by another process
        order = await asyncio.to_thread(make, body, served) if elsewhere else make(body, served)
        if len(order.requests) > self.limits.most_running + self.limits.queue:
            raise Refusal(
                f"{len(order.requests)} texts are asked for at once, and there is room for {self.limits.most_running + self.limits.queue} "
                "(--most-running and --queue). Ask for fewer.",
                "n",
            )
        return order

    def _answering(self, order: PromptOrder, body: ChatBody | CompletionBody, style: Style, asked: dict[str, Any]) -> Answering:
        served = self.ready()
        head = ReplyHead.new(style.kind, served.name)

        def ended(choices: Sequence[AnswerChoice], inbox: Inbox, how: str) -> None:
            if how == "done":
                for choice in choices:
                    scored = choice.tokens
                    self.desk.meters.answered(choice.text, [each.token for each in scored], [each.logprob for each in scored])
            if self.log is not None:
                self.log.put(head, asked, order, choices, inbox, how)

        return Answering(self.desk, order, body, style, head, self.limits.request_seconds, ended)

    # --- tokens -------------------------------------------------------------------------------------------------------------------

    async def _tokenize(self, request: Request) -> Response:
        body, size = await self._body(TokenizeBody, request, UNSUPPORTED)
        served = self.ready()
        served.require_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refusal('give prompt or messages, one of them. Try {"prompt": "Hello"}.', "prompt")
        elsewhere = size > LONG or body.messages is not None
        ids = await asyncio.to_thread(_tokens, body, served) if elsewhere else _tokens(body, served)
        names = [served.texts.name(token) for token in ids] if body.return_token_strs else None
        return _json({"tokens": ids, "count": len(ids), "max_model_len": served.max_length, "token_strs": names})

    async def _detokenize(self, request: Request) -> Response:
        body, _ = await self._body(DetokenizeBody, request, UNSUPPORTED)
        served = self.ready()
        served.require_model(body.model)
        wrong = next((token for token in body.tokens if token >= served.vocab_size), None)
        if wrong is not None:
            raise Refusal(f"tokens has {wrong}, and the model's vocabulary has {served.vocab_size} tokens.", "tokens")
        return _json({"prompt": served.codec.decode(body.tokens)})

    # --- for people ---------------------------------------------------------------------------------------------------------------

    async def _page(self, _request: Request) -> Response:
        return page_response()

    async def _feedback(self, request: Request) -> Response:
        body, _ = await self._body(FeedbackBody, request, UNSUPPORTED)
        if self.feedback is None:
            raise Refusal("this server keeps no feedback: it was started with --feedback none.", status=404)
        try:
            await asyncio.to_thread(write_thumb, self.feedback, body)
        except OSError as error:
            said = f"{self.feedback.name} could not be written: {error.strerror or error}. The thumb is lost."
            raise Refusal(said, status=500, code="not_saved") from None
        self.desk.meters.thumbs[body.rating] += 1
        return _json({"saved": self.feedback.name})

    async def _health(self, _request: Request) -> Response:
        desk, served = self.desk, self.served
        if desk.state != "ready" or served is None:
            return _json({"status": desk.state, "message": desk.said}, 503)
        facts = {"model": served.name, "attention": served.attention, "layout": served.layout}
        return _json({"status": "ok", **facts, "open": desk.open, "blocks_used": desk.meters.stats.blocks_used})

    async def _metrics(self, _request: Request) -> Response:
        served = self.served
        info = {} if served is None else {"source": served.source, "attention": served.attention, "layout": served.layout}
        name = "" if served is None else served.name
        return Response(exposed(self.desk, name, info), media_type=None, headers={"content-type": CONTENT_TYPE})

    # --- bodies and errors --------------------------------------------------------------------------------------------------------

    async def _body(self, kind: type[Body], request: Request, unsupported: dict[str, Unsupported]) -> tuple[Body, int]:
        """The body of a request, and its bytes. Raises Refusal."""
        try:
            data = await asyncio.wait_for(_read(request, self.limits.body_bytes), self.limits.body_seconds)
        except asyncio.TimeoutError:
            said = f"the body did not arrive within {self.limits.body_seconds:g} s."
            raise Refusal(said, status=408) from None
        try:
            value = parse_json(data)
        except (ValueError, UnicodeDecodeError) as error:
            raise Refusal(f"the body is not JSON: {error}.", code="invalid_json") from None
        return parsed(kind, value, unsupported), len(data)

    async def _refused(self, _request: Request, error: Exception) -> Response:
        """A refusal of a handler, or of the routes."""
        if isinstance(error, HTTPException):
            known = (
                "/v1/models, /v1/completions, /v1/chat/completions, /tokenize, /detokenize, /health, /metrics and / are there"
            )
            return self._told(Refusal(f"{error.detail}: {known}.", status=error.status_code))
        return self._told(error if isinstance(error, Refusal) else Refusal(str(error), status=500))

    async def _failed(self, _request: Request, error: Exception) -> Response:
        """A fault of the server, whose traceback uvicorn writes to stderr."""
        return self._told(Refusal(f"a fault of the server: {type(error).__name__}. Its log has more.", status=500))

    def _told(self, refusal: Refusal) -> Response:
        """A refusal in OpenAI's shape."""
        self.desk.meters.refused[refusal.status] += 1
        return _json(refusal.body(), refusal.status, refusal.headers())


async def _read(request: Request, most: int) -> bytes:
    """The bytes of a body. Raises Refusal beyond `most`: some more are read first, as many clients hear nothing while they send."""
    parts, size = [], int(request.headers.get("content-length", "0"))
    too_large = Refusal(f"the body has more than the {most:,} bytes that are read (--body-bytes).", status=413)
    if size > HEARD_OUT * most:
        raise too_large
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > HEARD_OUT * most:
            break
        if size <= most:
            parts.append(part)
    if size > most:
        raise too_large
    return b"".join(parts)


def _tokens(body: TokenizeBody, served: Served) -> tuple[int, ...]:
    """The tokens of a text, or of a conversation. Raises Refusal."""
    if body.messages is not None:
        return served.converse(body.messages, body.continue_final_message)
    encoded = served.codec.encode(body.prompt or "")
    return tuple(served.codec.beginning.before(encoded) if body.add_special_tokens else encoded)


async def _nothing(_request: Request, _error: Exception) -> Response:
    """The client has gone, so nobody reads this."""
    return Response(status_code=499)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")
