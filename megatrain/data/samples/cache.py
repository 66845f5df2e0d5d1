"""Arrays that many ranks need and any of them can build: cached as .npy files named by the hash of their inputs.

Every rank that finds no cache entry builds the same arrays and renames the same bytes into place, so ranks need neither a lock nor
each other, and node-local directories work as well as shared ones. A manifest with checksums is written last; an incomplete entry is
built again. A directory that cannot be written costs time, not the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.files import whole
from megatrain.untrusted import parse_json, read_plain

_LARGEST = 1 << 16
"""Bytes of an entry's list of checksums, which has some hundred."""
Arrays = dict[str, npt.NDArray[Any]]


def cached_arrays(directory: Path, key: Mapping[str, str | int], names: tuple[str, ...], build: Callable[[], Arrays]) -> Arrays:
    """The arrays `names` of `build()`; from `directory` (memory-mapped, read-only) if it has a whole entry for `key`.

    Files: `HASH-NAME.npy` for each name and `HASH.json`, HASH the SHA-256 of `key`.
    """
    stem = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    found = _load(directory, stem, names)
    if found is not None:
        return found
    arrays = build()
    try:
        _save(directory, stem, key, arrays)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "The sample index cannot be cached in %s (%s); it was computed in memory and will be at every start. "
            "Set data.cache_dir to a directory that can be written.",
            directory,
            error,
        )
    return arrays


def intact(array: npt.NDArray[Any]) -> bool:
    """Whether an array's file is still as long as its map: reading behind its end would end the process."""
    return not isinstance(array.base, mmap.mmap) or array.base.size() >= len(array.base)


def _load(directory: Path, stem: str, names: tuple[str, ...]) -> Arrays | None:
    """The entry; None if it is absent or incomplete."""
    try:
        rows = parse_json(read_plain(directory / f"{stem}.json", _LARGEST))["crc32"]
        arrays = {name: np.load(directory / f"{stem}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        whole = all(_checksum(arrays[name]) == rows[name] for name in names)
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # absent, truncated, overwritten, not ours
        return None
    return arrays if whole else None


def _save(directory: Path, stem: str, key: Mapping[str, str | int], arrays: Arrays) -> None:
    """Writes the entry, manifest last. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        with whole(directory / f"{stem}-{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    manifest = json.dumps({"key": dict(key), "crc32": {name: _checksum(array) for name, array in arrays.items()}})
    with whole(directory / f"{stem}.json", text=True) as file:
        file.write(manifest)


def _checksum(array: npt.NDArray[Any]) -> int:
    """CRC-32 of dtype, shape and content."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, zlib.crc32(head))
