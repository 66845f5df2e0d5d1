"""Something made ahead of time in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(threading.Thread, Generic[Made]):
    """A thread that calls `make`. A daemon: a read that hangs on a dead file system must not keep a run from its end."""

    def __init__(self, name: str, make: Callable[[], Made]) -> None:
        super().__init__(name=name, daemon=True)
        self._make, self._made = make, Future[Made]()
        self.start()

    def run(self) -> None:
        """The thread's body."""
        try:
            self._made.set_result(self._make())
        except BaseException as error:
            self._made.set_exception(error)

    def result(self) -> Made:
        """The value that `make` returned; raises what it raised."""
        return self._made.result()

    def succeeded(self) -> bool:
        """Whether `make` has returned by now."""
        return self._made.done() and self._made.exception() is None

    def wait(self) -> None:
        """Wait until `make` has ended, however it did."""
        wait([self._made])
