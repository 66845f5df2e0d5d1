"""Where a run that its launcher starts again finds the copies that its ranks have left in memory, and what the restart has cost.

The launcher (torchrun) outlives its workers, so the folder has its name; a leftover of a dead launcher is removed by the next start of its
user (transport/leftovers.py). A machine that comes in the place of a lost one has a new launcher and no folder: what its ranks need comes
from the machine that has kept it. Beside the copies lies `alive`: the step that ended last and when, by the clock that all processes of the
machine share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatrain.checkpoint.directory import catalogue
from megatrain.checkpoint.in_memory import Copies, Peers
from megatrain.checkpoint.load import load
from megatrain.checkpoint.machines import Machines
from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.newest_copy import complete, newest_copy
from megatrain.checkpoint.save import Contents
from megatrain.checkpoint.tensor_file import BLOCK_BYTES
from megatrain.checkpoint.together import CheckpointError, together
from megatrain.config.schema import Config
from megatrain.job import Job
from megatrain.optim.portions import portions
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Portions
from megatrain.runtime.interface import address_of_run
from megatrain.runtime.launch import Launch, LaunchError
from megatrain.transport import leftovers
from megatrain.transport.consensus import broadcast_text, gather_texts
from megatrain.transport.group import TransportError
from megatrain.transport.handover import Handover
from megatrain.transport.owner import Owner
from megatrain.untrusted import parse_json, read_plain

ALIVE = "alive"
_LARGEST_ALIVE = 4096
"""Bytes; it has some fifty."""


def folder_of(config: Config, launch: Launch) -> Path | None:
    """The folder of a run's copies on this machine; None without a launcher that starts its workers again."""
    if launch.launcher != "torchrun":
        return None
    launcher = Owner.of(launch.launcher_process or os.getppid())
    run = xxhash.xxh3_64_hexdigest(f"{launch.job} {Path(config.checkpoint_dir).resolve()}".encode())
    return leftovers.FOLDER / leftovers.name_of(launcher, f"copy-{run}")


def meet(job: Job) -> Handover:
    """This rank's way to hand files to other machines (collective). Raises TransportError on every rank."""
    launch, world = job.session.launch, job.ctx.world
    if world.group is None:
        raise TransportError("a world of 1 rank has no other machine")
    try:
        address = address_of_run(launch, os.environ)
    except LaunchError as error:
        address = f"nowhere ({error})"
    return Handover(address, BLOCK_BYTES, world.group, job.ctx.device, launch.key)


def load_copy(
    job: Job, accept: Callable[[Path, Manifest], None], own: Callable[[], Callable[[Path, Manifest | None], bool]]
) -> tuple[Path, Manifest] | None:
    """Load the newest copy in memory, where the machines have all of it between them, and it is the run's own and newer than what is on the
    disk (collective).

    own: makes a function that tells the run's own checkpoints, asked newest first. Where a copy is not used, a note says why, and nothing
    was loaded.
    """
    config, ctx, launch, state = job.config, job.ctx, job.session.launch, portions(job.optimizer)
    folder = folder_of(config, launch) if config.checkpoint.in_memory_every else None
    if folder is None:
        return None
    machines = Machines.meet(launch.node, ctx)
    found, why_none = newest_copy(folder, ctx, machines)
    if found is None:
        job.notes += [why_none] if why_none else []
        return None
    path, manifest = found.path, found.manifest
    why = ""
    with together(ctx):
        if ctx.world.rank == 0:
            listed = catalogue(Path(config.checkpoint_dir))
            mine = own()
            newest = next((m for at, m, reason in listed if m is not None and not reason and mine(at, m)), None)
            if newest is not None and newest.step >= manifest.step:
                why = f"the checkpoint of step {newest.step} on the disk is as new"
            elif not own()(path, manifest):
                why = "it is another run's"
    why = broadcast_text(why, ctx.world.group, ctx.device)
    if not why:
        try:
            with together(ctx):
                accept(path, manifest)
            mended = complete(found, state, ctx, machines, lambda: meet(job), config.train.start_timeout_seconds / 2)
            job.notes += [f"taken from another machine, as it was damaged here: {what}" for what in mended]
            return path, load(path, state, ctx)
        except CheckpointError as error:
            why = str(error)
    job.notes.append(f"the copy of step {manifest.step} in memory is not used: {why}")
    return None


@dataclass
class Restart:
    """Cost of a restart, told once its first step has ended."""

    last_step: int
    """The last step that had ended before."""
    ended: float
    """When (time.monotonic)."""

    @classmethod
    def before(cls, folder: Path, ctx: ParallelContext) -> Restart | None:
        """The traces of the start before this one, on whatever machine they are (collective); None where there was none."""
        mine = "[-1, 0.0]"
        with suppress(OSError, ValueError, KeyError, TypeError, ArithmeticError):
            leftovers.require_private(folder)
            said = parse_json(read_plain(folder / ALIVE, _LARGEST_ALIVE, follow=False))
            mine = json.dumps([int(said["step"]), time.monotonic() - float(said["ended"])])
        step, ago = max(json.loads(text) for text in gather_texts(mine, ctx.world.group, ctx.device))
        return None if step < 0 else cls(step, time.monotonic() - ago)


class Keeper:
    """Keeps the copies of a run, as checkpoint.in_memory_every says, and measures restarts."""

    def __init__(
        self, job: Job, staging_bytes: int, say: Callable[[str], None], tell: Callable[[int, float, str], None]
    ) -> None:
        """Collective. say: prints a line, on rank 0 alone; tell(steps lost, seconds, what the run went on from): reports a restart, called
        on rank 0 alone.
        """
        launch, self._every = job.session.launch, job.config.checkpoint.in_memory_every
        self._say, self._tell, self._job = say, tell, job
        self._leads = launch.local_rank == 0
        self.copies: Copies | None = None
        self._restart: Restart | None = None
        self._from = job.step
        folder = folder_of(job.config, launch) if self._every else None
        if folder is not None:
            before = Restart.before(folder, job.ctx)
            self._restart = before if launch.rank == 0 else None
            self.copies = Copies(folder, job.ctx, leads=self._leads, staging_bytes=staging_bytes, peers=self._peers())
        elif self._every:
            say(
                "checkpoint.in_memory_every serves the restarts of torchrun (--max-restarts), which has not started this run: no copies"
            )

    def _peers(self) -> Peers | None:
        """How this rank's files come to another machine, where there is one and checkpoint.in_memory_peer asks for it (collective)."""
        config, ctx = self._job.config.checkpoint, self._job.ctx
        machines = Machines.meet(self._job.session.launch.node, ctx)
        if machines.number == 1 or not config.in_memory_peer:
            return None
        try:
            return Peers(machines, meet(self._job), config.timeout_seconds / 2)
        except TransportError as error:
            self._say(f"copies in memory are of each machine alone, as none can be kept on another: {error}")
            return None

    def after(self, step: int, contents: Callable[[], Contents], state: Callable[[], Portions]) -> None:
        """Call at the end of each step: lets the copy of the step before serve, and begins another where one is due (collective)."""
        if self.copies is None:
            return
        try:
            self.copies.publish()
            if step % self._every == 0:
                self.copies.keep(contents(), state())
        except CheckpointError as error:
            self._say(f"no copies in memory from here on: {error}")
            self._end(remove=True)
            return
        if self._leads:
            self._alive(step)

    def forget(self) -> None:
        """Remove the copies, as the run goes back to a step before them."""
        if self.copies is not None:
            self.copies.forget()

    def _alive(self, step: int) -> None:
        now, before = time.monotonic(), self._restart
        if before is not None:
            self._restart = None
            source = self._job.resumed_from
            self._tell(max(0, before.last_step - self._from), now - before.ended, "" if source is None else str(source))
        if self.copies is not None and leftovers.is_private(self.copies.folder):
            with suppress(OSError):
                (self.copies.folder / ALIVE).write_text(json.dumps({"step": step, "ended": now}))

    def close(self, *, ended: bool) -> None:
        """End; ended: the run has saved its last checkpoint, so that the copies have served."""
        self._end(remove=ended)

    def _end(self, *, remove: bool) -> None:
        copies, self.copies = self.copies, None
        if copies is not None:
            copies.close(remove=remove)
