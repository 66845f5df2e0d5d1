"""The files and folders that a pattern stands for, as Python's `glob` has them, but for two things that it keeps quiet about:

a folder that cannot be listed     is an error: what lies in it would be missing from the corpus
links that lead back               `**` goes into each folder once, under the first of its names in alphabetical order, where glob
                                   goes around forty times, and with two such links for ever
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")
RECURSIVE = "**"
NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors of a path that leads nowhere."""


def matching(pattern: str) -> list[str]:
    """The paths that a pattern stands for; a path that is there is itself, whatever its letters. Raises OSError with the folder's name."""
    if os.path.lexists(pattern):
        return [pattern]
    root = os.sep if pattern.startswith(os.sep) else ""
    parts = [part for part in pattern.split(os.sep) if part]  # noqa: PTH206  (a Path would change `./a`)
    return list(_below(root, [part for part, many in groupby(parts) for part in ([part] if part == RECURSIVE else many)]))


def _below(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """The paths below a folder that the parts of a pattern stand for."""
    if not parts:
        yield folder
    elif parts[0] == RECURSIVE:
        for inner in _folders(folder):
            yield from _below(inner, parts[1:] or ["*"])
    elif glob.has_magic(parts[0]):
        matches = re.compile(fnmatch.translate(parts[0])).match
        for name in _names(folder, hidden=parts[0].startswith(".")):
            if matches(name):
                yield from _below(_joined(folder, name), parts[1:])
    elif _is_there(path := _joined(folder, parts[0])):
        yield from _below(path, parts[1:])


def _folders(folder: str) -> Iterator[str]:
    """A folder and all below it but hidden ones, through links too; each once."""
    seen, waiting = set[tuple[int, int]](), [folder]
    while waiting:
        inner = waiting.pop()
        found = _asked(os.stat, inner)
        if found is not None and stat.S_ISDIR(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            yield inner
            below = (_joined(inner, name) for name in _names(inner))
            waiting += sorted(below, key=lambda path: os.fsencode(path) + b"/", reverse=True)


def _names(folder: str, *, hidden: bool = False) -> list[str]:
    """The names in a folder; none in what is no folder."""
    return [name for name in _asked(os.listdir, folder) or [] if hidden or not name.startswith(".")]


def _is_there(path: str) -> bool:
    """Whether there is a file, a folder or a link."""
    return _asked(os.lstat, path) is not None


def _asked(ask: Callable[[str], T], path: str) -> T | None:
    """The answer of the system on a path; None where that leads nowhere. Raises OSError where there is no answer."""
    try:
        return ask(path or os.curdir)
    except OSError as error:
        if error.errno in NOTHING:
            return None
        raise


def _joined(folder: str, name: str) -> str:
    return os.path.join(folder, name)  # noqa: PTH118  (a Path would change `./a`)
