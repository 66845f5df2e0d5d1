"""A directory of checkpoints: which run owns it, what it holds, and the renames by which a checkpoint appears or goes.

    .lock                    held by the run that saves here; its text says which run
    .saving_step_00000300    being written; rubbish after a crash
    step_00000200            whole: it got this name when all its files were on the disk
    latest                   text file with the name of the newest whole one; replaced after that one has its name

A removal works the other way round: the directory first gets a name that starts with a dot.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from megatrain.checkpoint.manifest import LATEST, STEP_NAME, Manifest, check_file, read_manifest
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError, together
from megatrain.files import doing
from megatrain.parallel.mesh import ParallelContext
from megatrain.transport.consensus import broadcast_text

LOCK = ".lock"
SAVING, _REMOVING, _REPLACED, _LATEST_DRAFT = ".saving_", ".removing_", ".replaced_", ".latest_draft"
_PATIENCE_SECONDS = 5.0
"""How long another node may take to see a file that rank 0 has written."""


class Claim:
    """A run's right to save in a directory, from `claim` until `release` or the end of the process."""

    def __init__(self, lock: int | None) -> None:
        """lock: descriptor of the locked file, on the rank that holds it."""
        # Not __del__, which may run at the end of the process when the modules that it needs are gone.
        self._release = weakref.finalize(self, lambda: None) if lock is None else weakref.finalize(self, os.close, lock)

    def release(self) -> None:
        """Give up the directory; may be called again."""
        self._release()


def claim(directory: Path, ctx: ParallelContext) -> Claim:
    """Take a directory for this run, making it if needed, and remove what crashed saves left there (collective).

    Raises CheckpointError on every rank where another run holds it, where it cannot be written, or where some rank does not see the file
    that rank 0 writes there.
    """
    directory, held, mark = Path(directory), Claim(None), ""
    with together(ctx):
        if ctx.world.rank == 0:
            held, mark = _lock(directory)
    try:
        mark = broadcast_text(mark, ctx.world.group, ctx.device)
        with together(ctx):
            _require_mark(directory, mark)
        tidy(directory, ctx)
    except BaseException:
        held.release()
        raise
    return held


def _lock(directory: Path) -> tuple[Claim, str]:
    """Lock the lock file for this process and write a new mark into it; returns both. Raises CheckpointError where another process holds
    it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.dir={directory} cannot be written ({error.strerror or error}). "
            "Set checkpoint.dir to a directory of your own, such as /tmp/run/checkpoints."
        ) from error
    holder = os.pread(lock, 4096, 0).decode(errors="replace")
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        with suppress(ValueError):
            said = json.loads(holder)
            if {key: said.get(key) for key in me} == me:  # an earlier run of this process that was not closed
                return Claim(None), holder
        raise CheckpointError(
            f"another run saves in checkpoint.dir={directory}: {holder.strip()}. Wait for it or stop it, or set checkpoint.dir "
            "to another directory."
        ) from None
    except OSError:
        pass  # a file system without locks: the mark still tells whether the nodes share the directory
    mark = json.dumps({**me, "since": time.strftime("%Y-%m-%d %H:%M:%S"), "mark": secrets.token_hex(8)})
    with doing("writing", directory / LOCK):
        os.ftruncate(lock, 0)
        os.pwrite(lock, mark.encode(), 0)
        os.fsync(lock)
    return Claim(lock), mark


def _require_mark(directory: Path, mark: str) -> None:
    """Raise CheckpointError unless this rank reads the mark that rank 0 wrote."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(OSError):
            if (directory / LOCK).read_text() == mark:
                return
        if time.monotonic() > end:
            raise CheckpointError(
                f"host {socket.gethostname()} does not see in checkpoint.dir={directory.absolute()} what rank 0 on "
                f"{json.loads(mark)['host']} has just written there. A checkpoint is one directory for all nodes: set checkpoint.dir to "
                "a file system that they share."
            )
        time.sleep(0.05)


def tidy(directory: Path, ctx: ParallelContext) -> None:
    """Remove what crashed saves left in `directory` and let `latest` name the newest checkpoint again (collective).

    Only for the run that owns the directory: a save of another process in progress would be lost.
    """
    with together(ctx):
        if ctx.world.rank == 0 and Path(directory).is_dir():
            tidy_here(Path(directory))
            whole = [path for path, _, reason in catalogue(Path(directory)) if not reason]
            if whole and latest(Path(directory)) != whole[0].name:
                point_latest(whole[0])


def catalogue(directory: Path) -> list[tuple[Path, Manifest | None, str]]:
    """Checkpoints of a directory, newest first: path, manifest, and "" or why names and sizes of its files show that it is not whole.

    Newest means published last (`Manifest.serial`), not the largest step: a run that went back and saved again continues from there. No
    clock has a say. Of those without a number, from earlier releases, the one that `latest` names is the newest, then larger steps are. One
    whose manifest cannot be read stands where its step puts it.
    """
    named, found = latest(directory), []
    for path in directory.iterdir() if directory.is_dir() else ():
        if not (STEP_NAME.fullmatch(path.name) and path.is_dir()):
            continue
        manifest, reason = None, ""
        try:
            manifest = read_manifest(path)
            for row in manifest.files:
                check_file(path, row)
        except DamagedCheckpointError as error:
            reason = str(error)
        found.append((path, manifest, reason))
    serials = {_step(path): manifest.serial for path, manifest, _ in found if manifest is not None}

    def place(one: tuple[Path, Manifest | None, str]) -> tuple[int, bool, int]:
        path, manifest, _ = one
        serial = (
            max((s for step, s in serials.items() if step < _step(path)), default=0) if manifest is None else manifest.serial
        )
        return serial, serial == 0 and path.name == named, _step(path)

    return sorted(found, key=place, reverse=True)


def _step(path: Path) -> int:
    """Step of a checkpoint, by the name of its directory."""
    return int(path.name.rpartition("_")[2])


def next_serial(directory: Path) -> int:
    """The number of the next checkpoint that is saved in `directory`."""
    return 1 + max((manifest.serial for _, manifest, _ in catalogue(directory) if manifest is not None), default=0)


def appear(work: Path, final: Path) -> None:
    """Rename a finished directory, all of it on the disk, to its final name, and let `latest` name it."""
    replaced = _set_aside(final) if final.is_dir() else None
    work.rename(final)
    sync(final.parent)
    point_latest(final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _set_aside(final: Path) -> Path | None:
    """Move an older checkpoint of the same step out of the way; returns its path, to be removed afterwards, or None if it is damaged."""
    if latest(final.parent) == final.name:
        (final.parent / LATEST).unlink()  # else it would name a missing directory between the two renames
    if _whole(final):
        aside = final.with_name(_REPLACED + final.name)
        final.rename(aside)
        return aside
    names = (f"damaged_{final.name}" + (f"_{i}" if i else "") for i in range(10**6))
    final.rename(next(path for path in map(final.with_name, names) if not path.exists()))
    return None


def _whole(path: Path) -> bool:
    """Whether the files of a checkpoint have the names and sizes in its manifest."""
    try:
        for row in read_manifest(path).files:
            check_file(path, row)
    except DamagedCheckpointError:
        return False
    return True


def latest(directory: Path) -> str:
    """The name in `latest`; "" if there is no such file."""
    file = directory / LATEST
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def point_latest(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint."""
    draft = checkpoint.with_name(_LATEST_DRAFT)
    write_file(draft, f"{checkpoint.name}\n".encode())
    draft.replace(checkpoint.with_name(LATEST))
    sync(checkpoint.parent)


def prune(directory: Path, keep: int, every: int, newest: str) -> None:
    """Remove all but the `keep` newest whole checkpoints and those of steps that are multiples of `every` (0: none of these).

    newest: name of the checkpoint just saved, one of the `keep`. Damaged checkpoints are neither counted nor removed.
    """
    whole = [path for path, _, reason in catalogue(directory) if not reason and path.name != newest]
    for path in whole[keep - 1 :]:
        if every and _step(path) % every == 0:
            continue
        doomed = path.with_name(_REMOVING + path.name)
        path.rename(doomed)  # first, so that a kill during the removal leaves no checkpoint that looks damaged
        shutil.rmtree(doomed, ignore_errors=True)


def tidy_here(directory: Path) -> None:
    """Remove or restore what crashed saves left: the names that start with a dot and follow our scheme."""
    for path in list(directory.iterdir()):
        name = re.sub(r"^\.[a-z]+_", "", path.name)
        if path.name == _LATEST_DRAFT:
            path.unlink()
        elif not STEP_NAME.fullmatch(name):
            continue
        elif path.name == _REPLACED + name and not path.with_name(name).exists():
            path.rename(path.with_name(name))
            point_latest(path.with_name(name))
        elif path.name in (SAVING + name, _REMOVING + name, _REPLACED + name):
            shutil.rmtree(path, ignore_errors=True)


def write_file(file: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with doing("writing", file), file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with doing("writing", path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
