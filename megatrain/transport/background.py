"""A thread that waits for asynchronous calls, one after the other.

It serves gloo's sends, which cannot be asked whether they have ended (`is_completed` stays false until `wait`), and exchanges through
shared memory, where the copying is done inside `wait`.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Protocol


class Work(Protocol):
    """The part of a torch.distributed work (an asynchronous call) that is used here."""

    def wait(self) -> object:
        """Block until it has ended. Raises RuntimeError or OSError."""

    def is_completed(self) -> bool:
        """Whether it has ended."""


class WatchedWork:
    """A call that the thread waits for. Others may ask whether it has ended, or wait until the thread has seen it end."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._ended = threading.Event()
        self._error: Exception | None = None

    def follow(self) -> None:
        """Wait for the call, as the thread does."""
        try:
            self._work.wait()
        except Exception as error:  # raised again by `wait`
            self._error = error
        self._ended.set()

    def wait(self) -> None:
        """Block until the call has ended. Raises the error it ended with."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def is_completed(self) -> bool:
        """Whether the call has ended, well or badly."""
        return self._ended.is_set()


class WaitingThread:
    """A thread that waits for one call after the other; it is started when first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: SimpleQueue[WatchedWork | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def watched(self, work: Work) -> WatchedWork:
        """Hand `work` to the thread, which waits for it."""
        if self._thread is None:
            # A daemon: a work that never ends must not keep a failed process from ending.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        followed = WatchedWork(work)
        self._works.put(followed)
        return followed

    def close(self) -> None:
        """End the thread after it has waited for all calls handed to it."""
        self._works.put(None)

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            work.follow()
