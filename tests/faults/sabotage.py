"""A rank of `megatrain train` in which something breaks at a given moment: python sabotage.py 'ACT' train CONFIG ...

ACT is JSON: {"what": an action, "where": a place, "ranks": [1] (null: all), "at": which visit of the place, from 1, "told": FILE}. When
it happens, the moment is written to FILE, in seconds of the clock that all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ACT = json.loads(sys.argv[1]) if __name__ == "__main__" else {}
_visits: dict[str, int] = {}


def _sleep() -> None:
    time.sleep(1000)


def _suspend() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def _unlimit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


ACTIONS: dict[str, Callable[[], None]] = {
    "sleep": _sleep,
    "stop": _suspend,
    "kill": _kill,
    "terminate": _terminate,
    "limit": _limit,
}


def visit(place: str) -> None:
    """Called at every visit of a place: act, if it is the one."""
    if ACT["where"] != place:
        return
    _visits[place] = _visits.get(place, 0) + 1
    first = ACT["at"]
    if ACT["what"] == "limit" and _visits[place] == first + ACT.get("during", 10**9):
        _unlimit()
    if ACT["what"] == "slow" and _visits[place] >= first:
        time.sleep(ACT["seconds"])
    if _visits[place] == first:
        Path(ACT["told"]).write_text(str(time.monotonic()))
        if ACT["what"] in ACTIONS:
            ACTIONS[ACT["what"]]()


def before(owner: Any, name: str, place: str) -> None:
    """Visit a place before each call of a function."""
    function = getattr(owner, name)

    def around(*args: Any, **kwargs: Any) -> Any:
        visit(place)
        return function(*args, **kwargs)

    setattr(owner, name, around)


def spoil_gradient() -> None:
    """At one step, or `during` so many, one element of one gradient is `value`, or all are `factor` times as large."""
    from megatrain.parallel.zero import FlatParameters

    reduce = FlatParameters.reduce

    def spoiled(flat: FlatParameters) -> None:
        visit("step")
        if _visits["step"] in range(ACT["at"], ACT["at"] + ACT.get("during", 1)):
            found = gradients(flat)
            if "value" in ACT:
                found[0].view(-1)[0] = float(ACT["value"])
            for gradient in found:
                gradient.mul_(ACT.get("factor", 1.0))
        reduce(flat)

    FlatParameters.reduce = spoiled


def gradients(flat: Any) -> list[torch.Tensor]:
    """Gradients of this rank before they are reduced."""
    return [shard.gradient for shard in flat.owned if shard.counts]


def set_clock_back(seconds: float) -> None:
    """Wall time is earlier than it is; the monotonic clock goes on."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() - seconds
    time.time_ns = lambda: real_ns() - int(seconds * 1e9)


def install() -> None:
    """Put the act in its place."""
    import megatrain.watch
    from megatrain import program
    from megatrain.checkpoint.save import Saver
    from megatrain.data.loader import Loader
    from megatrain.transport.shared_memory import SharedSlots

    if ACT["what"] == "gradient":
        return spoil_gradient()
    if ACT["what"] == "clock":
        return set_clock_back(ACT["seconds"])
    before(program, "open_data", "start")
    before(SharedSlots, "__init__", "mapping")
    before(Loader, "batch", "step")
    before(Loader, "build", "data")
    before(megatrain.watch, "evaluate", "evaluation")
    before(Saver, "_stage", "save")
    before(Saver, "_conclude", "publishing")
    before(megatrain.watch.Watch, "finished", "end")
    for name in ("fsync", "rename", "replace", "unlink", "mkdir", "ftruncate", "pwrite"):
        before(os, name, "file")


if __name__ == "__main__":
    sys.argv = ["megatrain", *sys.argv[2:]]
    if ACT["ranks"] is None or int(os.environ.get("RANK", "0")) in ACT["ranks"]:
        install()
    from megatrain.cli.main import main

    sys.exit(main())
