"""Errors of many ranks as one: the first rank to fail with its traceback, the others in a line each."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass


class RankFailed(RuntimeError):
    """A rank failed with an exception that cannot be pickled for this process."""


class RankTraceback(Exception):
    """The failures of all ranks: the cause of the exception that `simulate` or `spawn` raises."""


@dataclass(frozen=True)
class Failure:
    """The failure of one rank."""

    rank: int
    error: BaseException | None
    """The exception; None if it could not be pickled."""
    summary: str
    """Type and message of the exception."""
    trace: str
    """The formatted traceback, with its causes."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe an exception that was just caught on `rank`."""
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return cls(rank, error, f"{type(error).__name__}: {error}", "".join(lines))


def raise_first(failures: Sequence[Failure], size: int) -> None:
    """Raise the first failure's own exception, caused by a `RankTraceback` with all failures; return if there are none.

    `failures` are in the order in which they happened.
    """
    if not failures:
        return
    first, *others = failures
    story = [f"rank {first.rank} of {size} failed first:\n{first.trace}"]
    story += [f"then rank {other.rank}: {other.summary.splitlines()[0]}" for other in others]
    error = first.error if first.error is not None else RankFailed(f"rank {first.rank}: {first.summary}")
    raise error from RankTraceback("\n".join(story))
