"""Copies of a run's state in the shared memory of its machines, for the workers that a launcher starts again after one has died.

    every rank            copies its part into blocks (writing.py); training goes on
    its thread            /dev/shm/megatrain-...-copy-.../.saving_step_00000205/exp_avg-tp00000-pp00000-dp00003.safetensors, ...
    at the next step      all ranks gather their rows; one rank of each machine writes manifest.json and renames the directory
    then                  older copies are removed, once every machine has the new one

A copy is a checkpoint whose files are spread over the machines: each holds those of its ranks, and a manifest of all. So loading, layouts
and checksums are those of any checkpoint (load.py).

Where there are several machines, each also keeps the files of another (machines.py), for its loss: a rank's thread, once it has written its
files, hands them to a rank there (transport/handover.py), and the copy serves when all have arrived. newest_copy.py finds what is left of a
copy after a machine was lost. A machine holds up to two copies of what its ranks save, and the blocks; with those of another machine, four.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.checkpoint.directory import SAVING, write_file
from megatrain.checkpoint.machines import Machines
from megatrain.checkpoint.manifest import MANIFEST, step_name
from megatrain.checkpoint.newest_copy import steps_in
from megatrain.checkpoint.save import Contents, Files, manifest_of, plan_files, rows_of
from megatrain.checkpoint.together import CheckpointError, together
from megatrain.checkpoint.writing import Staging, Writer
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Portions
from megatrain.transport.consensus import gather_texts
from megatrain.transport.group import TransportError
from megatrain.transport.handover import Handover, Parcel
from megatrain.transport.leftovers import require_private


class Peers(NamedTuple):
    """How a rank's files come to another machine."""

    machines: Machines
    handover: Handover
    seconds: float
    """Limit of handing over one copy."""


class _Pending(NamedTuple):
    """A copy that is being written."""

    contents: Contents
    portions: Portions
    files: Files
    written: Future[None]


class Copies:
    """The copies of one run. Every rank has one, and calls alike."""

    def __init__(
        self, folder: Path, ctx: ParallelContext, *, leads: bool, staging_bytes: int, peers: Peers | None = None
    ) -> None:
        """folder: in shared memory, the same on all ranks of a machine, of which one `leads`. peers: where others keep files too."""
        self.folder, self.ctx, self._leads, self._peers = folder, ctx, leads, peers
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
                require_private(self.folder)
                for left in self.folder.glob(f"{SAVING}*"):
                    shutil.rmtree(left)
                work.mkdir()
            if self._peers is not None:
                self._peers.handover.expect(work.name, work)
        files = plan_files(work, portions, self.ctx)
        with together(self.ctx):
            need, free = sum(file.size for file in files.values()), shutil.disk_usage(self.folder).free
            if need > free:
                raise CheckpointError(f"a copy in memory needs {need:,} bytes, and {self.folder.parent} has {free:,} free")
            with self.writer.copying(first=True):
                for file in files.values():
                    self.writer.write(file)
        self._pending = _Pending(contents, portions, files, self.writer.then(partial(self._written, work.name, files)))

    def _written(self, label: str, files: Files, failure: BaseException | None) -> None:
        """In the thread: hand the files that are written to another machine. Raises CheckpointError, or the failure to write them."""
        if failure is not None:
            raise failure
        receiver = None if self._peers is None else self._peers.machines.receiver(self.ctx.world.rank)
        if self._peers is not None and receiver is not None:
            parcels = [Parcel(file.path, file.size, tuple(file.blocks)) for file in files.values()]
            try:
                self._peers.handover.send(receiver, label, parcels, self._peers.seconds)
            except TransportError as error:
                raise CheckpointError(
                    f"{error}. With checkpoint.in_memory_peer=false each machine keeps its own alone."
                ) from error

    def publish(self) -> None:
        """Let the copy that is being written serve, and remove older ones (collective); nothing where none is.

        Raises CheckpointError on every rank where one could not write its part, or hand it to another machine.
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
            self._check_taken(rows)
            if self._leads:
                # The same bytes on every machine, by which a copy is known.
                manifest = manifest_of(pending.contents, rows, self.ctx, self.writer.staging.block_bytes, 0, rows[0]["time"])
                write_file(self.folder / (SAVING + final.name) / MANIFEST, manifest.to_bytes())
                shutil.rmtree(final, ignore_errors=True)
                (self.folder / (SAVING + final.name)).rename(final)
        if self._leads:  # now that every machine has the new one
            for path in steps_in(self.folder):
                if path != final:
                    shutil.rmtree(path, ignore_errors=True)

    def _check_taken(self, rows: list[dict[str, Any]]) -> None:
        """Raise CheckpointError unless this rank has all that others were to hand it, as the rows of all ranks say."""
        if self._peers is None:
            return
        for giver in self._peers.machines.givers(self.ctx.world.rank):
            for row in rows[giver]["files"]:
                if self._peers.handover.taken.get(row["name"]) != (row["bytes"], tuple(row["blocks"])):
                    raise CheckpointError(f"{row['name']} of rank {giver} has not come, or not as rank {giver} describes it")

    def forget(self) -> None:
        """Remove the copies, and the one that is being written (collective)."""
        pending, self._pending = self._pending, None
        with together(self.ctx):
            if pending is not None:
                futures.wait([pending.written])
        with together(self.ctx):
            if self._leads and self.folder.is_dir():
                for path in [*steps_in(self.folder), *self.folder.glob(f"{SAVING}*")]:
                    shutil.rmtree(path, ignore_errors=True)

    def close(self, *, remove: bool) -> None:
        """End the thread. remove: the copies too, as the run has come to an end; else a later start may need them."""
        if self._peers is not None:
            self._peers.handover.close()  # first, so that the thread does not wait for another machine
        self.writer.close()
        if remove and self._leads:
            shutil.rmtree(self.folder, ignore_errors=True)
