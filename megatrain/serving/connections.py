"""The HTTP server under the application: uvicorn's, with limits for clients that send or read nothing, and no signals of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatrain.serving.serving_limits import ServingLimits

LONGEST_HEAD = 32 << 10
"""Bytes of a request's line and headers."""
KEPT_SECONDS = 30
"""How long a connection may wait for its next request."""


class PatientProtocol(H11Protocol):
    """A connection whose client has a limited time to say what it wants, and that a handler can break off."""

    head_seconds = 20.0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._rest()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what came; with a whole head the wait is over."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._late is None and not self.transport.is_closing():
            self._wait()

    def on_response_complete(self) -> None:
        """The wait for the next head begins with its first byte; until then uvicorn's limit of idle connections holds."""
        super().on_response_complete()
        self._rest()

    def _wait(self) -> None:
        self._late = self.loop.call_later(self.head_seconds, self._abort)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _abort(self) -> None:
        self.transport.abort()


class QuietServer(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


def make_server(app: ASGIApp, limits: ServingLimits, grace: float) -> QuietServer:
    """A server of an application. grace: seconds that open answers have when it stops."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # strangers' nonsense is no news
    protocol = type("LimitedProtocol", (PatientProtocol,), {"head_seconds": limits.body_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=int(grace) + 10,
        h11_max_incomplete_event_size=LONGEST_HEAD,
    )
    return QuietServer(config)
