"""Ranks that talk through the store where they meet, without any group: before one is made, and where none can be.

A rank that could not join the others' group (its network interface is missing, it has no GPU) can still say so here, and rank 0 can
still end all of them at once. Rank 0 hears from everybody; nobody else does, so that a word costs a rank the same in any world.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from megatrain.transport.group import TransportError
from megatrain.transport.store import ANSWER_SECONDS, open_store

T = TypeVar("T")

SECONDS_PER_RANK = 0.002
"""What each of many ranks that come at once may take of the store's time."""
LINGER_SECONDS = 5.0
"""How long rank 0, in which the store may live, waits for the others to read its last word."""


class Meeting:
    """The ranks of a job at a store. All call the same methods in the same order; a world of 1 needs no store."""

    def __init__(
        self, rank: int, size: int, rendezvous: tuple[str, int], limit_seconds: float, *, launcher_serves: bool, prefix: str
    ) -> None:
        """Reach the store at rendezvous (host, port), which rank 0 serves unless the launcher does, within limit_seconds.

        prefix: keeps this meeting apart from other users of the store. Raises TransportError where the port is in use on rank 0,
        and elsewhere where nothing is there in time, or something that is not this job's store.
        """
        self.rank = rank
        self.size = size
        self._came = size
        self._round = 0
        self._store: Store | None = None
        if size == 1:
            return
        limit = timedelta(seconds=limit_seconds)
        self._store = PrefixStore(prefix, open_store(rank, size, rendezvous, limit, rank == 0 and not launcher_serves))
        if launcher_serves:
            return
        if rank == 0:
            self._store.set("open", "")
            return
        try:
            self._store.wait(["open"], timedelta(seconds=ANSWER_SECONDS + SECONDS_PER_RANK * size))
        except RuntimeError as error:
            raise TransportError(
                f"rank {rank} found a store at {rendezvous[0]}:{rendezvous[1]} that is not served by rank 0 of this job: another job "
                "uses the port. Choose another MASTER_PORT."
            ) from error

    def collect(self, text: str, limit_seconds: float) -> dict[int, str]:
        """Rank -> its text, at rank 0, of those that have come within limit_seconds; nothing elsewhere. Raises TransportError."""
        store, size = self._store, self.size
        if store is None:
            return {0: text}
        self._round += 1
        words = [f"{self._round} from {rank}" for rank in range(size)]
        everyone = f"{self._round} all"

        def tell() -> None:
            store.set(words[self.rank], text)
            if store.add(f"{self._round} came", 1) == size:
                store.set(everyone, "")

        self._call(tell)
        if self.rank != 0:
            return {}
        try:
            store.wait([everyone], timedelta(seconds=limit_seconds))
            there = list(range(size))
        except RuntimeError:  # some do not come: who has?
            there = self._call(lambda: [rank for rank in range(size) if store.check([words[rank]])])
        self._came = len(there)
        texts = self._call(lambda: store.multi_get([words[rank] for rank in there]))
        return {rank: said.decode() for rank, said in zip(there, texts, strict=True)}

    def decide(self, text: str, limit_seconds: float) -> str:
        """Rank 0's text, on every rank; the others wait for it up to limit_seconds. Raises TransportError."""
        store = self._store
        if store is None:
            return text
        key = f"{self._round} decided"
        if self.rank == 0:
            self._call(lambda: store.set(key, text))
            return text
        try:
            store.wait([key], timedelta(seconds=limit_seconds))
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} heard nothing from rank 0 for {limit_seconds:g} s: has it ended?"
            ) from error
        return self._call(lambda: store.get(key)).decode()

    def close(self) -> None:
        """Leave. Rank 0 waits a moment for those that came: its store may be what they read from."""
        store, self._store = self._store, None
        if store is None:
            return
        deadline, mine = time.monotonic() + LINGER_SECONDS, 1
        try:
            while store.add("left", mine) < self._came and self.rank == 0 and time.monotonic() < deadline:
                mine = 0
                time.sleep(0.005)
        except RuntimeError:  # it has gone with rank 0
            return

    def _call(self, call: Callable[[], T]) -> T:
        """What a call of the store gives. Raises TransportError."""
        try:
            return call()
        except RuntimeError as error:
            first = str(error).partition("\n")[0]  # torch may go on with a stack of C++
            raise TransportError(f"rank {self.rank} lost the store where {self.size} ranks meet: {first}") from error
