"""How the ranks of a job join at the store, before there is any group, and leave it together.

Each rank writes a word of its own; rank 0 alone reads all of them, and answers all with one: the cost for any other rank does not grow with
their number. Words are sealed (`board.py`), so that a stranger neither starts nor ends a job, nor comes in a rank's place.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from datetime import timedelta

from megatrain.files import brief, shown
from megatrain.transport.board import POLL_SECONDS, Board, parts
from megatrain.transport.group import TransportError
from megatrain.transport.store import ATTEMPT_SECONDS, answer_seconds, headline, other_port, within

_AGAIN = "again"
"""Rank 0's answer where a stranger has replaced a rank's word: all come once more."""
_AGAIN_SECONDS = 0.5
_MOST_TWICE = 64
"""More processes than these that come as a rank that another is are not counted."""
_SHOWN = 16
"""A message lists at most this many missing ranks."""
_LOOKERS = 3
"""One rank of those that wait in vain looks who is missing; where it has died, another, so often."""


def require_own(board: Board, rank: int, size: int, job: str, port: int) -> None:
    """Raise TransportError on a rank that has come to the store of another job, which then hears nothing of it. Rank 0 serves the store.

    job: what tells this job from others, in words. port: of the store, for the message.
    """
    mine, seconds = f"{job}, of {size} ranks", answer_seconds(size)
    if rank == 0:
        board.write("job", mine)
        return
    what = f"rank {rank} has reached the store where the ranks meet: it"
    theirs = within(seconds + ATTEMPT_SECONDS, lambda: board.wait("job", seconds), what)
    if theirs not in (mine, None):  # None: nobody has the same secret here, and `meet_all` says who does not come
        raise TransportError(
            f"rank {rank}: another job uses this port (MASTER_PORT={port}): {brief(theirs)}; this one is {mine}. "
            f"{other_port(port)} Or, if they are to be one job, give all its ranks the same config and number of ranks."
        )


def claim_rank(board: Board, rank: int, size: int, device: str = "") -> str:
    """Come as a rank; returns its word. Raises TransportError where another process has; where a rank is missing for that, all are told.

    device: name of a device that this rank needs for itself.
    """
    word = f"{secrets.token_hex(8)} {device}"
    try:
        if board.claim(f"rank {rank}", word) == word:
            return word
        said = f"{word}\n{_twice(rank, size)}"
        next((at for at in range(_MOST_TWICE) if board.claim(f"twice {at}", said) == said), None)
    except TransportError as error:
        raise TransportError(f"rank {rank} lost the store as it came: {headline(error)}") from error
    raise TransportError(_twice(rank, size))


def _twice(rank: int, size: int) -> str:
    return (
        f"two processes have come as rank {rank} of {size}. Give each its own RANK, from 0 to {size - 1}; if each has, one of them is "
        "of another job, which needs another MASTER_PORT."
    )


def meet_all(board: Board, rank: int, size: int, limit: timedelta, word: str) -> None:
    """Return when all ranks have come. Raises TransportError that lists the ranks that have not.

    word: that with which this rank has come (`claim_rank`). If two ranks need the same device, all ranks raise.
    """
    try:
        said = _answer(board, rank, size, word, time.monotonic() + limit.total_seconds())
        lost = None
    except TransportError as error:
        said, lost = None, error
    if said is None:
        try:
            absent = _missing(board, rank, size)
        except TransportError as error:
            raise TransportError(
                f"rank {rank} lost the store while it waited for {size} ranks: {headline(lost or error)}"
            ) from error
        raise TransportError(
            f"rank {rank} waited {round(limit.total_seconds(), 1):g} s, but of {size} ranks {absent} did not come. "
            "Were they started, with the same world size, MASTER_ADDR, MASTER_PORT and MEGATRAIN_SECRET?"
        ) from lost
    if said:
        raise TransportError(shown(said))


def _answer(board: Board, rank: int, size: int, word: str, end: float) -> str | None:
    """The fault of the ranks that have come, as a message, empty if nothing is; None if some have not at `end` (time.monotonic)."""
    turn = 0
    while True:
        place = f"all here {turn}"
        if board.claim(f"rank {rank}", word) != word:
            return _twice(rank, size)
        answer = _decide(board, place, size, end) if rank == 0 else board.wait(place, max(0.0, end - time.monotonic()))
        if answer != _AGAIN:
            return answer
        turn += 1


def _decide(board: Board, place: str, size: int, end: float) -> str | None:
    """At rank 0: the answer for all ranks, written for them; None if some have not come at `end`."""
    words: dict[str, str] = {}
    for part in parts([f"rank {rank}" for rank in range(size)]):
        while not board.complete(part):
            twice = _come_twice(board, size) if board.complete(["twice 0"]) else ""
            if twice:
                return board.claim(place, twice)
            if time.monotonic() > end:
                return None
            time.sleep(POLL_SECONDS)
        words |= board.read_all(part)
    if len(words) == size:
        return board.claim(place, _clash(words))
    if time.monotonic() > end:
        return None
    time.sleep(_AGAIN_SECONDS)
    return board.claim(place, _AGAIN)


def _come_twice(board: Board, size: int) -> str:
    """The message of processes that have come as a rank that another is, once they are as many as the ranks that are missing."""
    time.sleep(_AGAIN_SECONDS)
    twice = board.read_all([f"twice {at}" for at in range(_MOST_TWICE)])
    come = board.read_all([f"rank {rank}" for rank in range(size)])
    return next(iter(twice.values())).partition("\n")[2] if twice and len(come) < size <= len(come) + len(twice) else ""


def _clash(words: Mapping[str, str]) -> str:
    """The first two ranks that would use one device, as a message; empty if there are none."""
    users: dict[str, str] = {}
    for rank, word in words.items():
        device = word.partition(" ")[2]
        if device and device in users:
            return (
                f"{users[device]} and {rank} would use the same GPU, {device}, but NCCL allows one rank per GPU. Start fewer ranks on "
                "their node, give each task a GPU (srun --gpus-per-task=1), or use parallel.backend=gloo."
            )
        users[device] = rank
    return ""


def _missing(board: Board, rank: int, size: int) -> str:
    """The ranks that have not come, as text for a message. All waiting ranks ask at once: one of them looks, and tells the others."""
    for turn in range(_LOOKERS):
        place = f"missing {turn}"
        if board.claim(f"looks {turn}", f"{rank}") == f"{rank}":
            keys = [f"rank {other}" for other in range(size)]
            come = board.read_all(keys)
            absent = [other for other, key in enumerate(keys) if key not in come and other != rank]
            more = len(absent) - _SHOWN
            said = f"{absent[:_SHOWN]}" + f" and {more} more" * (more > 0)
            board.write(place, said)
            return said
        told = board.wait(place, answer_seconds(size))
        if told is not None:
            return brief(told)
    return "some"


def leave_all(board: Board, rank: int, size: int, seconds: float) -> None:
    """Return when all ranks leave, or after `seconds`. Raises TransportError if the store goes before."""
    board.write(f"leaves {rank}", "")
    if rank != 0:
        board.wait("all leave", seconds)
    elif board.gather([f"leaves {other}" for other in range(size)], seconds) is not None:
        board.write("all leave", "")
