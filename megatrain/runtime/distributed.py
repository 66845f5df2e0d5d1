"""Join the other processes of a job.

`connect` chooses device, backend and network interface and joins the world that a `Launch` describes; a world of one rank opens no
socket and makes no process group. It returns a `Session` with two calls for start-up code, so that no rank waits for one that has failed:

    with session.together("reading the data"):      # if one rank cannot read, every rank ends with that rank and its error
        data = open_data(config)
    session.same("config", text)                    # if ranks have different configs, all end with the ranks and the first difference
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch

from megatrain.config.schema import ParallelConfig
from megatrain.files import OneLine
from megatrain.runtime.interface import Interface, use
from megatrain.runtime.launch import Launch, LaunchError
from megatrain.runtime.waiting import has_policy
from megatrain.transport.consensus import broadcast_text, lowest
from megatrain.transport.group import Group, TransportError, World
from megatrain.transport.processes import Rendezvous, TorchWorld
from megatrain.transport.wrappers import RecordedWorld, Recorder

BACKEND_MARGIN_SECONDS = 45.0
"""A backend's collective may take this much longer than the longest limit of the guard, whose verdict names the culprit, and comes at
most 30 s after the limit, before NCCL's watchdog ends the process."""


class RemoteError(OneLine, RuntimeError):
    """Another rank failed; the message names the rank, what it did, and its error."""


class LoneWorld(World):
    """A world of one rank, without groups or sockets."""

    rank = 0
    size = 1

    def group(self, name: str, ranks: Sequence[int]) -> Group:
        """Raise TransportError: an axis of size 1 has no group."""
        raise TransportError(f"axis {name}: a world of 1 rank has no group of ranks {list(ranks)}")


@dataclass(frozen=True)
class Session:
    """A process that has joined its world."""

    launch: Launch
    world: World
    device: torch.device
    backend: Literal["none", "gloo", "nccl"]
    recorder: Recorder
    everyone: Group | None
    """The group of all ranks, used at start and end; None in a world of 1."""
    threads: str
    """Number of CPU threads of this rank and the reason, as text for the start-up line."""
    interface: Interface | None = None
    """The chosen network interface; None if none was chosen."""

    @property
    def rank(self) -> int:
        """This rank."""
        return self.world.rank

    def describe(self) -> str:
        """The start-up line: world, launcher, device, backend, threads."""
        size = self.world.size
        ranks = (
            "1 process"
            if size == 1
            else f"{size} ranks ({self.launch.local_world_size} on this node) by {self.launch.launcher}"
        )
        over = "" if self.backend == "none" else f" over {self.backend}"
        staged = " through pinned host memory" if self.backend == "gloo" and self.device.type == "cuda" else ""
        through = "" if self.interface is None else f" through {self.interface}"
        return f"{ranks} on {self.device.type}{over}{through}{staged}, {self.threads}"

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the body on every rank; if it raises on one, all ranks raise at once: that rank its own error, the others RemoteError.

        The body must not call collectives: if it failed between them, the other ranks would wait. Costs one collective of 8 bytes.
        """
        failure: Exception | None = None
        try:
            yield
        except TransportError:
            raise  # ranks no longer agree on their calls: one more collective would hang
        except Exception as error:
            failure = error
        culprit = lowest(failure is not None, self.everyone, self.device)
        if culprit is None:
            return
        message = broadcast_text(f"{type(failure).__name__}: {failure}", self.everyone, self.device, culprit)
        if failure is not None:
            raise failure
        raise RemoteError(f"rank {culprit} failed while {what}: {message}")

    def same(self, what: str, value: str, advice: str = "") -> None:
        """Raise RemoteError on every rank unless all have the same text; the error names the ranks that differ, and the first line.

        advice: what to do about it, the end of the error.
        """
        if self.everyone is None:
            return
        digest = hashlib.sha256(value.encode()).digest()
        words = torch.tensor([int.from_bytes(digest[i : i + 7], "big") for i in range(0, 28, 7)], dtype=torch.int64)
        extremes = torch.cat((words, -words)).to(self.device)
        self.everyone.all_reduce(extremes, "max")
        extremes = self.everyone.to_host(extremes)
        if bool((extremes[:4] == -extremes[4:]).all()):
            return
        first = broadcast_text(value, self.everyone, self.device)
        culprit = lowest(value != first, self.everyone, self.device)
        if culprit is None:
            raise RemoteError(f"the {what} differs between ranks, but none differs from rank 0's: the transport corrupts data")
        other = broadcast_text(value, self.everyone, self.device, culprit)
        mine = torch.tensor([[first, other, value].index(value)], dtype=torch.int64, device=self.device)
        kinds = torch.empty(self.everyone.size, dtype=torch.int64, device=self.device)
        self.everyone.all_gather(kinds, mine)
        groups = [
            [rank for rank, kind in enumerate(self.everyone.to_host(kinds).tolist()) if kind == which] for which in range(3)
        ]
        raise RemoteError(
            f"The {what} differs between ranks: {_first_difference(first, other, *groups)}{advice and f' {advice}'}"
        )

    def close(self) -> None:
        """Leave the world; no call may follow."""
        self.world.close()


def _first_difference(first: str, other: str, with_first: list[int], with_other: list[int], others: list[int]) -> str:
    """The first line in which two texts differ, and the ranks that have each of them, or another one."""
    also = f" Of yet another one: {named(others)}." if others else ""
    for number, (a, b) in enumerate(zip_longest(first.splitlines(), other.splitlines()), 1):
        if a != b:
            shown = ["nothing" if line is None else repr(line) for line in (a, b)]
            return f"line {number} is {shown[0]} on {named(with_first)} and {shown[1]} on {named(with_other)}.{also}"
    return f"only in the ends of lines, between {named(with_first)} and {named(with_other)}.{also}"


def named(ranks: Sequence[int]) -> str:
    """Some ranks, as text: `rank 3`, `ranks 0, 1, 2`, at most 8 of them."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def connect(
    launch: Launch,
    parallel: ParallelConfig,
    timeout_seconds: float,
    env: MutableMapping[str, str] = os.environ,
    *,
    join_seconds: float | None = None,
    met: Callable[[], None] = lambda: None,
    job: str = "a job that trains nothing",
) -> Session:
    """Join the world. timeout_seconds: longest that a call may take; join_seconds: how long to wait here for ranks that do not come
    (None: as long); met: called when the store where the ranks meet is reached; job: what tells it from others, in words.

    Sets the environment variables that tell the backends their network interface (`interface.py`). Raises LaunchError if device, backend
    or interface is not available, TransportError if the world cannot be joined.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device, backend = choose_device(parallel, launch, gpus)
    threads = _set_threads(launch, device, env)
    recorder = Recorder()
    if launch.world_size == 1:
        return Session(launch, LoneWorld(), device, "none", recorder, None, threads)
    interface = use(launch, env)
    if launch.master_addr is None or launch.master_port is None:
        raise LaunchError(f"a world of {launch.world_size} ranks needs MASTER_ADDR and MASTER_PORT to say where they meet.")
    inner = TorchWorld.connect(
        launch.rank,
        launch.world_size,
        backend=backend,
        rendezvous=Rendezvous(
            (launch.master_addr, launch.master_port), launch.launcher_serves, launch.store_prefix, job, launch.joining_key
        ),
        device=device,
        timeout_seconds=timeout_seconds + BACKEND_MARGIN_SECONDS,
        join_seconds=timeout_seconds if join_seconds is None else join_seconds,
        met=met,
    )
    world = RecordedWorld(inner, recorder)
    everyone = world.group("world", range(launch.world_size))
    return Session(launch, world, device, backend, recorder, everyone, threads, interface)


def choose_device(parallel: ParallelConfig, launch: Launch, gpus: int) -> tuple[torch.device, Literal["gloo", "nccl"]]:
    """The device of this rank and the backend of the world, on a machine with `gpus` GPUs. Raises LaunchError."""
    if parallel.device == "cuda" and gpus == 0:
        raise LaunchError("parallel.device=cuda, but PyTorch finds no GPU here. Use parallel.device=cpu or auto.")
    cuda = parallel.device == "cuda" or (parallel.device == "auto" and gpus > 0)
    backend: Literal["gloo", "nccl"] = "nccl" if parallel.backend == "nccl" or (parallel.backend == "auto" and cuda) else "gloo"
    if backend == "nccl" and not cuda:
        raise LaunchError(
            "parallel.backend=nccl needs tensors on GPUs, but they are on the CPU. Use parallel.backend=gloo or auto."
        )
    own = gpus == 1 and launch.launcher == "srun"  # --gpus-per-task=1: each task sees only its own GPU, as device 0
    if backend == "nccl" and launch.local_world_size > gpus and not own:
        raise LaunchError(
            f"{launch.local_world_size} ranks on this node share {gpus} GPUs, but NCCL allows one rank per GPU. "
            f"Use parallel.backend=gloo, or at most {gpus} ranks here."
        )
    return torch.device("cuda", launch.local_rank % gpus) if cuda else torch.device("cpu"), backend


def cores_here() -> set[int]:
    """Numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _set_threads(launch: Launch, device: torch.device, env: Mapping[str, str]) -> str:
    """Divide the cores among the ranks of this node, unless OMP_NUM_THREADS is set; returns text for the start-up line."""
    cores = len(cores_here())
    share = min(launch.cores, cores) if launch.cores else max(1, cores // launch.local_world_size)
    if not env.get("OMP_NUM_THREADS"):
        if launch.local_world_size > 1:
            torch.set_num_threads(share)
        threads = torch.get_num_threads()
        spins = threads > 1 and device.type == "cpu" and not has_policy(env)
        late = ", which wait busily, since torch was imported before megatrain: slow on cores that others use too"
        return f"CPU threads of a rank: {threads} of {cores} cores{late * spins}"
    note = f"CPU threads of a rank: {torch.get_num_threads()} (OMP_NUM_THREADS={env['OMP_NUM_THREADS']}"
    if launch.launcher == "torchrun" and env["OMP_NUM_THREADS"] == "1" and share > 1 and device.type == "cpu":
        # torchrun sets 1 if the user has set nothing; here the two cannot be told apart.
        note += f", perhaps by torchrun: set OMP_NUM_THREADS={share} to use all {cores} cores"
    return note + ")"
