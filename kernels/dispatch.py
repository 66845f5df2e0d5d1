"""Which implementation of an operation serves: the one place that decides (`train.kernels`).

    auto        Triton on CUDA and numba on a CPU in BF16 (decoding's attention: and float32), where they are installed, else the reference
    triton      Triton; on a CPU its interpreter (TRITON_INTERPRET=1), for tests; an error where there is neither
    numba       numba on a CPU in BF16 (kernels/cpu.py); an error where it is not installed, or cannot serve
    reference   plain PyTorch everywhere

Kernels are written with `jit` and `tl` of this module. Without Triton they are functions that nobody calls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch

Kernels = Literal["auto", "triton", "numba", "reference"]


def _lacking(library: str, packages: str, extra: str, error: Exception) -> str:
    """Why a library, which is in these packages, does not import, in one line, and the command that mends it."""
    install = f"pip install 'megatrain[{extra}]'"
    if isinstance(error, ModuleNotFoundError) and error.name == packages.split(maxsplit=1)[0]:
        return f"{library} is not installed: {install}"
    said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")
    return f"{library} cannot be imported ({said}): pip uninstall -y {packages} && {install}"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs kernels in Python; the variable must be set before megatrain is imported."""

TRITON_LACKS = ""
"""Why Triton serves nowhere; empty where it is there, or a PyTorch for CPUs alone has no use for it."""
if INTERPRETED or torch.version.cuda or torch.version.hip or "triton" in sys.modules:
    try:
        import triton
        import triton.language as tl
    except Exception as error:  # a broken installation raises anything, and auto does without it
        triton = tl = None
        TRITON_LACKS = _lacking("Triton", "triton", "gpu", error)
else:  # nothing would use it, and its import takes time
    triton = tl = None

LEAST = 1 << 14
"""Fewest elements of a tensor for which numba's kernels are used: for fewer, the call takes longer than the work."""


def jit(function: Callable[..., Any]) -> Any:
    """A Triton kernel; the function itself where Triton is not there."""
    return function if triton is None else triton.jit(function)


def jit_varying(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` without specialization of the named arguments: neither 1 nor multiples of 16 are compiled for separately."""
    return lambda function: function if triton is None else triton.jit(do_not_specialize=arguments)(function)


if INTERPRETED:

    @jit
    def bound(x):
        """A loop's bound as an int: Triton's interpreter has an array of one element, which numpy 2.4 does not take as an index."""
        return x if isinstance(x, int) else x.handle.data.item()

else:

    @jit
    def bound(x):
        """A loop's bound, unchanged: compiled kernels have a scalar already."""
        return x


def use_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton's kernels are used on a device. Raises ValueError if they are requested and unavailable."""
    if kernels in ("numba", "reference"):
        return False
    possible = triton is not None and (device.type == "cuda" or INTERPRETED)
    if kernels == "auto":
        return possible and device.type == "cuda"
    if not possible:
        why = TRITON_LACKS or f"Triton has no {device.type}"
        raise ValueError(f"train.kernels=triton cannot be: {why}. Use train.kernels=auto, or reference.")
    return True


def use_numba(kernels: Kernels, x: torch.Tensor) -> bool:
    """Whether numba's kernels are used for a tensor: BF16, on a CPU, with at least `LEAST` elements."""
    return (
        kernels in ("auto", "numba")
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() >= LEAST
        and numba_lacks() is None
    )


def numba_lacks() -> str | None:
    """Why numba's kernels cannot serve on this CPU with torch's number of threads; None: they can."""
    if lacks := _numba_itself_lacks():
        return lacks
    threads = torch.get_num_threads()
    if threads > 1 and not _numba_splits():
        return f"numba has no OpenMP here, and so no use for {threads} threads: set OMP_NUM_THREADS=1, or install libgomp"
    return None


@cache
def _numba_itself_lacks() -> str | None:
    try:
        import_module("numba")  # optional, and 0.2 s that no other run need spend
    except Exception as error:  # anything, as with Triton
        return _lacking("numba", "numba llvmlite", "cpu", error)
    return None


@cache
def _numba_splits() -> bool:
    """Whether numba has threads that several callers may use at a time. On macOS its OpenMP and torch's abort where they meet."""
    if sys.platform != "linux":
        return False
    try:
        import_module("numba.np.ufunc.omppool")
    except Exception:  # anything, as with numba itself
        return False
    return True


def require(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str:
    """Description of the kernels that a run of this dtype uses. Raises ValueError if requested kernels are unavailable."""
    if use_triton(kernels, device):
        return "triton"
    on_cpu = device.type == "cpu"
    if kernels == "reference" or (kernels == "auto" and on_cpu and dtype != torch.bfloat16):
        return "plain PyTorch"
    if on_cpu:
        lacks = numba_lacks() if dtype == torch.bfloat16 else f"its kernels are for bfloat16, and this is {dtype}"
    else:
        lacks = TRITON_LACKS or f"Triton has no {device.type}"
    if kernels == "numba" and not on_cpu:
        lacks = f"its kernels are for a CPU, and this is {device.type}"
    if kernels == "numba" and lacks is not None:
        raise ValueError(f"train.kernels=numba cannot be: {lacks}. Use train.kernels=auto, or reference.")
    return "numba" if lacks is None else f"plain PyTorch ({lacks})"


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors of a GPU; for any other device 132, an H100's (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def next_power(number: int) -> int:
    """The smallest power of 2 that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def warps(block: int) -> int:
    """Number of warps for a Triton program that processes `block` elements of a row at a time."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
