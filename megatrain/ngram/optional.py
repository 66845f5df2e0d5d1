"""pyarrow, which splits text and writes numbers at the speed of C; only n-gram models need it."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


@functools.cache
def pyarrow() -> Any:
    """The package. Raises ImportError that says how to install it."""
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.compute  # noqa: PLC0415
    except ImportError:
        raise ImportError("n-gram models need pyarrow: pip install 'megatrain[ngram]'") from None
    # Its own allocators keep what was freed; the memory of this room is counted.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    return pyarrow


def give_back() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
