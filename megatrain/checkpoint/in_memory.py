"""Copies of a run's state in the shared memory of its machines, for the workers that a launcher starts again after one has died.

    every rank            copies its part into blocks (writing.py); training goes on
    its thread            /dev/shm/megatrain-...-copy-.../.saving_step_00000205/exp_avg-tp00000-pp00000-dp00003.safetensors, ...
    at the next step      all ranks gather their rows; one rank of each machine writes manifest.json and renames the directory
    then                  older copies are removed, once every machine has the new one

A copy is a checkpoint whose files are spread over the machines: each holds those of its ranks, and a manifest of all. So loading, layouts
and checksums are those of any checkpoint (load.py); a rank that needs a file of another machine finds it missing, and the run goes on from
the disk. A machine holds up to two copies of what its ranks save, and the blocks.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from megatrain.checkpoint.directory import SAVING, write_file
from megatrain.checkpoint.manifest import MANIFEST, STEP_NAME, Manifest, open_file, read_manifest, step_name
from megatrain.checkpoint.save import Contents, Files, manifest_of, plan_files, rows_of
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError, together
from megatrain.checkpoint.writing import Staging, Writer
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Portions
from megatrain.transport.consensus import gather_texts


class _Pending(NamedTuple):
    """A copy that is being written."""

    contents: Contents
    portions: Portions
    files: Files
    written: Future[None]


class Copies:
    """The copies of one run. Every rank has one, and calls alike."""

    def __init__(self, folder: Path, ctx: ParallelContext, *, leads: bool, staging_bytes: int) -> None:
        """folder: in shared memory, the same on all ranks of a machine, of which one `leads`."""
        self.folder, self.ctx, self._leads = folder, ctx, leads
        self.writer = Writer(Staging(staging_bytes, ctx.device))
        self._pending: _Pending | None = None

    def keep(self, contents: Contents, portions: Portions) -> None:
        """Copy the ranks' portions (collective over the world); the copy serves once `publish` was called.

        Raises CheckpointError on every rank where one has no room.
        """
        self.publish()
        work = self.folder / (SAVING + step_name(contents.step))
        with together(self.ctx):
            if self._leads:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                for left in self.folder.glob(f"{SAVING}*"):
                    shutil.rmtree(left)
                work.mkdir()
        files = plan_files(work, portions, self.ctx)
        with together(self.ctx):
            need, free = sum(file.size for file in files.values()), shutil.disk_usage(self.folder).free
            if need > free:
                raise CheckpointError(f"a copy in memory needs {need:,} bytes, and {self.folder.parent} has {free:,} free")
            with self.writer.copying(first=True):
                for file in files.values():
                    self.writer.write(file)
        self._pending = _Pending(contents, portions, files, self.writer.then(_raise))

    def publish(self) -> None:
        """Let the copy that is being written serve, and remove older ones (collective); nothing where none is.

        Raises CheckpointError on every rank where one could not write its part.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with together(self.ctx):
            pending.written.result()
        mine = {"time": time.time(), **rows_of(pending.files, pending.portions, self.ctx)}
        rows = [json.loads(text) for text in gather_texts(json.dumps(mine), self.ctx.world.group, self.ctx.device)]
        final = self.folder / step_name(pending.contents.step)
        with together(self.ctx):
            if self._leads:
                # The same bytes on every machine, by which a copy is known.
                manifest = manifest_of(pending.contents, rows, self.ctx, self.writer.staging.block_bytes, 0, rows[0]["time"])
                write_file(self.folder / (SAVING + final.name) / MANIFEST, manifest.to_bytes())
                shutil.rmtree(final, ignore_errors=True)
                (self.folder / (SAVING + final.name)).rename(final)
        if self._leads:  # now that every machine has the new one
            for path in _steps(self.folder):
                if path != final:
                    shutil.rmtree(path, ignore_errors=True)

    def forget(self) -> None:
        """Remove the copies, and the one that is being written (collective)."""
        pending, self._pending = self._pending, None
        with together(self.ctx):
            if pending is not None:
                futures.wait([pending.written])
        with together(self.ctx):
            if self._leads and self.folder.is_dir():
                for path in [*_steps(self.folder), *self.folder.glob(f"{SAVING}*")]:
                    shutil.rmtree(path, ignore_errors=True)

    def close(self, *, remove: bool) -> None:
        """End the thread. remove: the copies too, as the run has come to an end; else a later start may need them."""
        self.writer.close()
        if remove and self._leads:
            shutil.rmtree(self.folder, ignore_errors=True)


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def _steps(folder: Path) -> list[Path]:
    """The copies in a folder."""
    return [path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)] if folder.is_dir() else []


def newest_copy(folder: Path, ctx: ParallelContext) -> tuple[Path, Manifest] | None:
    """Find the newest copy that every machine has, whose manifest is the same on all (collective); None if there is none."""
    here: dict[str, str] = {}
    with together(ctx):
        for path in _steps(folder):
            try:
                here[path.name] = read_manifest(path).checksum
            except DamagedCheckpointError:
                continue
    everywhere = [json.loads(text) for text in gather_texts(json.dumps(here), ctx.world.group, ctx.device)]
    common = [name for name, sum_ in here.items() if all(there.get(name) == sum_ for there in everywhere)]
    if not common:
        return None
    path = folder / max(common, key=lambda name: int(name.rpartition("_")[2]))
    return path, read_manifest(path)


def verify_copy(path: Path, manifest: Manifest, ctx: ParallelContext, share: tuple[int, int]) -> None:
    """Check every byte of the files of a copy that this machine has (collective), before any state is overwritten.

    share: (place of this rank among the ranks of its machine, their number). Raises DamagedCheckpointError on every rank.
    """
    place, size = share
    with together(ctx):
        present = [row for row in manifest.files if (path / row.name).exists()]
        for row in present[place::size]:
            open_file(path, row, manifest.block_bytes).verify_all()
