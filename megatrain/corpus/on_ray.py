"""Workers as tasks of a Ray cluster, which have nothing to do with each other but the output folder that they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatrain.corpus.work.pool import PoolError
from megatrain.extras import need

LOOK_SECONDS = 1.0


def run_on_ray(main: Callable[[list[str]], int], words: Sequence[str], count: int | None, look: Callable[[], None]) -> None:
    """Run `main` with some words so many times at once on the cluster that RAY_ADDRESS names, or on one that is made here.

    count: None: one for each of its cores. look: called now and then meanwhile. A worker whose machine is lost is started again by Ray.
    Raises PoolError when a worker has failed.
    """
    ray = need("ray", "run.on=ray", "ray")
    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True, include_dashboard=False)
    try:
        work = ray.remote(num_cpus=1, max_retries=10)(_work)
        waiting = [work.remote(main, str(Path.cwd()), list(words)) for _ in range(count or int(ray.cluster_resources()["CPU"]))]
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=LOOK_SECONDS)
            look()
            ray.get(ended)
    except ray.exceptions.RayError as error:
        raise PoolError(f"a worker on Ray failed: {getattr(error, 'cause', None) or error}", 1) from None
    finally:
        ray.shutdown()


def _work(main: Callable[[list[str]], int], folder: str, words: list[str]) -> None:
    """Be one worker, on a machine of the cluster."""
    os.chdir(folder)
    if code := main(words):
        raise RuntimeError(f"a worker ended with exit code {code}; what it said stands above")
