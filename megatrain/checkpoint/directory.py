"""A directory of checkpoints: what it holds, and the renames by which a checkpoint appears or goes.

    .lock                    held by the run that saves here (claim.py)
    .saving_step_00000300    being written; rubbish after a crash
    step_00000200            whole: it got this name when all its files were on the disk
    latest                   text file with the name of the newest whole one; replaced after that one has its name

A removal works the other way round: the directory first gets a name that starts with a dot.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatrain.checkpoint.manifest import LATEST, STEP_NAME, Manifest, check_file, read_manifest
from megatrain.checkpoint.run_state import MOST
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError, together
from megatrain.files import doing
from megatrain.parallel.mesh import ParallelContext
from megatrain.untrusted import read_plain

SAVING, _REMOVING, _REPLACED, _LATEST_DRAFT = ".saving_", ".removing_", ".replaced_", ".latest_draft"


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
    """The number of the next checkpoint that is saved in `directory`. Raises CheckpointError where readers would refuse it."""
    largest = max((manifest.serial for _, manifest, _ in catalogue(directory) if manifest is not None), default=0)
    if largest + 1 >= MOST:
        raise CheckpointError(
            f"{directory} has a checkpoint with the serial {largest}, and larger ones are not read: no run counts so far. Nothing was "
            "saved. Move that checkpoint away, or set checkpoint.dir to another directory."
        )
    return largest + 1


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
    _keep_damaged(final)
    return None


def _keep_damaged(path: Path) -> None:
    """Rename what is not as a run has left it, so that nobody's work is lost."""
    names = (f"damaged_{path.name}" + (f"_{i}" if i else "") for i in range(10**6))
    path.rename(next(free for free in map(path.with_name, names) if not os.path.lexists(free)))


def _whole(path: Path) -> bool:
    """Whether the files of a checkpoint have the names and sizes in its manifest."""
    try:
        for row in read_manifest(path).files:
            check_file(path, row)
    except DamagedCheckpointError:
        return False
    return True


_LONGEST_NAME = 4096
"""Bytes of `latest`, which has thirteen."""


def latest(directory: Path) -> str:
    """The name in `latest`; "" if there is no such file, or one that holds no name or cannot be read: the manifests have the order."""
    file = directory / LATEST
    try:
        return read_plain(file, _LONGEST_NAME, follow=False).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def point_latest(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint."""
    draft, file = checkpoint.with_name(_LATEST_DRAFT), checkpoint.with_name(LATEST)
    write_file(draft, f"{checkpoint.name}\n".encode())
    if file.is_dir() and not file.is_symlink():
        _keep_damaged(file)
    draft.replace(file)
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
            _remove(path)
        elif not STEP_NAME.fullmatch(name):
            continue
        elif path.name == _REPLACED + name and not path.with_name(name).exists():
            path.rename(path.with_name(name))
            point_latest(path.with_name(name))
        elif path.name in (SAVING + name, _REMOVING + name, _REPLACED + name):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link in its place; not what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def write_file(file: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    with doing("writing", file), os.fdopen(os.open(file, flags, 0o666), "wb") as stream:
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
