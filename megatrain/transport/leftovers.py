"""Names of files in shared memory that tell whose they are, so that what a killed process has left there is found and removed.

    /dev/shm/megatrain-4026531836-71234-8833221-SUFFIX
                       |          |     start time of the process that owns it, in clock ticks since the machine started
                       |          its number
                       its numbering of processes, which each container has for itself

Memory that a file there takes is not given back before the machine starts anew.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from megatrain.transport.owner import Owner, machine

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"megatrain-(\d+)-(\d+)-(\d+)-.+")


def name_of(owner: Owner, suffix: str) -> str:
    """The name of a file or directory of a process of this machine."""
    return f"megatrain-{_numbering()}-{owner.pid}-{owner.born or 0}-{suffix}"


def is_private(folder: Path) -> bool:
    """Whether a path is a folder, not a link to one, of this user, in which nobody else can make files: any user may have made what has its
    name in FOLDER.
    """
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def require_private(folder: Path) -> None:
    """Raise OSError unless a folder `is_private`."""
    if not is_private(folder):
        raise OSError(
            f"{folder} is no folder of this user's alone, so that others could read or change what it holds. Remove it"
        )


def leftovers(folder: Path | None = None) -> list[Path]:
    """Find the files and directories of `folder` (default: FOLDER) that processes of this user have left behind when they were killed."""
    found = []
    with suppress(OSError):
        for path in sorted((folder or FOLDER).iterdir()):
            match = _NAME.fullmatch(path.name)
            with suppress(OSError):
                if match is None or path.lstat().st_uid != os.getuid() or match[1] != _numbering():
                    continue  # nobody's of this user and numbering: another container may see these files too
                if Owner(machine(), int(match[2]), match[3]).condition() == "gone":
                    found.append(path)
    return found


def remove_leftovers(folder: Path | None = None) -> str:
    """Remove them; what was there, as text, or "" for nothing."""
    removed = size = 0
    for path in leftovers(folder):
        folder_of_its_own = path.is_dir() and not path.is_symlink()
        with suppress(OSError):
            files = [file for file in path.rglob("*") if file.is_file()] if folder_of_its_own else [path]
            held = sum(file.lstat().st_size for file in files)
            if folder_of_its_own:
                shutil.rmtree(path)
            else:
                path.unlink()
            removed, size = removed + 1, size + held
    return (
        f"{folder or FOLDER} held {size / 2**20:,.1f} MiB of {removed} dead processes' shared memory; it is removed"
        if removed
        else ""
    )


def _numbering() -> str:
    """The number of this process's numbering of processes; 0 where the system has one alone."""
    try:
        return "".join(filter(str.isdigit, str(Path("/proc/self/ns/pid").readlink())))
    except OSError:
        return "0"
