"""Ranks exchange short texts through the store where they meet, before a group exists, or where none can be made.

A rank that could not join the others' group (its network interface is missing, it has no GPU) can still report it here, and rank 0 can
still end all of them at once. All ranks write, only rank 0 reads them all: the cost for any other rank does not grow with their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from megatrain.transport.group import TransportError
from megatrain.transport.seal import Seal
from megatrain.transport.store import ANSWER_SECONDS, open_store

T = TypeVar("T")

SECONDS_PER_RANK = 0.002
"""Time of the store that each rank may take when many connect at once."""
LINGER_SECONDS = 5.0
"""How long rank 0, whose process may serve the store, waits for the others to read its decision."""


class Meeting:
    """The ranks of a job at a store. All call the same methods in the same order; a job of 1 rank needs no store."""

    def __init__(
        self,
        rank: int,
        size: int,
        rendezvous: tuple[str, int],
        limit_seconds: float,
        *,
        launcher_serves: bool,
        prefix: str,
        key: bytes = b"",
    ) -> None:
        """Reach the store at rendezvous (host, port), which rank 0 serves unless the launcher does, within limit_seconds.

        prefix: keeps this meeting apart from other users of the store. key: what the ranks share, to seal texts with.

        Raises TransportError: on rank 0 where the port is in use; on the others where nothing answers in time, or something that is not
        this job's store does.
        """
        self.rank = rank
        self.size = size
        self._came = size
        self._round = 0
        self._seal = Seal(key)
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
        """At rank 0: rank -> text of the ranks that wrote within limit_seconds. On other ranks: {}. Raises TransportError."""
        store, size = self._store, self.size
        if store is None:
            return {0: text}
        self._round += 1
        words = [f"{self._round} from {rank}" for rank in range(size)]
        everyone = f"{self._round} all"

        def tell() -> None:
            store.set(words[self.rank], self._seal.close(words[self.rank], text))
            if store.add(f"{self._round} came", 1) == size:
                store.set(everyone, "")

        self._call(tell)
        if self.rank != 0:
            return {}
        try:
            store.wait([everyone], timedelta(seconds=limit_seconds))
            came = list(range(size))
        except RuntimeError:  # some do not come: who has?
            came = self._call(lambda: [rank for rank in range(size) if store.check([words[rank]])])
        self._came = len(came)
        texts = self._call(lambda: store.multi_get([words[rank] for rank in came]))
        opened = {rank: self._seal.open(words[rank], said) for rank, said in zip(came, texts, strict=True)}
        return {rank: said for rank, said in opened.items() if said is not None}

    def decide(self, text: str, limit_seconds: float) -> str:
        """Rank 0's text, on every rank; the others wait for it up to limit_seconds. Raises TransportError."""
        store = self._store
        if store is None:
            return text
        key = f"{self._round} decided"
        if self.rank == 0:
            self._call(lambda: store.set(key, self._seal.close(key, text)))
            return text
        end = time.monotonic() + limit_seconds
        while (left := end - time.monotonic()) > 0:
            try:
                store.wait([key], timedelta(seconds=left))
            except RuntimeError as error:
                silent = f"rank {self.rank} heard nothing from rank 0 for {limit_seconds:g} s: has it ended?"
                raise TransportError(silent) from error
            said = self._seal.open(key, self._call(lambda: store.get(key)))
            if said is not None:
                return said
            time.sleep(0.05)
        raise TransportError(f"rank {self.rank} found under {key!r} what rank 0 has not written, for {limit_seconds:g} s")

    def close(self) -> None:
        """Leave. Rank 0 waits up to LINGER_SECONDS for the ranks that came: it may serve the store that they still read from."""
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
        """The result of a call of the store. Raises TransportError."""
        try:
            return call()
        except RuntimeError as error:
            first = str(error).partition("\n")[0]  # torch may go on with a stack of C++
            raise TransportError(f"rank {self.rank} lost the store where {self.size} ranks meet: {first}") from error
