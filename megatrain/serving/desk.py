"""Between HTTP and the engine, in the server's event loop: takes requests in as far as there is room, and hands parts of answers out."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from megatrain.inference.requests import Request
from megatrain.serving.mail import Mailbox
from megatrain.serving.meters import ABORTED, Meters, Timed
from megatrain.serving.refusal import Refusal
from megatrain.serving.replica import AnswerPart, StepParts

State = Literal["loading", "ready", "stopping", "dead"]
MOST_RETRY_SECONDS = 60
SECONDS_A_STREAM = 0.0012
"""Parts of an answer are at least this far apart for each stream that is open: what a part costs the server is some 5% of it."""


class Inbox:
    """Where the parts of the answers to one HTTP request arrive."""

    def __init__(self, timed: dict[int, Timed]) -> None:
        """timed: by the key of each of its requests, in their order."""
        self.timed = list(timed.values())
        self.open = set(timed)
        """Keys of those that have not ended."""
        self._places = {key: place for place, key in enumerate(timed)}
        self._parts: dict[int, AnswerPart] = {}
        self._came = asyncio.Event()
        self._failure: Refusal | None = None

    def put(self, part: AnswerPart) -> None:
        """Leave a part; it is joined with what is not taken yet, so that a slow reader costs no more than its answer."""
        before = self._parts.get(part.key)
        self._parts[part.key] = part if before is None else before.joined(part)
        self._came.set()

    def fail(self, failure: Refusal) -> None:
        """Say that nothing more will come."""
        self._failure = failure
        self._came.set()

    async def take(self) -> list[tuple[int, AnswerPart]]:
        """(place of the request, its part) of all that has come, at least one. Raises Refusal where nothing more will."""
        await self._came.wait()
        if self._failure is not None:
            raise self._failure
        self._came.clear()
        parts, self._parts = self._parts, {}
        return [(self._places[key], part) for key, part in parts.items()]


class Desk:
    """The requests that are being answered, and whether more are taken in."""

    def __init__(self, mailbox: Mailbox, most_running: int, most_waiting: int) -> None:
        """most_running: requests that the engine works on at a time; most_waiting: others that may wait."""
        self.mailbox, self.most_running, self.most_waiting = mailbox, most_running, most_waiting
        self.meters = Meters()
        self.state: State = "loading"
        self.said = "the model is being loaded."
        """Why requests are not taken in, where they are not."""
        self.emptied = asyncio.Event()
        """Set where nothing is being answered."""
        self.emptied.set()
        self._inboxes: dict[int, tuple[Inbox, Timed]] = {}
        self._keys = itertools.count()

    @property
    def open(self) -> int:
        """Number of requests that have not ended."""
        return len(self._inboxes)

    def pause(self) -> float:
        """Seconds between two parts of an answer; called from the engine's thread."""
        return SECONDS_A_STREAM * len(self._inboxes)

    def change(self, state: State, said: str = "") -> None:
        """Go over to another state; a dead desk stays so."""
        if self.state != "dead":
            self.state, self.said = state, said

    def open_for(self, max_length: int) -> None:
        """Take requests in from now on, for a model of so many positions."""
        self.meters.measure_lengths(max_length)
        self.change("ready")

    def require_ready(self) -> None:
        """Raise Refusal where requests are not taken in."""
        if self.state != "ready":
            raise Refusal(self.said, status=503, code=self.state, retry_after=5)

    def submit(self, requests: Sequence[Request]) -> Inbox:
        """Take requests in, all or none. Raises Refusal."""
        self.require_ready()
        room = self.most_running + self.most_waiting
        if self.open + len(requests) > room:
            seconds = max(1, min(MOST_RETRY_SECONDS, round(self.meters.seconds_lately)))
            raise Refusal(
                f"{self.open} texts are being written, and {self.most_running} may be at a time, with {self.most_waiting} more in the "
                f"queue (--most-running, --queue): there is no room for {len(requests)} more. Try again in {seconds} s.",
                status=429,
                code="queue_full",
                retry_after=seconds,
            )
        now = time.monotonic()
        timed = {next(self._keys): Timed(now, len(request.tokens)) for request in requests}
        inbox = Inbox(timed)
        self._inboxes.update({key: (inbox, times) for key, times in timed.items()})
        self.emptied.clear()
        self.mailbox.add(list(zip(timed, requests, strict=True)))
        return inbox

    def leave(self, inbox: Inbox) -> None:
        """Nobody waits for an inbox any more: what is still being written ends, and its blocks are free after the next step."""
        if inbox.open:
            keys = sorted(inbox.open)
            inbox.open.clear()
            self._abort(keys)

    def deliver(self, step: StepParts) -> None:
        """Hand out what steps gave."""
        self.meters.stats = step.stats
        for key in step.started:
            if key in self._inboxes:
                self._inboxes[key][1].started = step.at
        for part in step.parts:
            if part.key not in self._inboxes:
                continue  # it was dropped meanwhile
            inbox, timed = self._inboxes[part.key]
            self.meters.part(timed, part, step.at)
            inbox.put(part)
            if part.last:
                inbox.open.discard(part.key)
                self._close([part.key])

    def end_all(self, failure: Refusal) -> None:
        """Let everything that is being answered fail."""
        inboxes = {id(inbox): inbox for inbox, _ in self._inboxes.values()}
        self._abort(list(self._inboxes))
        for inbox in inboxes.values():
            inbox.open.clear()
            inbox.fail(failure)

    def _abort(self, keys: Sequence[int]) -> None:
        self.mailbox.drop(keys)
        now = time.monotonic()
        for key in keys:
            self.meters.ended(self._inboxes[key][1], ABORTED, now)
        self._close(keys)

    def _close(self, keys: Iterable[int]) -> None:
        for key in keys:
            del self._inboxes[key]
        if not self._inboxes:
            self.emptied.set()
