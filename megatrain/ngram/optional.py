"""Imports pyarrow, which splits text and writes numbers at the speed of C, when it is needed: by n-gram models only."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


@functools.cache
def pyarrow() -> Any:
    """The package pyarrow. Raises ImportError that says how to install it."""
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.compute  # noqa: PLC0415
    except ImportError:
        raise ImportError("n-gram models need pyarrow: pip install 'megatrain[ngram]'") from None
    # Its own allocators keep freed memory, which would exceed the limit that `ngram` promises.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    return pyarrow


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
