"""`Board`: a few keys that all ranks of a job can read and write, in the store where they met. For alarms, never for tensors.

Each board is a connection of its own: the connections of torch.distributed may be blocked in a call that hangs, which is just
when a board is needed. No call waits longer than it was told to, even where the machine that serves the store stands still.

Texts are sealed (`seal.py`): what a stranger writes is not seen. Nothing is counted in the store: a counter has no seal, and on one that a
stranger has set to a word, torch's store ends the connection of whoever adds to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatrain.transport.group import TransportError
from megatrain.transport.seal import Seal
from megatrain.transport.store import MOST_KEYS, answer_seconds, within

STORE = "the rendezvous store"
"""The store's name in error messages."""

_SLICE_SECONDS = 3600.0
"""A wait without a time limit is repeated in slices of this length."""
_LEAST_SECONDS = 0.01
"""Less than a millisecond would be no limit to torch's store."""
_STRANGER_SECONDS = 0.5
"""How long after a stranger's text the same key is looked at again."""
POLL_SECONDS = 0.02
"""How often the one rank that waits for many keys looks."""
_CLAIMS = 8
"""How often a key is claimed again from strangers."""


class Board:
    """Keys and short texts, shared by all ranks of a job."""

    def __init__(self, store: Store, seconds: float, key: bytes = b"") -> None:
        self._store = store
        self._seconds = seconds
        self._seal = Seal(key)

    @classmethod
    def open(cls, host: str, port: int, prefix: str, seconds: float, ranks: int = 1, key: bytes = b"") -> Board:
        """Connect to the store at host:port; `ranks` may do so at the same time. `prefix` keeps the keys apart from others'.

        key: what the ranks share, to seal texts with.

        No later call but `wait` takes longer than `seconds`. Raises TransportError if the store does not answer.
        """

        def connect() -> Store:
            limit = timedelta(seconds=seconds)
            return PrefixStore(prefix, TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit))

        return cls(within(answer_seconds(ranks), connect, STORE), seconds, key)

    def reseal(self, key: bytes) -> None:
        """From here on, texts are sealed with this key, and those sealed with the one before are not seen."""
        self._seal = Seal(key)

    def write(self, key: str, text: str) -> None:
        """Set a key. Raises TransportError."""
        sealed = self._seal.close(key, text)
        within(self._seconds, lambda: self._store.set(key, sealed), STORE)

    def claim(self, key: str, text: str) -> str:
        """The text of the rank that came first of those that claim the key, each with its own text. Raises TransportError.

        One message, and two more where a stranger has set the key: his text is replaced. Who overwrites it all the time lets each have it.
        """
        mine = self._seal.close(key, text)
        for _ in range(_CLAIMS):
            found = within(self._seconds, lambda: self._store.compare_set(key, "", mine), STORE)
            if (said := self._seal.open(key, found)) is not None:
                return said
            within(self._seconds, partial(self._store.compare_set, key, found, mine), STORE)  # type: ignore[arg-type]  # no text perhaps
        return text

    def write_all(self, keys: Sequence[str], text: str) -> None:
        """Set many keys to one text. Raises TransportError."""
        for part in parts(keys):
            sealed = [self._seal.close(key, text) for key in part]
            within(self._seconds, partial(self._store.multi_set, part, sealed), STORE)  # type: ignore[attr-defined]

    def read_all(self, keys: Sequence[str]) -> dict[str, str]:
        """The texts of those `keys` that ranks have set. Raises TransportError."""
        return {key: text for key, text in self.look(keys).items() if text is not None}

    def look(self, keys: Sequence[str]) -> dict[str, str | None]:
        """The texts of those `keys` that are set, None for a stranger's. Raises TransportError.

        If all keys of a part are set, one message reads them; else the part is halved: each missing key costs a few messages.
        """
        found: dict[str, str | None] = {}
        left = list(parts(keys))
        while left:
            part = left.pop()
            if self.complete(part):
                texts = within(self._seconds, partial(self._store.multi_get, part), STORE)
                found |= {key: self._seal.open(key, text) for key, text in zip(part, texts, strict=True)}
            elif len(part) > 1:
                left += [part[: len(part) // 2], part[len(part) // 2 :]]
        return found

    def complete(self, keys: Sequence[str]) -> bool:
        """Whether all of the keys are set, be it by a stranger. Raises TransportError."""
        return all(within(self._seconds, partial(self._store.check, part), STORE) for part in parts(keys))

    def gather(self, keys: Sequence[str], seconds: float) -> dict[str, str] | None:
        """The texts of all keys, once ranks have set each; None if some are not set after `seconds`. Raises TransportError.

        It polls, every POLL_SECONDS: for one rank of a job.
        """
        end = time.monotonic() + seconds
        found: dict[str, str] = {}
        for part in parts(keys):
            while len(texts := self.read_all(part) if self.complete(part) else {}) < len(part):
                if time.monotonic() > end:
                    return None
                time.sleep(POLL_SECONDS)
            found |= texts
        return found

    def wait(self, key: str, seconds: float | None = None) -> str | None:
        """Block until `key` is set and return its text; None after `seconds` (None: no limit). Raises TransportError if the store is lost.

        The server answers when the key is set: nothing is polled, unless a stranger has set it.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or time.monotonic() < end:
            left = _SLICE_SECONDS if end is None else max(_LEAST_SECONDS, end - time.monotonic())
            try:
                self._store.wait([key], timedelta(seconds=left))
                text = self._seal.open(key, self._store.get(key))
            except DistStoreError:
                continue
            except RuntimeError as error:
                raise TransportError(f"the rendezvous store is lost: {error}") from error
            if text is not None:
                return text
            time.sleep(min(_STRANGER_SECONDS, left))
        return None


def parts(keys: Sequence[str]) -> Iterator[list[str]]:
    """The keys, as many at a time as go into one message."""
    return (list(keys[first : first + MOST_KEYS]) for first in range(0, len(keys), MOST_KEYS))
