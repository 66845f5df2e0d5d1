"""Which implementation of an operation serves: the one place that decides (`train.kernels`).

    auto        Triton on CUDA where it is installed, else the reference
    triton      Triton; on a CPU its interpreter (TRITON_INTERPRET=1), for tests; an error where there is neither
    reference   plain PyTorch everywhere

Kernels are written with `jit` and `tl` of this module. Without Triton they are functions that nobody calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

Kernels = Literal["auto", "triton", "reference"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels in Python; it must be said before megatrain is imported."""


def jit(function: Callable[..., Any]) -> Any:
    """A Triton kernel; the function itself where Triton is not installed."""
    return function if triton is None else triton.jit(function)


def jit_varying(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """As `jit`; of these numbers none is compiled for, not even a 1 or a multiple of 16."""
    return lambda function: function if triton is None else triton.jit(do_not_specialize=arguments)(function)


if INTERPRETED:

    @jit
    def bound(x):
        """The bound of a loop: Triton's interpreter holds an array of one number there, of which numpy 2.4 makes no index."""
        return x if isinstance(x, int) else x.handle.data.item()

else:

    @jit
    def bound(x):
        """The bound of a loop, which is a number where it is compiled."""
        return x


def use_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton's kernels serve on a device. Raises ValueError where they are asked for and cannot."""
    if kernels == "reference":
        return False
    possible = triton is not None and (device.type == "cuda" or INTERPRETED)
    if kernels == "auto":
        return possible and device.type == "cuda"
    if not possible:
        why = "Triton is not installed: pip install 'megatrain[gpu]'" if triton is None else f"Triton has no {device.type}"
        raise ValueError(f"train.kernels=triton cannot be: {why}. Use train.kernels=auto, or reference.")
    return True


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; those of an H100 where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def next_power(number: int) -> int:
    """The smallest power of 2 that is not less."""
    return 1 << max(0, number - 1).bit_length()


def warps(block: int) -> int:
    """Warps for a program that works on so many elements of a row at a time."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
