"""The process behind one rank of `spawn`: `python -m megatrain.testing.worker PIPE_FD RANK STACK_FILE`."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import reduce
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatrain.parallel.mesh import ParallelContext
from megatrain.testing.failure import Failure
from megatrain.testing.spawn import RankAnswer, Task
from megatrain.transport.group import TransportError
from megatrain.transport.processes import Rendezvous, TorchWorld


def main() -> None:
    """Do tasks until the parent process closes the pipe."""
    number, rank, stacks = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    pipe = Connection(number)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        pipe.send("ready")
        while True:
            try:
                task, args = pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            pipe.send(_do(task, args, rank))


def end_with_parent(parent: int) -> None:
    """End this process when its parent does, even from inside a collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(task: Task, args: bytes, rank: int) -> RankAnswer:
    """Do one task with connections of its own, then close them, so that ranks that still wait for this one fail at once."""
    world = None
    try:
        sys.path[:] = task.path
        fn = _find(task)
        world = TorchWorld.connect(
            rank, task.shape.world, backend="gloo", rendezvous=Rendezvous(task.rendezvous), timeout_seconds=task.timeout_seconds
        )
        answer = _call(world, task, fn, args)
    except BaseException as error:
        failure = Failure.of(rank, error)
        answer = RankAnswer(_pickled(error), time.monotonic(), failure.summary, failure.trace)
    if answer.failed_at is not None:
        gc.collect()  # the frames of the exception refer to the groups, and would keep the connections open
    if world is not None:
        world.close()
    return answer


def _call(world: TorchWorld, task: Task, fn: Callable[..., Any], args: bytes) -> RankAnswer:
    """Call the function; return when every rank has called it."""
    ctx = ParallelContext.build(world, task.shape)
    answer = RankAnswer(pickle.dumps(fn(ctx, *pickle.loads(args))))
    if ctx.world.group is not None:
        with contextlib.suppress(TransportError):  # another rank failed, and reports it itself
            ctx.world.group.barrier()  # no rank may close while another still receives from it
    return answer


def _pickled(error: BaseException) -> bytes:
    """The pickled exception; empty if it cannot be pickled and unpickled."""
    try:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return b""
    return data


def _find(task: Task) -> Callable[..., Any]:
    """The function of a task, from a module that is loaded from its file once and then kept under its name."""
    module = sys.modules.get(task.module)
    if module is None or getattr(module, "__file__", None) != task.file:
        # Loaded under the name __main__, a script would run again.
        name = "__spawned__" if task.module == "__main__" else task.module
        spec = importlib.util.spec_from_file_location(name, task.file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {task.file}, where {task.qualname} is defined")
        module = importlib.util.module_from_spec(spec)
        sys.modules[task.module] = sys.modules[name] = module
        spec.loader.exec_module(module)
    return reduce(getattr, task.qualname.split("."), module)  # type: ignore[return-value]


if __name__ == "__main__":
    main()
