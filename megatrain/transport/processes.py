"""Groups of processes over torch.distributed: gloo between CPUs, NCCL between GPUs; and how the processes of a job meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from megatrain.transport.background import WaitingThread, Work
from megatrain.transport.board import Board
from megatrain.transport.group import (
    BlockRows,
    Group,
    Handle,
    ReduceOp,
    TransportError,
    World,
    name_ranks,
    refuse,
)
from megatrain.transport.joining import claim_rank, leave_all, meet_all, require_own
from megatrain.transport.shared_exchange import Exchanges, reduce_in_order
from megatrain.transport.store import answer_seconds, open_store

_DIST_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# Torch 2.13 renamed these two; 2.9 to 2.12 know the old names alone.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
LINGER_SECONDS = 0.5
"""How long a rank that leaves waits for the others to leave too."""
_MESSAGES, _BLOCKS = 0, 1
"""Message tags on gloo: `send` and `recv` of the caller, and the blocks of collectives that are made of messages."""


def backends() -> list[str]:
    """The backends of megatrain (gloo, nccl) that this torch was built with."""
    built = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return [name for name, available in built.items() if available()]


class _TorchHandle(Handle):
    """The works of one call, the tensors they use, and the functions to run once the works are done."""

    __slots__ = ("_call", "_finish", "_group", "_tensors", "_works")

    def __init__(self, group: TorchGroup, call: str, *tensors: torch.Tensor) -> None:
        self._group = group
        self._call = call
        self._tensors = tensors
        self._works: list[Work] = []
        self._finish: list[Callable[[], object]] = []

    def start(self, start: Callable[..., Work | None], *args: Any, **kwargs: Any) -> None:
        """Start one more asynchronous call of torch.distributed. Raises TransportError."""
        try:
            work = start(*args, group=self._group.process_group, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise self.failed(error) from error
        if work is not None:
            self._works.append(work)

    def follow(self, start: Callable[[], Work]) -> None:
        """Start an exchange through shared memory; `wait` waits for it as for the other works. Raises TransportError."""
        try:
            self._works.append(start())
        except OSError as error:
            raise self.failed(error) from error

    def then(self, finish: Callable[[], object]) -> None:
        """Have `wait` call `finish` when all works are done, after the functions given before."""
        self._finish.append(finish)

    def wait(self) -> None:
        """Block until the outputs may be read. Raises TransportError."""
        works, self._works = self._works, []
        todo, self._finish = self._finish, []
        try:
            for work in works:
                work.wait()
            for finish in todo:
                finish()
        except (RuntimeError, OSError) as error:
            raise self.failed(error) from error
        self._tensors = ()

    def done(self) -> bool:
        """Whether the backend has ended its calls; functions given to `then` may still have to run."""
        return all(work.is_completed() for work in self._works)

    def failed(self, error: Exception) -> TransportError:
        """The TransportError to raise for an error of the backend."""
        shapes = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in self._tensors)
        group = self._group
        problem = f"failed on rank {group.ranks[group.rank]} (limit {group.timeout_seconds:g} s): {error}"
        return refuse(group, f"{self._call} of {shapes}" if shapes else self._call, problem)


def _options(backend: str, limit: timedelta) -> Any:
    """How NCCL runs one group: on a stream of high priority. None with gloo.

    A matmul has more thread blocks than fit on a GPU. As one of them ends, a block of a collective, for which other ranks wait, takes its
    place, and not the matmul's next. Each group needs an options object of its own, since torch writes the group into it.
    """
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = limit  # torch warns where this limit differs from the group's
    return options


class _Connection:
    """The process group and shared memory that the axes over the same ranks share."""

    def __init__(self, process_group: dist.ProcessGroup | None, timeout_seconds: float) -> None:
        self.process_group = process_group
        self.exchanges = Exchanges(timeout_seconds)


class TorchGroup(Group):
    """The ranks along one axis, over torch.distributed. Made by `TorchWorld.group`.

    On gloo, all_gather and reduce_scatter go through shared memory between ranks of one machine, else they are made of
    messages: gloo's own calls move twice the bytes (its reduce_scatter is an all-reduce that drops the other ranks' parts) or copy the
    output once more. Sums are taken in rank order, as in `MemoryGroup`.
    Gloo reads host memory: tensors on a GPU go through pinned copies.
    """

    def __init__(
        self,
        name: str,
        ranks: tuple[int, ...],
        world_rank: int,
        connection: _Connection,
        device: torch.device,
        timeout_seconds: float,
        watch: WaitingThread,
    ) -> None:
        self.name = name
        self.ranks = ranks
        self.rank = ranks.index(world_rank)
        self.timeout_seconds = timeout_seconds
        self._connection = connection
        self._gloo = dist.get_backend(connection.process_group) == "gloo"
        self._watch = watch
        self._staged = self._gloo and device.type == "cuda"
        self._device_ids = None if self._gloo else [device.index or 0]
        self._shared = connection.exchanges

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group of torch; None once it is closed."""
        return self._connection.process_group

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle:
        readable = self._readable(tensor)
        handle = _TorchHandle(self, f"all_reduce({op})", readable)
        handle.start(dist.all_reduce, readable, op=_DIST_OPS[op], async_op=True)
        return self._finish(handle, readable, tensor, blocking)

    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, blocking: bool) -> Handle:
        readable, part = self._readable(output, copy=False), self._readable(tensor)
        handle = _TorchHandle(self, "all_gather", part, readable)
        if self._gloo:
            blocks = _blocks(readable, self.size)
            if not self._staged and self._shared.ready(self, 1, part):
                handle.follow(lambda: self._shared.gather(blocks, part, blocking))
            else:
                self._swap(handle, {place: blocks[place] for place in self._others()}, dict.fromkeys(self._others(), part))
            if blocks[self.rank].data_ptr() != part.data_ptr():
                blocks[self.rank].copy_(part.detach())
        else:
            handle.start(_all_gather_single, readable, part, async_op=True)
        return self._finish(handle, readable, output, blocking)

    def _reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle:
        readable, whole = self._readable(output, copy=False), self._readable(tensor)
        handle = _TorchHandle(self, f"reduce_scatter({op})", whole, readable)
        parts = dict(enumerate(_blocks(whole, self.size)))
        mine = parts[self.rank]
        if self._gloo:
            if not self._staged and self._shared.ready(self, self.size - 1, mine):
                handle.follow(lambda: self._shared.reduce_scatter(readable, parts, op, blocking))
            else:
                received = {place: torch.empty_like(mine) for place in self._others()}
                self._swap(handle, received, {place: parts[place] for place in self._others()})
                parts.update(received)
                handle.then(lambda: reduce_in_order(readable, [parts[place] for place in range(self.size)], op))
        else:
            same = readable.dtype == whole.dtype
            handle.start(_reduce_scatter_single, readable if same else mine, whole, op=_DIST_OPS[op], async_op=True)
            if not same:
                handle.then(lambda: readable.detach().copy_(mine))
        return self._finish(handle, readable, output, blocking)

    def _all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, rows: BlockRows, blocking: bool) -> Handle:
        readable, sent = self._readable(output, copy=False), self._readable(tensor)
        handle = _TorchHandle(self, "all_to_all", sent, readable)
        handle.start(dist.all_to_all_single, readable, sent, rows[1], rows[0], async_op=True)
        return self._finish(handle, readable, output, blocking)

    def _broadcast(self, tensor: torch.Tensor, source: int, blocking: bool) -> Handle:
        readable = self._readable(tensor)
        handle = _TorchHandle(self, f"broadcast({source})", readable)
        handle.start(dist.broadcast, readable, group_src=source, async_op=True)
        return self._finish(handle, readable, tensor, blocking)

    def _send(self, tensor: torch.Tensor, to: int, blocking: bool) -> Handle:
        readable = self._readable(tensor)
        handle = _TorchHandle(self, f"send(to {to})", readable)
        handle.start(self._isend, readable, group_dst=to, tag=_MESSAGES)
        return self._finish(handle, readable, readable, blocking)

    def _recv(self, output: torch.Tensor, source: int, blocking: bool) -> Handle:
        readable = self._readable(output, copy=False)
        handle = _TorchHandle(self, f"recv(from {source})", readable)
        handle.start(dist.irecv, readable, group_src=source, tag=_MESSAGES)
        return self._finish(handle, readable, output, blocking)

    def barrier(self) -> None:
        """Return once every rank of the group has called."""
        handle = _TorchHandle(self, "barrier")
        handle.start(dist.barrier, async_op=True, device_ids=self._device_ids)
        handle.wait()

    def close(self) -> None:
        """Release the connections. Torch's group of all ranks stays until the world closes, as all other groups are made over it."""
        self._shared.close()
        if self.process_group not in (None, dist.group.WORLD):
            dist.destroy_process_group(self.process_group)
        self._connection.process_group = None

    def _isend(self, tensor: torch.Tensor, **kwargs: Any) -> Work | None:
        """Send; on gloo through the watching thread, so that the work can be asked whether it has ended."""
        work = dist.isend(tensor, **kwargs)
        return self._watch.watched(work) if self._gloo and work is not None else work

    def _readable(self, tensor: torch.Tensor, *, copy: bool = True) -> torch.Tensor:
        """`tensor` itself if the backend can read it, else a pinned copy in host memory (with copy=False: pinned, not filled)."""
        if not self._staged:
            return tensor
        readable = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        return readable.copy_(tensor.detach()) if copy else readable

    def _finish(self, handle: _TorchHandle, readable: torch.Tensor, output: torch.Tensor, blocking: bool) -> Handle:
        """The handle; copies `readable` back to `output` if they differ, and waits if blocking."""
        if readable is not output:
            handle.then(lambda: output.detach().copy_(readable, non_blocking=True))
        if blocking:
            handle.wait()
        return handle

    def _others(self) -> list[int]:
        """The other places, starting with the next one, so that ranks do not all begin with place 0."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _swap(self, handle: _TorchHandle, received: dict[int, torch.Tensor], sent: dict[int, torch.Tensor]) -> None:
        """Start to receive a block from, and to send one to, each other place."""
        for place, block in received.items():
            handle.start(dist.irecv, block, group_src=place, tag=_BLOCKS)
        for place, block in sent.items():
            handle.start(dist.isend, block, group_dst=place, tag=_BLOCKS)


def _blocks(whole: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """The `size` equal blocks of dim 0, as views that autograd does not see."""
    data = whole.detach()
    return data.view(size, data.shape[0] // size, *data.shape[1:]).unbind(0)


class Rendezvous(NamedTuple):
    """The store where the ranks of a job meet."""

    at: tuple[str, int] | Path
    """Host and port, or a file that all ranks see (one machine, new for each job)."""
    launcher_serves: bool = False
    """Whether the launcher serves the port (torchrun); else rank 0 does."""
    prefix: str = "megatrain"
    """Keeps the keys apart from other users, and earlier attempts, of the same store."""
    job: str = ""
    """Words that tell this job from others of the same user: a rank that comes to another's rank 0 is turned away."""
    key: bytes = b""
    """A secret of the ranks, to seal their words with."""


class TorchWorld(World):
    """All ranks of a job of several processes, over torch.distributed. A process can have one at a time."""

    def __init__(self, rank: int, size: int, device: torch.device, timeout_seconds: float, board: Board | None = None) -> None:
        self.rank = rank
        self.size = size
        self._board = board
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._connections: list[_Connection] = []
        self._unused: dist.ProcessGroup | None = None
        """Torch's own group of all ranks, until an axis of all ranks takes it."""
        self._watch = WaitingThread("megatrain-sends")

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        *,
        backend: Literal["gloo", "nccl"],
        rendezvous: Rendezvous,
        device: torch.device | str = "cpu",
        timeout_seconds: float = 600.0,
        join_seconds: float | None = None,
        met: Callable[[], None] = lambda: None,
    ) -> TorchWorld:
        """Join the job as `rank` of `size`.

        device: where this rank's tensors live; with nccl its own GPU, which becomes the current one.
        timeout_seconds: limit of every later call. join_seconds: how long to wait for the other ranks here (None: as long).
        met: called when the store is reached and this rank is one of the job's, before the other ranks have come.

        Raises TransportError if the port is in use, the store cannot be reached or is another job's, this rank has come already, or ranks
        do not come (it lists them).
        """
        if dist.is_initialized():
            raise TransportError("this process is already connected to a world; close that one first")
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join = timedelta(seconds=timeout_seconds if join_seconds is None else join_seconds)
        began = time.monotonic()
        serves = rank == 0 and not rendezvous.launcher_serves
        store = PrefixStore(rendezvous.prefix, open_store(rank, size, rendezvous.at, join, serves))
        board = Board(store, answer_seconds(size), rendezvous.key)
        own = f"{torch.cuda.get_device_properties(device).uuid}" if backend == "nccl" else ""
        if not (rendezvous.launcher_serves or isinstance(rendezvous.at, Path)):
            require_own(board, rank, size, rendezvous.job, rendezvous.at[1])
        word = claim_rank(board, rank, size, own)
        met()
        meet_all(board, rank, size, max(join - timedelta(seconds=time.monotonic() - began), timedelta(seconds=1)), word)
        try:
            limit = timedelta(seconds=timeout_seconds)
            options = _options(backend, limit)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, pg_options=options)
        except (RuntimeError, ValueError) as error:
            raise TransportError(f"rank {rank} of {size} cannot start {backend} on {device}: {error}") from error
        world = cls(rank, size, device, timeout_seconds, board)
        world._unused = dist.group.WORLD
        return world

    def group(self, name: str, ranks: Sequence[int]) -> Group:
        """Make the group of `ranks`, ascending. Raises TransportError if the others do not make it within the timeout."""
        members = tuple(ranks)
        if self.rank not in members or list(members) != sorted(set(members)) or members[-1] >= self.size:
            raise TransportError(
                f"group {name}: ranks {name_ranks(members)} are not ascending ranks of a world of {self.size}, with rank {self.rank}"
            )
        if len(members) == self.size and self._unused is not None:
            made, self._unused = self._unused, None
        else:
            made = self._new_group(name, members)
        connection = _Connection(made, self._timeout_seconds)
        self._connections.append(connection)
        return TorchGroup(name, members, self.rank, connection, self._device, self._timeout_seconds, self._watch)

    def _new_group(self, name: str, members: tuple[int, ...]) -> dist.ProcessGroup:
        limit = timedelta(seconds=self._timeout_seconds)
        options = _options(dist.get_backend(), limit)
        try:
            return dist.new_group(
                list(members), timeout=limit, pg_options=options, use_local_synchronization=True, group_desc=name
            )
        except (RuntimeError, ValueError) as error:
            raise TransportError(
                f"axis {name}: rank {self.rank} cannot make the group of {name_ranks(members)}: {error}"
            ) from error

    def _linger(self) -> None:
        """Wait until all ranks leave, for LINGER_SECONDS at most. Two messages a rank; rank 0 reads all words."""
        if self._board is not None:
            with suppress(TransportError):  # the store may have gone with the rank that hosts it
                leave_all(self._board, self.rank, self.size, LINGER_SECONDS)

    def close(self) -> None:
        """Leave the job: release every group made here. Ranks that still wait for this one get an error.

        Waits a moment for ranks that are about to leave too: closing a connection early drops what the other side has not read yet, and
        that rank would report a lost connection instead of the failure that all ranks share.
        """
        self._linger()
        self._watch.close()
        for connection in self._connections:
            connection.process_group = None  # connections close when the last reference goes
        self._connections.clear()
        self._unused = None
        if dist.is_initialized():
            dist.destroy_process_group()
