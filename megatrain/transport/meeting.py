"""Ranks exchange short texts through the store where they meet, before a group exists, or where none can be made.

A rank that could not join the others' group (its network interface is missing, it has no GPU) can still report it here, and rank 0 can
still end all of them at once. All ranks write, only rank 0 reads them all: the cost for any other rank does not grow with their number.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from megatrain.transport.board import Board
from megatrain.transport.group import TransportError
from megatrain.transport.store import ANSWER_SECONDS, answer_seconds, open_store

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
        self._came = list(range(size))
        self._round = 0
        self._board: Board | None = None
        if size == 1:
            return
        store = open_store(rank, size, rendezvous, timedelta(seconds=limit_seconds), rank == 0 and not launcher_serves)
        self._board = Board(PrefixStore(prefix, store), answer_seconds(size), key)
        if launcher_serves:
            return
        if rank == 0:
            self._board.write("open", "")
        elif self._board.wait("open", ANSWER_SECONDS + SECONDS_PER_RANK * size) is None:
            raise TransportError(
                f"rank {rank} found a store at {rendezvous[0]}:{rendezvous[1]} that is not served by rank 0 of this job: another job "
                "uses the port. Choose another MASTER_PORT."
            )

    def collect(self, text: str, limit_seconds: float) -> dict[int, str]:
        """At rank 0: rank -> text of the ranks that wrote within limit_seconds. On other ranks: {}. Raises TransportError."""
        board, size = self._board, self.size
        if board is None:
            return {0: text}
        self._round += 1
        words = [f"{self._round} from {rank}" for rank in range(size)]
        board.write(words[self.rank], text)
        if self.rank != 0:
            return {}
        found = board.gather(words, limit_seconds)
        found = board.read_all(words) if found is None else found
        self._came = [rank for rank, word in enumerate(words) if word in found]
        return {rank: found[words[rank]] for rank in self._came}

    def decide(self, text: str, limit_seconds: float) -> str:
        """Rank 0's text, on every rank; the others wait for it up to limit_seconds. Raises TransportError."""
        board = self._board
        if board is None:
            return text
        key = f"{self._round} decided"
        if self.rank == 0:
            board.write(key, text)
            return text
        silent = f"rank {self.rank} heard nothing from rank 0 for {limit_seconds:g} s: has it ended?"
        try:
            said = board.wait(key, limit_seconds)
            strange = said is None and board.complete([key])
        except TransportError as error:
            raise TransportError(silent) from error
        if said is not None:
            return said
        if strange:
            silent = f"rank {self.rank} found under {key!r} what rank 0 has not written, for {limit_seconds:g} s"
        raise TransportError(silent)

    def close(self) -> None:
        """Leave. Rank 0 waits up to LINGER_SECONDS for the ranks that came: it may serve the store that they still read from."""
        board, self._board = self._board, None
        if board is None:
            return
        with suppress(TransportError):  # it has gone with rank 0
            board.write(f"left {self.rank}", "")
            if self.rank == 0:
                board.gather([f"left {rank}" for rank in self._came], LINGER_SECONDS)
