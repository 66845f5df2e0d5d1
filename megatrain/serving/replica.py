"""The engine's side of the server, on every rank: mail in, one step, parts of answers out.

`lead` runs on rank 0 in a thread beside the HTTP server, `follow` on the other ranks. An idle leader sends empty mail now and then, so
that no rank waits for longer than a transport allows; where a rank dies, the next broadcast or step fails on all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatrain.inference.engine import Engine, Stats
from megatrain.inference.requests import Answer, Request, Scored
from megatrain.parallel.mesh import ParallelContext
from megatrain.serving.mail import Mail, Mailbox, shared

HEARTBEAT_SECONDS = 2.0
"""How long an idle leader waits for mail before it sends an empty one."""


@dataclass(frozen=True)
class AnswerPart:
    """The tokens and the text of one request since its last part."""

    key: int
    tokens: tuple[Scored, ...] = ()
    text: str = ""
    answer: Answer | None = None
    """Set in the last part."""
    error: str | None = None
    """Why the engine did not take the request; set in its only part."""

    def joined(self, later: AnswerPart) -> AnswerPart:
        """This part and the one after it."""
        return AnswerPart(self.key, self.tokens + later.tokens, self.text + later.text, later.answer, later.error)

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.answer is not None or self.error is not None


@dataclass(frozen=True)
class StepParts:
    """The parts of a step, or of a few, for those who wait."""

    parts: tuple[AnswerPart, ...]
    started: tuple[int, ...]
    """Keys of requests whose prompts are now being read."""
    stats: Stats
    at: float
    """When the step ended (time.monotonic)."""


class Replica:
    """An engine and the keys of its requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._numbers: dict[int, int] = {}
        self._keys: dict[int, int] = {}
        self._unstarted: dict[int, int] = {}
        """Numbers of requests that were not in a step yet -> keys."""

    def turn(self, mail: Mail) -> tuple[list[AnswerPart], list[int]]:
        """Take mail in and make one step, if there is anything to do: (parts, keys of requests that have begun). The same on every rank."""
        parts = [part for key, request in mail.new if (part := self._add(key, request)) is not None]
        for key in mail.dropped:
            self._drop(key)
        if self.engine.busy:
            for update in self.engine.step():
                ended = None if update.finish is None else self.engine.answer(update.number)
                parts.append(AnswerPart(self._keys[update.number], update.tokens, update.text, ended))
        started = self._just_started()
        for part in parts:
            if part.answer is not None:
                self._forget(part.key)
        return parts, started

    def _add(self, key: int, request: Request) -> AnswerPart | None:
        try:
            number = self.engine.add(request)
        except ValueError as error:
            return AnswerPart(key, error=str(error))
        self._numbers[key], self._keys[number], self._unstarted[number] = number, key, key
        return None

    def _drop(self, key: int) -> None:
        number = self._forget(key)
        if number is not None:
            self.engine.cancel(number)

    def _forget(self, key: int) -> int | None:
        number = self._numbers.pop(key, None)
        if number is not None:
            del self._keys[number]
            self._unstarted.pop(number, None)
        return number

    def _just_started(self) -> list[int]:
        """Keys of requests that were admitted in this step; one that has ended in it too."""
        running, live = self.engine.scheduler.running, self.engine.scheduler.waiting
        waiting = {sequence.number for sequence in live} if self._unstarted else set()
        begun = [number for number in self._unstarted if number in running or number not in waiting]
        return [self._unstarted.pop(number) for number in begun]


def lead(
    engine: Engine, ctx: ParallelContext, mailbox: Mailbox, deliver: Callable[[StepParts], None], pause: Callable[[], float]
) -> None:
    """Work until the mailbox is closed; on rank 0. deliver: takes what a step gives, in this thread; pause: seconds that should lie
    between two deliveries, but for first and last parts of answers.

    Raises TransportError where another rank has died, ValueError where logits are not finite.
    """
    replica = Replica(engine)
    held: dict[int, AnswerPart] = {}
    begun: list[int] = []
    told, fresh = 0.0, set[int]()
    while True:
        busy = engine.busy
        mail = shared(mailbox.collect(0.0 if busy else HEARTBEAT_SECONDS), ctx.world, ctx.device)
        fresh.update(key for key, _ in mail.new)
        fresh.difference_update(mail.dropped)
        parts, started = replica.turn(mail)
        for part in parts:
            held[part.key] = held[part.key].joined(part) if part.key in held else part
        begun += started
        now = time.monotonic()
        urgent = any(part.last or part.key in fresh for part in parts) or (mail and not engine.busy)
        if urgent or ((held or begun) and now - told >= pause()):
            deliver(StepParts(tuple(held.values()), tuple(begun), engine.stats, now))
            fresh.difference_update(held)
            held, begun, told = {}, [], now
        if mail.end:
            return


def follow(engine: Engine, ctx: ParallelContext) -> None:
    """Do as rank 0 does until it says that nothing follows; on the other ranks. Raises as `lead` does."""
    replica = Replica(engine)
    mail = Mail()
    while not mail.end:
        mail = shared(Mail(), ctx.world, ctx.device)
        replica.turn(mail)
