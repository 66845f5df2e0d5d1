"""Tells when a file that is open is overwritten in place: its time or size is another, and so are blocks spread over it.

The time alone says nothing, as a backup or `touch` changes it too; then the blocks, which are those of the text's identity, are read again.
A file that is replaced by `mv` is another one, and does not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import xxhash

from megatrain.stderr import note

BLOCKS, BLOCK_BYTES = 128, 2**14
"""Blocks of a file that are looked at; a file of at most BLOCKS * BLOCK_BYTES is looked at as a whole."""
LOOK_SECONDS = 1.0
"""Least time between two looks: on a file system over a network each may be a question to a server."""
SETTLED_SECONDS = 2.0
"""A file that was written to so lately may be written to again without another time, so that it is read again at the next look."""


def blocks(size: int) -> list[tuple[int, int]]:
    """(place, bytes) of what is looked at in a file of `size` bytes: all of a small one; else first, last, and others evenly between."""
    if size <= BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    return [(number * (size - BLOCK_BYTES) // (BLOCKS - 1), BLOCK_BYTES) for number in range(BLOCKS)]


def hash_of(descriptor: int) -> str:
    """Hash of an open file's size and of what is looked at in it. Raises OSError."""
    size = os.fstat(descriptor).st_size
    digest = xxhash.xxh3_128(str(size).encode())
    for at, length in blocks(size):
        digest.update(os.pread(descriptor, length, at))
    return str(digest.hexdigest())


class Unchanged:
    """Watches open files."""

    def __init__(self, files: Mapping[Path, int]) -> None:
        """files: the descriptor of each. Raises OSError."""
        self._files = files
        self._seen = {path: _stamp(of) for path, of in files.items()}
        self._hashes = {path: hash_of(of) for path, of in files.items()}
        self._told: set[Path] = set()
        self._next = time.monotonic() + LOOK_SECONDS

    def overwritten(self) -> Path | None:
        """A file whose contents are others than at first, looked for once in LOOK_SECONDS. Raises OSError.

        One whose time alone is another is told of on stderr, once.
        """
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + LOOK_SECONDS
        for path, descriptor in self._files.items():
            stamp = _stamp(descriptor)
            if stamp == self._seen[path]:
                continue
            if hash_of(descriptor) != self._hashes[path]:
                return path
            if not 0 <= time.time() - stamp[0] / 1e9 < SETTLED_SECONDS:
                self._seen[path] = stamp
            if path not in self._told:
                self._told.add(path)
                note(f"warning: {path} was written to while it is in use; what was looked at is as it was")
        return None


def _stamp(descriptor: int) -> tuple[int, int]:
    """(time of the last write in ns, bytes) of an open file."""
    found = os.fstat(descriptor)
    return found.st_mtime_ns, found.st_size
