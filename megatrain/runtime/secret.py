"""The secret that the ranks of a job share and no stranger knows, so that they obey only each other.

It is MEGATRAIN_SECRET where that is set: by launch/local.sh and the SLURM scripts, new for each job, or by the user, the same on all
machines. Otherwise ranks that are all on one machine use a file of the user's, ~/.cache/megatrain/secret, which the first of them makes
and nobody else can read. It is never printed, nor kept in a run's folder.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatrain.files import OneLine

VARIABLE = "MEGATRAIN_SECRET"
FILE = ".cache/megatrain/secret"
"""Under the user's home."""
SHORTEST = 16
"""Letters; a shorter one could be guessed."""


_AGAIN = f"Remove it: the next start makes a new one. Or set {VARIABLE}."


class SecretError(OneLine, ValueError):
    """A secret that is none."""


def shared_secret(env: Mapping[str, str], one_machine: bool) -> str:
    """The secret of this process's job; empty where its ranks share none. one_machine: all ranks are here. Raises SecretError."""
    said = env.get(VARIABLE, "")
    if said and len(said) < SHORTEST:
        raise SecretError(
            f"{VARIABLE} has {len(said)} letters, which can be guessed. Set it to {SHORTEST} or more: openssl rand -hex 32"
        )
    home = env.get("HOME", "")
    return said if said or not one_machine or not home else of_user(Path(home, FILE))


def of_user(path: Path) -> str:
    """The secret in a file of this user's, made if there is none; empty where none can be made. Raises SecretError."""
    with suppress(OSError):  # another rank has made it, or there is no home that can be written to
        if not path.exists():
            _make(path)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            said = file.read(256).decode(errors="replace").strip() if stat.S_ISREG(mode) else ""
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        raise SecretError(f"{path}, which the ranks of this user share, cannot be read ({error.strerror}). {_AGAIN}") from error
    if mode & 0o077:
        raise SecretError(f"{path}, which the ranks of this user share, may be read or written by others. {_AGAIN}")
    if len(said) < SHORTEST:
        raise SecretError(f"{path} holds no secret of {SHORTEST} letters or more. {_AGAIN}")
    return said


def _make(path: Path) -> None:
    """Make the file, whole or not at all; of several processes that do, the first wins. Raises OSError, also where files have no modes."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        if part.stat().st_mode & 0o077:
            raise OSError(f"{path} would be for all to read")
        os.link(part, path)
    finally:
        part.unlink()
