"""What the fuzzers share: a fresh seed for each session, told at its start, and how long each of them goes on.

MEGATRAIN_FUZZ_SEED=N   the same cases again; case n of a seed is the same whatever ran before it and however fast
MEGATRAIN_FUZZ_SECONDS  how long each fuzzer goes on, instead of its own time
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from functools import cache

SEED, SECONDS = "MEGATRAIN_FUZZ_SEED", "MEGATRAIN_FUZZ_SECONDS"


@cache
def seed() -> int:
    """The seed of this session's fuzzers: given by the environment, else fresh."""
    given = os.environ.get(SEED)
    return random.SystemRandom().randrange(1 << 31) if given is None else int(given)


def seconds(slow: bool = False, short: float = 6.0, long: float = 300.0) -> float:
    """How long a fuzzer goes on; `slow` is for those that only `launch/test.sh --all` runs."""
    return float(os.environ.get(SECONDS, long if slow else short))


def cases(limit: float, kind: str, enough: Callable[[], bool] = lambda: True) -> Iterator[tuple[str, random.Random]]:
    """(name, generator) of each case for `limit` seconds, at least one; the name says how to have the same cases again.

    enough: whether the cases so far will do; on a busy machine more follow than there was time for.
    """
    began = time.monotonic()
    for number in range(1 << 31):
        if number and time.monotonic() - began > limit and enough():
            return
        yield f"case {number} of {SEED}={seed()}", random.Random(f"{seed()}/{kind}/{number}")
