"""The loop of a worker: it takes the next chore that nobody has, until all phases are done."""

from __future__ import annotations

import time
from collections.abc import Iterable

from megatrain.corpus.work.chores import LEASES, Chore, Phase, Published
from megatrain.corpus.work.leases import Leases

SHORTEST_WAIT, LONGEST_WAIT = 0.05, 1.0
"""Seconds until a worker without a chore looks again."""


def work_on(phases: Iterable[Phase], published: Published, stuck_seconds: float, run: str = "") -> None:
    """Do the chores of all phases, with whoever else does; a phase is asked for when the one before it is done.

    stuck_seconds, run: as of `Leases`. Raises what a chore raises, LostWorkersError, and OtherWorkError.
    """
    leases = Leases(published.root / LEASES, stuck_seconds, run)
    try:
        leases.require_alone(leases.signs().values(), first=True)
        for phase in phases:
            wait = SHORTEST_WAIT
            while open_chores := _open(phase, published):
                signs, worked = leases.signs(), False
                leases.require_alone(signs.values(), first=False)
                for chore in open_chores:
                    name = f"{phase.name}.{chore.name}"
                    sign = signs.get(name)
                    if (sign is None or sign.left) and not published.is_done(phase, chore.name):
                        with leases.held(name, sign, chore.steady, chore.about) as lease:
                            if lease is not None and not published.is_done(phase, chore.name):
                                published.publish(phase, chore, lease.progress)
                                worked = True
                        if worked:
                            leases.forget(name)
                            break
                wait = SHORTEST_WAIT if worked else min(2 * wait, LONGEST_WAIT)
                if not worked:
                    time.sleep(wait)
            published.sweep(phase)
    finally:
        leases.leave()


def _open(phase: Phase, published: Published) -> list[Chore]:
    """The chores of a phase that are not published."""
    done = published.done(phase)
    return [chore for chore in phase.chores if chore.name not in done]
