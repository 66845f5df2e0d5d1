"""Base of the kernels for BF16 on a CPU: numba's compiler (`train.kernels=numba`), which needs no C compiler.

torch's operations make a pass over memory each, and many of them convert BF16 on the way; a kernel here makes one pass, vectorised.
numba knows no BF16: tensors are read as 16-bit integers (`flat`), widened and rounded by integer arithmetic. What keeps a loop vectorised:

    integers of 32 bits     numba makes 64 of a sum of two: `float_of` cuts them, and casts stand where it matters
    no call of libm         exponentials and erf are polynomials; a number is rounded by adding 1.5 x 2^23, floor costs ten times as much
    numbers side by side    arrays have one dim; `line` takes a row out of it
    a loop to itself        each inner loop is a function (`jit`), which the compiler so has whole; choices are made around it
    sums                    `jit_sums` may add in any order, as vectors do. Nothing assumes that there is no NaN or infinity

A kernel divides its rows into `PARTS` parts, whatever the number of threads, so that sums of parts, and all bits, do not depend on it.
Compiled code is cached on disk (`cache_folder`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

PARTS = 32
"""Number of parts that a kernel's rows are divided into; one thread works through a part."""
SPLIT = 1 << 16
"""Fewest elements for which a kernel runs on several threads."""

numba.config.THREADING_LAYER = "omp"  # the layer that several threads may call at once; torch has OpenMP too


class _Cache(FunctionCache):
    """numba's cache of compiled functions; a full disk or a damaged file is no error: the function is compiled again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function cached for argument types `sig`; None if there is none or its file cannot be read."""
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Cache the compiled function `data` for argument types `sig`; not an error if it cannot be written."""
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            super().save_overload(sig, data)


@cache
def cache_folder() -> Path | None:
    """Folder of compiled kernels, named by a hash of all cpu*.py: numba itself checks a kernel's file, not the functions it calls.

    It lies in NUMBA_CACHE_DIR, else in megatrain/ of XDG_CACHE_HOME or ~/.cache; None if not writable: each process compiles anew.
    None too if another user owns or may write it: compiled code is read with pickle, which runs what the files say.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu*.py"))]
        digest = hashlib.sha256(b"".join([numba.__version__.encode(), *sources])).hexdigest()[:16]
        folder = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(home, "megatrain"), f"kernels-{digest}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None
    ours = os.name != "posix" or (made.st_uid == os.geteuid() and not made.st_mode & 0o022)
    return folder if ours and os.access(folder, os.W_OK) else None


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call; floating-point operations keep their order."""
    return numba.njit(error_model="numpy", nogil=True, fastmath={"contract"})(function)


def jit_sums(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call; its sums may be reordered, so that they vectorise."""
    return numba.njit(error_model="numpy", nogil=True, fastmath={"contract", "reassoc", "nsz"})(function)


class Kernel:
    """A function of flat arrays and numbers with one loop over parts (`numba.prange`): on one thread, or on torch's number of them.

    Compiled when first called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.alone = _compiled(function, "alone", parallel=False)
        self.split = _compiled(function, "split", parallel=True)

    def __call__(self, numbers: int, *arguments: Any) -> None:
        """numbers: number of elements processed; fewer than `SPLIT` run on one thread."""
        threads = torch.get_num_threads()
        if threads == 1 or numbers < SPLIT:
            self.alone(*arguments)
        else:
            _wake()
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            self.split(*arguments)


def _compiled(function: Callable[..., Any], how: str, parallel: bool) -> Any:
    """numba's dispatcher of a copy of `function` named after `how`, since the cache finds compiled code by name."""
    own = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_{how}")
    own.__qualname__, own.__module__ = own.__name__, function.__module__
    found = numba.njit(error_model="numpy", nogil=True, fastmath={"contract"}, parallel=parallel)(own)
    folder = cache_folder()
    if folder is not None:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)  # a setting of the whole process, read at once
        try:
            with contextlib.suppress(OSError, RuntimeError):
                found._cache = _Cache(own)
        finally:
            numba.config.CACHE_DIR = before
    return found


@cache
def _wake() -> None:
    """Start numba's threads, then restore torch's number of threads, which that changes."""
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


def flat(x: torch.Tensor) -> Any:
    """Memory of x from its first to its last element as an array [n]; BF16 as uint16."""
    if not x.is_contiguous():
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() > 0 else 0
        x = x.as_strided((size,), (1,))
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).view(-1).numpy()


@jit
def line(x, start, count):
    """`count` numbers of an array from `start` on."""
    return x[start : start + count]


@jit
def clear(x):
    """Write 0 to every element. In a parallel kernel numba drops `line(...)[:] = 0`, an assignment to an unnamed array."""
    for i in range(len(x)):
        x[i] = 0


@intrinsic
def bits_of(_context, x):
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, given: builder.bitcast(given[0], ir.IntType(32))


@intrinsic
def float_of(_context, bits):
    """The float32 of the low 32 bits of an integer."""

    def generate(context, builder, signature, given):
        low = builder.trunc(given[0], ir.IntType(32)) if given[0].type.width > 32 else given[0]
        return builder.bitcast(low, ir.FloatType())

    return types.float32(bits), generate


@jit
def wide(x):
    """The float32 of the 16 bits of a BF16."""
    return float_of(np.uint32(x) << 16)


@jit
def narrow(x):
    """Bits of a float32 rounded to BF16, ties to even; NaN stays NaN."""
    bits = bits_of(x)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if x == x else np.uint16(0x7FC0)  # noqa: PLR0124  NaN is not itself


@jit
def exp(x):
    """e^x of a float32, with a relative error below 6e-6 for -87 <= x <= 0; 0 below -87, infinite above 88."""
    power = x * np.float32(1.4426950408889634)
    near = power + np.float32(12582912.0)
    rest = power - (near - np.float32(12582912.0))
    y = np.float32(0.0013333558)
    y = y * rest + np.float32(0.0096181291)
    y = y * rest + np.float32(0.0555041087)
    y = y * rest + np.float32(0.2402265070)
    y = y * rest + np.float32(0.6931471806)
    y = (y * rest + np.float32(1.0)) * float_of((bits_of(near) + 127) << 23)
    y = y if not x < np.float32(-87.0) else np.float32(0.0)
    return y if not x > np.float32(88.0) else np.float32(np.inf)
