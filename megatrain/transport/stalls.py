"""How long a rank's own work stands still for other ranks: what is left of a step is the rank's own.

On a CPU the thread that trains waits in a call; waits of other threads stop nothing. On a GPU not the host waits but the stream, between
the two moments that a call's `wait` puts into it. They are read after the step has ended, so nothing is synchronised for them.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from megatrain.transport.host import Moment


class Stalls(ABC):
    """Counts the waits of a step: those between `open` and `close`."""

    @abstractmethod
    def open(self) -> None:
        """A step begins, in this thread."""

    @abstractmethod
    def close(self) -> Callable[[], float]:
        """The step is queued; returns a function that gives its waits, in seconds, once the device has ended it."""

    @abstractmethod
    def begin(self) -> Any:
        """A wait begins; returns what `end` is to be given."""

    @abstractmethod
    def end(self, began: Any) -> None:
        """The wait is over."""


class HostStalls(Stalls):
    """Waits of the thread that trains, by the host's clock."""

    def __init__(self) -> None:
        self._thread, self._seconds = 0, 0.0

    def open(self) -> None:
        """Count the waits of this thread from now on."""
        self._thread, self._seconds = threading.get_ident(), 0.0

    def close(self) -> Callable[[], float]:
        """End the count, which is known at once."""
        seconds, self._thread = self._seconds, 0
        return lambda: seconds

    def begin(self) -> float:
        """The time on the host's clock."""
        return time.perf_counter()

    def end(self, began: float) -> None:
        """Add the wait, if it was in the thread that trains."""
        if threading.get_ident() == self._thread:
            self._seconds += time.perf_counter() - began


class StreamStalls(Stalls):
    """Waits of a GPU's streams, whichever thread has queued them: autograd has one of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._open = device, False
        self._waits: list[tuple[Moment, Moment]] = []

    def open(self) -> None:
        """Let moments be put into streams from now on."""
        self._open = True

    def close(self) -> Callable[[], float]:
        """Put no more moments into streams; those that are in them are read once they have come."""
        waits, self._waits, self._open = self._waits, [], False
        return lambda: sum(end.seconds_since(begin) for begin, end in waits)

    def begin(self) -> Moment | None:
        """A moment in the stream; None outside of a step."""
        return Moment(self._device) if self._open else None

    def end(self, began: Moment | None) -> None:
        """Keep the moment before the wait and the one after it."""
        if began is not None:
            self._waits.append((began, Moment(self._device)))


def stalls_of(device: torch.device) -> Stalls:
    """The counter of waits for a rank whose tensors are on `device`."""
    return StreamStalls(device) if device.type == "cuda" else HostStalls()
