"""How a failure on one of many ranks is shown: the first rank to fail on top, with its traceback, the others in a line each."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass


class RankFailed(RuntimeError):
    """A rank failed with an exception that cannot be carried over to this process."""


class RankTraceback(Exception):
    """What happened on the ranks: the cause of the exception that `simulate` or `spawn` raises."""


@dataclass(frozen=True)
class Failure:
    """What one rank raised."""

    rank: int
    error: BaseException | None
    """None where the exception could not be carried over."""
    summary: str
    """Type and message."""
    trace: str
    """The formatted traceback, with its causes."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe an exception that was just caught on `rank`."""
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return cls(rank, error, f"{type(error).__name__}: {error}", "".join(lines))


def raise_first(failures: Sequence[Failure], size: int) -> None:
    """Raise the first failure's own exception, caused by a `RankTraceback` that tells of all; nothing if there is none.

    `failures` are in the order in which they happened.
    """
    if not failures:
        return
    first, *others = failures
    story = [f"rank {first.rank} of {size} failed first:\n{first.trace}"]
    story += [f"then rank {other.rank}: {other.summary.splitlines()[0]}" for other in others]
    error = first.error if first.error is not None else RankFailed(f"rank {first.rank}: {first.summary}")
    raise error from RankTraceback("\n".join(story))
