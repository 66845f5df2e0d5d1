"""A run's claim of a directory, checkpoint.dir or log.dir: two runs that write into one would mix what they write.

    .lock    locked by the process of rank 0 while it lives; its text says who that is, and is empty after an orderly end

The system takes the lock from a process that ends, however it ends; the text that is left then tells of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from megatrain.checkpoint.directory import tidy
from megatrain.checkpoint.together import CheckpointError, together
from megatrain.files import doing, open_own
from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import broadcast_text
from megatrain.transport.owner import Owner, own
from megatrain.untrusted import parse_json, read_plain

Key = Literal["checkpoint.dir", "log.dir"]
LOCK = ".lock"
_WORDS = {"checkpoint.dir": ("saves", "/tmp/run/checkpoints"), "log.dir": ("keeps its log", "/tmp/run")}
"""Key -> what a run does there, and a directory that would do."""
_PATIENCE_SECONDS = 5.0
"""How long another node may take to see a file that rank 0 has written."""
_LONGEST_MARK = 4096
"""Bytes."""
_LEAVING_SECONDS = 0.3
"""How long a lock may stay behind a process that was killed just now."""


class Claim:
    """A run's right to write in a directory, until `release` or the end of the process. The ranks without the lock have an empty one."""

    def __init__(
        self, directory: Path | None = None, key: Key = "checkpoint.dir", job: str = "", lock: int | None = None
    ) -> None:
        """lock: descriptor of the locked file, on the rank that holds it; job: the launcher's name for the job."""
        self.note = ""
        """For the log: whose directory it was, if its owner has ended without giving it up."""
        self._directory, self._key, self._job = directory, key, job
        self._held = [] if lock is None else [lock]
        # Not __del__, which may run at the end of the process when the modules that it needs are gone.
        self._release = weakref.finalize(self, _give_up, self._held, os.getpid())

    def release(self) -> None:
        """Give up the directory; may be called again."""
        self._release()

    def hold(self) -> None:
        """Take the directory again where it was removed, and its lock with it. Raises CheckpointError where another run has it now."""
        if self._directory is None or not self._held:
            return
        with suppress(OSError):
            if os.path.samestat((self._directory / LOCK).lstat(), os.fstat(self._held[0])):
                return
        again, _ = _lock(self._directory, self._key, self._job)
        if again._held:  # else the disk did not answer, and the lock is there
            _give_up(self._held, os.getpid())
            self._held += again._held
            again._held.clear()

    def lost(self) -> str:
        """The reason why the directory is not this run's any more, after `hold`; "" while it is."""
        try:
            self.hold()
        except CheckpointError as error:
            return str(error)
        return ""


def _give_up(held: list[int], process: int) -> None:
    """Empty and close the lock file of a claim, in the process that made it."""
    for lock in held if os.getpid() == process else ():
        with suppress(OSError):
            os.ftruncate(lock, 0)
        os.close(lock)
    held.clear()


def claim(directory: Path, ctx: ParallelContext, job: str = "") -> Claim:
    """Take a directory of checkpoints for this run, making it if needed, and remove what crashed saves left there (collective).

    Raises CheckpointError on every rank where another run holds it, where it cannot be written, or where some rank does not see the file
    that rank 0 writes there.
    """
    directory, held, mark = Path(directory), Claim(), ""
    with together(ctx):
        if ctx.world.rank == 0:
            held, mark = _lock(directory, "checkpoint.dir", job)
    try:
        mark = broadcast_text(mark, ctx.world.group, ctx.device)
        with together(ctx):
            _require_mark(directory, mark)
        tidy(directory, ctx)
    except BaseException:
        held.release()
        raise
    return held


def claim_log(directory: Path, ctx: ParallelContext, job: str = "") -> Claim:
    """Take log.dir, where rank 0 writes, for this run, making it if needed (collective).

    Raises CheckpointError on every rank where another run holds it or it cannot be written.
    """
    held = Claim()
    with together(ctx):
        if ctx.world.rank == 0:
            held, _ = _lock(Path(directory), "log.dir", job)
    return held


def taken(directory: Path, key: Key, job: str) -> str:
    """The error if a live run of another job holds a directory; "" if none does. Writes nothing."""
    try:
        lock = open_own(directory / LOCK, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = _text(lock)
        return "" if _parsed(said).get("job") == job else _refusal(directory, key, said)
    except OSError:
        return ""
    finally:
        os.close(lock)
    return ""


def _lock(directory: Path, key: Key, job: str) -> tuple[Claim, str]:
    """Lock the lock file for this process and write a new mark into it; returns both. Raises CheckpointError where another process holds
    it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open_own(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(lock).st_nlink > 1 and (said := _text(lock)) and "host" not in _parsed(said):
            os.close(lock)
            raise OSError(f"{directory / LOCK} is a hard link to a file that is no run's lock. Move it away")
    except OSError as error:
        raise CheckpointError(
            f"{key}={directory} cannot be written ({error.strerror or error}). Set {key} to a directory of your own, such as "
            f"{_WORDS[key][1]}."
        ) from error
    me, end = own(), time.monotonic() + _LEAVING_SECONDS
    while True:
        said = _text(lock)
        owner = _owner(said)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if owner == me:  # an earlier run of this process that was not closed
                os.close(lock)
                return Claim(), said
            if time.monotonic() > end:
                os.close(lock)
                raise CheckpointError(_refusal(directory, key, said)) from None
            time.sleep(_LEAVING_SECONDS / 10)
        except OSError:  # a file system without locks: its text is all there is
            if owner not in (None, me) and owner.condition() in ("running", "stopped"):
                os.close(lock)
                raise CheckpointError(_refusal(directory, key, said)) from None
            break
    held = Claim(directory, key, job, lock)
    if owner not in (None, me):
        held.note = f"{key}={directory} was left behind by {_named(said)}, which has ended; this run has taken it over"
    mark = json.dumps(
        {
            "host": socket.gethostname(),
            **asdict(me),
            "job": job,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "mark": secrets.token_hex(8),
        }
    )
    with doing("writing", directory / LOCK):
        os.ftruncate(lock, 0)
        os.pwrite(lock, mark.encode(), 0)
        os.fsync(lock)
    return held, mark


def _text(lock: int) -> str:
    return os.pread(lock, _LONGEST_MARK, 0).decode(errors="replace")


def _parsed(text: str) -> dict[str, Any]:
    """The JSON object in a lock file; empty if it holds none."""
    with suppress(ValueError):
        said = parse_json(text)
        return said if isinstance(said, dict) else {}
    return {}


def _owner(text: str) -> Owner | None:
    """The process that a lock file names."""
    said = _parsed(text)
    try:
        return Owner(str(said["machine"]), int(said["pid"]), str(said["born"]))
    except (KeyError, TypeError, ValueError, OverflowError):  # an infinite number, too
        return None


def _named(text: str) -> str:
    said = _parsed(text)
    return f"process {said.get('pid', '?')} on {said.get('host', '?')} (since {said.get('since', '?')})"


def _refusal(directory: Path, key: Key, said: str) -> str:
    return f"another run {_WORDS[key][0]} in {key}={directory}: {_named(said)}. Wait for it or stop it, or set {key} to another directory."


def _require_mark(directory: Path, mark: str) -> None:
    """Raise CheckpointError unless this rank reads the mark that rank 0 wrote."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(OSError, ValueError):
            if read_plain(directory / LOCK, _LONGEST_MARK, follow=False) == mark.encode():
                return
        if time.monotonic() > end:
            raise CheckpointError(
                f"host {socket.gethostname()} does not see in checkpoint.dir={directory.absolute()} what rank 0 on "
                f"{json.loads(mark)['host']} has just written there. A checkpoint is one directory for all nodes: set checkpoint.dir to "
                "a file system that they share."
            )
        time.sleep(0.05)
