"""The loop of a worker: it takes the next task that nobody has, until all stages are done."""

from __future__ import annotations

import time
from collections.abc import Iterable

from megatrain.corpus.work.leases import Leases
from megatrain.corpus.work.tasks import LEASES, Published, Stage

SHORTEST_WAIT, LONGEST_WAIT = 0.05, 2.0
"""Seconds until a worker without a task looks again."""


def work_on(stages: Iterable[Stage], published: Published, stuck_seconds: float) -> None:
    """Do the tasks of all stages, with whoever else does; a stage is asked for when the one before it is done.

    stuck_seconds: as of `Leases`. Raises what a task raises, and LostWorkersError.
    """
    leases = Leases(published.root / LEASES, stuck_seconds)
    try:
        for stage in stages:
            wait = SHORTEST_WAIT
            while open_tasks := [task for task in stage.tasks if not published.is_done(stage, task.name)]:
                signs, worked = leases.signs(), False
                for task in open_tasks:
                    name = f"{stage.name}.{task.name}"
                    sign = signs.get(name)
                    if (sign is None or sign.left) and not published.is_done(stage, task.name):
                        with leases.held(name, sign) as lease:
                            if lease is not None and not published.is_done(stage, task.name):
                                published.publish(stage, task, lease.progress)
                                worked = True
                        if worked:
                            leases.forget(name)
                            break
                wait = SHORTEST_WAIT if worked else min(2 * wait, LONGEST_WAIT)
                if not worked:
                    time.sleep(wait)
            published.sweep(stage)
    finally:
        leases.leave()
