"""Reads files that somebody else may have written, whole, and JSON: nothing is read before its kind and its size are known.

A link may lead to /dev/zero or to a secret, a fifo waits for ever, a text of 500 bytes may ask for gigabytes, and a number of ten thousand
digits takes Python itself by surprise. All errors here are ValueErrors of one line, or the system's OSErrors.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST_INTEGER = 40
"""Digits. Whatever is counted here has fewer."""
_SHOWN = 80
_CACHED = ("models--", "datasets--")
"""How the hub's cache begins the name of a repository's folder."""


def read_plain(path: str | Path, most: int, *, follow: bool = True) -> bytes:
    """The contents of a plain file of `most` bytes at the most. follow: whether it may be a link.

    Raises ValueError for any other file, before anything is read; OSError as `open` does.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo would wait for who writes to it
    if not follow and Path(path).is_symlink():
        raise ValueError(f"it is a link, to {Path(path).readlink()}")
    descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise ValueError("it is no plain file")
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size:,} bytes, and {most:,} at the most are read")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it grew beyond {most:,} bytes while it was read")
    return data


def parse_json(text: str | bytes, brackets: int = 1 << 20, unique: bool = True) -> Any:
    """The value of a JSON text with at most so many brackets. unique: whether an object may not have a key twice. Raises ValueError."""
    found = sum(text.count(one) for one in "{[") if isinstance(text, str) else sum(text.count(one) for one in (b"{", b"["))
    if found > brackets:
        raise ValueError(f"it has {found:,} brackets, and {brackets:,} at the most are read")
    try:
        return json.loads(text, object_pairs_hook=unique_keys if unique else None, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """A JSON object as a dict. Raises ValueError for a key that appears twice, as readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key appears twice among {[key[:_SHOWN] for key, _ in pairs[:8]]}")
    return found


def leads_out(file: Path) -> bool:
    """Whether a file is a link that leads out of its folder, and not into the blobs of its repository in the Hugging Face hub's cache.

    There `models--ORG--NAME/snapshots/COMMIT/config.json` is a link to `models--ORG--NAME/blobs/HASH`. Any folder may be in one named
    `snapshots`, beside one named `blobs`: the repository's name tells the cache, and nothing else in it is led to. The file may be in a
    folder of the snapshot.
    """
    if not file.is_symlink():
        return False
    found, folder = file.resolve(), file.parent.resolve()
    repositories = (up.parent for up in folder.parents if up.name == "snapshots" and up.parent.name.startswith(_CACHED))
    blobs = [repository / "blobs" for repository in repositories]
    return not any(found.is_relative_to(place) for place in (folder, *blobs))


def read_beside(file: Path, most: int) -> bytes:
    """The contents of a file of a model's folder. Raises ValueError as `read_plain` does, and for a link that leads out; OSError."""
    if leads_out(file):
        raise ValueError(f"it is a link that leads out of its folder, to {file.resolve()}: put the file itself there")
    return read_plain(file, most)


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"it has a number of {len(text):,} digits, {text[:20]}...")
    return int(text)
