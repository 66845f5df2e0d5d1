"""Copies between host and device that do not block the host, so that the device always has a queued step to go on with.

    host      queue step 1 | queue step 2 | read 1 | queue step 3 | read 2 | ...
    device         [ step 1              ][ step 2               ][ step 3

Only copies from or to pinned memory do not block. torch's allocator reuses pinned memory only after the copies that torch started from
or to it have ended, and each buffer here is written once. On a CPU every operation has ended when it returns, so nothing ever waits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

ALIGNED = 64
"""Bytes; each tensor in a shared copy starts at a multiple of this."""


class Moment:
    """The time at which the device finishes what was queued before this object was made; on a CPU, the time of its making."""

    def __init__(self, device: torch.device) -> None:
        self._at = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def reached(self) -> bool:
        """Whether the device has finished."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Block the host until the device has finished."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds between two moments that have both come, by the device's clock."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class Reading:
    """A copy of a tensor to host memory, started when this object is made. `copied`: the moment when it has ended."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self.copied = Moment(tensor.device)

    def wait(self) -> torch.Tensor:
        """The copy; on a GPU the host blocks until it has ended."""
        self.copied.wait()
        return self._host


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Contiguous copies of host tensors (any strides, any dtypes) on the device, by one transfer that does not block the host."""
    rooms = [-(-x.nbytes // ALIGNED) * ALIGNED for x in tensors]
    host = torch.empty(sum(rooms), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for room, x in zip(host.split(rooms), tensors, strict=True):
        _like(x, room).copy_(x)
    there = host.to(device, non_blocking=True)
    return [_like(x, room) for room, x in zip(there.split(rooms), tensors, strict=True)]


def _like(x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A view of the bytes `room` with the dtype and shape of `x`."""
    return room[: x.nbytes].view(x.dtype).view(x.shape)
