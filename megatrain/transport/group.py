"""`Group`: the eight calls megatrain needs from a transport, and nothing else.

Implementations: `TorchGroup` in `processes.py` (processes, over torch.distributed: NCCL or gloo) and `MemoryGroup` in `threads.py`
(simulated ranks, threads of one process). Wrappers, in `wrappers.py`: `RecordedGroup` (calls and waits), `DelayedGroup` (a slow network).

Every call is given its output tensor, so no copy is made that could be avoided, and returns a `Handle`; a blocking call has waited
before it returns. Tensors must be contiguous. Ranks of one group call the same operations in the same order.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from megatrain.transport.host import Reading

ReduceOp = Literal["sum", "max", "min"]


BlockRows = tuple[list[int], list[int]]
"""Rows of an all_to_all: (those sent to each place, those received from each place)."""


class TransportError(RuntimeError):
    """A collective failed: the message names the axis, the call and, where it is known, the rank at fault."""


class Handle(ABC):
    """A collective under way. Keeps its tensors alive; they must not be touched before `wait` returns."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the outputs may be read (on CUDA: until the current stream may use them). Raises TransportError."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the call has ended, in success or failure, so that `wait` would return at once."""


class Group(ABC):
    """The ranks along one axis, and the calls among them."""

    name: str
    """The axis, for messages: tp, dp, world ..."""
    ranks: tuple[int, ...]
    """World ranks of the members; a member's index here is its place in the group."""
    rank: int
    """This rank's place in the group."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def named(self, name: str) -> Group:
        """This group for another axis of the same ranks: the same connections, and messages that name that axis.

        Calls of both are one sequence, in the same order on every rank. Implementations keep what the two share in objects.
        """
        other = copy.copy(self)
        other.name = name
        return other

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum", *, blocking: bool = True) -> Handle:
        """Reduce `tensor` over the group, in place; the same bits on every rank."""
        check_reduction(self, op)
        check_dense(self, "all_reduce", tensor)
        return self._all_reduce(tensor, op, blocking)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, *, blocking: bool = True) -> Handle:
        """Concatenate every rank's `tensor` [n, ...] along dim 0 into `output` [size * n, ...]."""
        check_parts(self, "all_gather", output, tensor)
        return self._all_gather(output, tensor, blocking)

    def reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, op: ReduceOp = "sum", *, blocking: bool = True
    ) -> Handle:
        """Reduce `tensor` [size * n, ...] over the group and leave this rank's n rows in `output` [n, ...].

        `output` may be of a wider dtype; `tensor` may then be overwritten. What comes from the ranks is added in the wider one, in
        order of place; NCCL adds in the dtype of `tensor`, and rounds each sum.
        """
        check_reduction(self, op)
        check_parts(self, "reduce_scatter", tensor, output, wider=True)
        return self._reduce_scatter(output, tensor, op, blocking)

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
        *,
        blocking: bool = True,
    ) -> Handle:
        """Send block i of `tensor` (dim 0; equal, or of `input_rows` rows each) to place i; `output` collects what comes."""
        rows = check_all_to_all(self, output, tensor, output_rows, input_rows)
        return self._all_to_all(output, tensor, rows, blocking)

    def broadcast(self, tensor: torch.Tensor, source: int = 0, *, blocking: bool = True) -> Handle:
        """Overwrite `tensor` everywhere with that of place `source`."""
        check_place(self, "broadcast", source)
        check_dense(self, "broadcast", tensor)
        return self._broadcast(tensor, source, blocking)

    def send(self, tensor: torch.Tensor, to: int, *, blocking: bool = True) -> Handle:
        """Send `tensor` to place `to`, whose matching `recv` has the same shape and dtype."""
        check_place(self, "send", to, other=True)
        check_dense(self, "send", tensor)
        return self._send(tensor, to, blocking)

    def recv(self, output: torch.Tensor, source: int, *, blocking: bool = True) -> Handle:
        """Receive into `output` from place `source`; messages between two ranks arrive in order."""
        check_place(self, "recv", source, other=True)
        check_dense(self, "recv", output)
        return self._recv(output, source, blocking)

    # The calls above, once their arguments are checked.

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle: ...

    @abstractmethod
    def _all_gather(self, output: torch.Tensor, tensor: torch.Tensor, blocking: bool) -> Handle: ...

    @abstractmethod
    def _reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, op: ReduceOp, blocking: bool) -> Handle: ...

    @abstractmethod
    def _all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, rows: BlockRows, blocking: bool) -> Handle: ...

    @abstractmethod
    def _broadcast(self, tensor: torch.Tensor, source: int, blocking: bool) -> Handle: ...

    @abstractmethod
    def _send(self, tensor: torch.Tensor, to: int, blocking: bool) -> Handle: ...

    @abstractmethod
    def _recv(self, output: torch.Tensor, source: int, blocking: bool) -> Handle: ...

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank of the group has called."""

    def start_to_host(self, tensor: torch.Tensor) -> Reading:
        """Start a copy to host memory of a tensor that a call of this group wrote.

        On a GPU the `wait` of a call only orders streams, and the host blocks in `Reading.wait`. Results of other ranks are read with
        this call, so that the watch for hangs sees where the host blocks.
        """
        return Reading(tensor)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory of a tensor that a call of this group wrote; the host waits for it."""
        return self.start_to_host(tensor).wait()

    def close(self) -> None:  # noqa: B027 - nothing to release is the usual case
        """Release the transport's resources; the group must not be used afterwards."""


class World(ABC):
    """All ranks of a job, seen from one of them: makes groups."""

    rank: int
    size: int

    @abstractmethod
    def group(self, name: str, ranks: Sequence[int]) -> Group:
        """Make the group of `ranks` (this rank is one of them). Only those ranks call, and each makes its groups in the same order.

        Some transports tell groups of the same ranks apart by how many groups a process has made before: the ranks of a group
        must have made equally many, those of one rank (which cost nothing) included.
        """

    def close(self) -> None:  # noqa: B027 - nothing to release is the usual case
        """Release every group made here."""


REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
"""The function of two tensors (and `out`) behind each `ReduceOp`."""


SHOWN_RANKS = 16
"""Error messages list at most this many ranks."""


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message: `[0, 1]`, or if many `[0, 8, 16, ..., 16376] (2048 ranks)`, since every rank may print it at once."""
    if len(ranks) <= SHOWN_RANKS:
        return str(list(ranks))
    return f"[{', '.join(map(str, ranks[:3]))}, ..., {ranks[-1]}] ({len(ranks)} ranks)"


def refuse(group: Group, operation: str, problem: str) -> TransportError:
    """The error for an invalid call of `group`; the caller raises it."""
    return TransportError(f"{operation} on axis {group.name} (ranks {name_ranks(group.ranks)}): {problem}")


def check_reduction(group: Group, op: str) -> None:
    """Raise TransportError unless `op` is a `ReduceOp`."""
    if op not in REDUCTIONS:
        raise refuse(group, "a reduction", f"op={op!r} is not one of {', '.join(REDUCTIONS)}")


def check_dense(group: Group, operation: str, *tensors: torch.Tensor) -> None:
    """Raise TransportError unless all tensors are contiguous."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise refuse(
                group, operation, f"a tensor of shape {list(tensor.shape)}, strides {list(tensor.stride())} is not contiguous"
            )


def check_place(group: Group, operation: str, place: int, *, other: bool = False) -> None:
    """Raise TransportError unless `place` is one of the group's (with `other`: not this rank's own)."""
    if not 0 <= place < group.size or (other and place == group.rank):
        raise refuse(group, operation, f"place {place} is not one of 0..{group.size - 1}" + " other than this rank's" * other)


def check_parts(group: Group, operation: str, whole: torch.Tensor, part: torch.Tensor, *, wider: bool = False) -> None:
    """Raise TransportError unless `whole` [size * n, ...] is `size` times `part` [n, ...], same dtype, both contiguous.

    wider: the part may be of a dtype that holds those of the whole.
    """
    check_dense(group, operation, whole, part)
    dtype = torch.promote_types(whole.dtype, part.dtype) if wider else whole.dtype
    if part.dim() == 0 or whole.shape != (group.size * part.shape[0], *part.shape[1:]) or dtype != part.dtype:
        problem = f"{list(whole.shape)} {whole.dtype} is not {group.size} times {list(part.shape)} {part.dtype} along dim 0"
        raise refuse(group, operation, problem)


def check_all_to_all(
    group: Group,
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_rows: Sequence[int] | None,
    input_rows: Sequence[int] | None,
) -> BlockRows:
    """The BlockRows of a call. Raises TransportError where they do not add up to the tensors' rows."""
    check_dense(group, "all_to_all", output, tensor)
    if output.dtype != tensor.dtype or output.dim() == 0 or output.shape[1:] != tensor.shape[1:]:
        problem = f"rows of {list(output.shape)} {output.dtype} are not like rows of {list(tensor.shape)} {tensor.dtype}"
        raise refuse(group, "all_to_all", problem)
    both = []
    for given, asked in ((tensor, input_rows), (output, output_rows)):
        rows = [given.shape[0] // group.size] * group.size if asked is None else list(asked)
        if len(rows) != group.size or sum(rows) != given.shape[0] or min(rows) < 0:
            problem = f"{given.shape[0]} rows are not {group.size} blocks, one for each place, of {rows} rows"
            raise refuse(group, "all_to_all", problem)
        both.append(rows)
    return both[0], both[1]
