"""Words on standard error that perhaps nobody reads.

A full pipe or a stopped terminal keeps no process from its end, and a pipe that is closed breaks nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

from megatrain.files import shown

SECONDS = 2.0
"""How long a process that ends waits for its words to be taken; they are on offer until it has ended."""


def say(text: str, seconds: float = SECONDS) -> None:
    """Write lines within `seconds`, or go on; without Python's buffers, whose locks another thread may hold for ever."""
    lines = (text + "\n").encode(errors="replace")
    thread = threading.Thread(target=_write, args=(lines,), name="megatrain-say", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no further thread is to be had
        _write(lines)
    else:
        thread.join(seconds)


def note(text: str) -> None:
    """Print lines where nothing ends, as `print` does, without terminal codes, and go on where that fails."""
    with suppress(OSError):
        print(shown(text), file=sys.stderr, flush=True)  # noqa: T201


def _write(lines: bytes) -> None:
    with suppress(OSError):
        while lines:
            lines = lines[os.write(2, lines) :]
