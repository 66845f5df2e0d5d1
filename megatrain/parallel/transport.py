"""`Group`: the eight calls megatrain needs from a transport, and nothing else.

Implementations: `TorchGroup` (torch.distributed: NCCL, gloo; the only code that names it), `MemoryGroup` (ranks that are threads
of one process: simulated process groups). Wrappers: `RecordedGroup` (who waits for what), `DelayedGroup` (tests of overlap).

Every call is given its output, so nothing is copied that need not be, and returns a `Handle`; a blocking call has already waited.
Tensors must be contiguous. Ranks of one group call the same operations in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

ReduceOp = Literal["sum", "max", "min"]


class TransportError(RuntimeError):
    """A collective failed: the message names the axis, the call and, where it is known, the rank at fault."""


class Handle(ABC):
    """A collective under way. Keeps its tensors alive; they must not be touched before `wait` returns."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the outputs are there (on CUDA: until the current stream may use them). Raises TransportError."""


class Group(ABC):
    """The ranks along one axis, and the calls among them."""

    name: str
    """The axis, for messages: tp, dp, world ..."""
    ranks: tuple[int, ...]
    """World ranks, in order of place."""
    rank: int
    """This rank's place in the group."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum", *, blocking: bool = True) -> Handle:
        """Reduce `tensor` over the group, in place; the same bits on every rank."""

    @abstractmethod
    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, *, blocking: bool = True) -> Handle:
        """Concatenate every rank's `tensor` [n, ...] along dim 0 into `output` [size * n, ...]."""

    @abstractmethod
    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, op: ReduceOp = "sum", *, blocking: bool = True) -> Handle:
        """Reduce `tensor` [size * n, ...] over the group and leave this rank's n rows in `output` [n, ...]."""

    @abstractmethod
    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
        *,
        blocking: bool = True,
    ) -> Handle:
        """Send block i of `tensor` (dim 0; equal blocks, or `input_rows` rows each) to place i; `output` collects the blocks received."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int = 0, *, blocking: bool = True) -> Handle:
        """Overwrite `tensor` everywhere with that of place `source`."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, to: int, *, blocking: bool = True) -> Handle:
        """Send `tensor` to place `to`, whose matching `recv` has the same shape and dtype."""

    @abstractmethod
    def recv(self, output: torch.Tensor, source: int, *, blocking: bool = True) -> Handle:
        """Receive into `output` from place `source`; messages between two ranks arrive in order."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank of the group has called."""

    def close(self) -> None:
        """Release the transport's resources; the group must not be used afterwards."""


class World(ABC):
    """All ranks of a job, seen from one of them: makes groups."""

    rank: int
    size: int

    @abstractmethod
    def group(self, name: str, ranks: Sequence[int]) -> Group:
        """Make the group of `ranks` (this rank among them); only those ranks call, in the same order of their groups."""

    def close(self) -> None:
        """Release every group made here."""
