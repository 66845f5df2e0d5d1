"""Memory of a device: its size, and the peak use."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from psutil import virtual_memory

STATUS = Path("/proc/self/status")


def memory_of(device: torch.device) -> int:
    """Total memory of a device in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else virtual_memory().total)


def peak_memory_bytes(device: torch.device | str) -> int:
    """Peak memory in bytes so far: of tensors on a GPU, of the whole process (resident set) on CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(
        OSError, IndexError, ValueError
    ):  # Linux: ru_maxrss would begin with what the process that started this one had
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
