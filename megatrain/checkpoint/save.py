"""Save a checkpoint so that a crash at any moment leaves a whole one behind.

    every rank        copies the elements that it owns, block by block (writing.py); training goes on
    its thread        .saving_step_00000200/exp_avg-tp00000-pp00000-dp00003.safetensors, ..., fsync, rank-00003.json: rows of the manifest
    rank 0's thread   when every rank has left its rows: manifest.json, fsync, rename to step_00000200, `latest`

Each data-parallel rank writes its part of every slice, whatever the ZeRO stage and however many ranks share the shards: nothing is
gathered, all disks and links are used, and the files are the same.
The threads meet in the directory, without collectives, since training steps use the groups meanwhile.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatrain.checkpoint.directory import SAVING, appear, next_serial, prune, sync, tidy_here, write_file
from megatrain.checkpoint.manifest import (
    MANIFEST,
    FileRow,
    Manifest,
    StoredTensor,
    check_file,
    check_portions,
    file_name,
    file_place,
    layout_of,
    row_from_json,
    step_name,
    tensor_from_json,
    tensor_to_json,
)
from megatrain.checkpoint.tensor_file import BLOCK_BYTES
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError, together
from megatrain.checkpoint.writing import PlannedFile, Staging, Writer
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import AverageOver
from megatrain.parallel.portion import ElementRange, Elements, Portion, Portions, axis_of, logical_numel
from megatrain.stderr import note
from megatrain.transport.consensus import gather_texts, lowest

DEFAULT_STAGING_BYTES = 16 * 2**30
Files = Mapping[tuple[str, AverageOver], PlannedFile]
"""(kind, axis of the replicas of its tensors) -> file that this rank writes."""
_LOOK_SECONDS = 0.02
"""Seconds between two looks for the rows of the other ranks."""
_OTHERS_FIRST_SECONDS = 5.0
"""How much longer rank 0's publishing may take than a rank's own writing."""
_PATIENCE_SECONDS = 30.0
"""How long a run that ends waits for the files of other ranks."""


@dataclass(frozen=True)
class Contents:
    """Everything in a checkpoint besides the tensors."""

    step: int
    progress: Mapping[str, Any]
    """State of the run, plain JSON."""
    config: str
    """The resolved config as YAML."""


class Saver:
    """Saves the checkpoints of one run into one directory, one at a time."""

    def __init__(
        self,
        directory: Path,
        ctx: ParallelContext,
        *,
        keep: int = 0,
        keep_every: int = 0,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
        block_bytes: int = BLOCK_BYTES,
        on_saved: Callable[[Path, int, float], None] | None = None,
        on_failed: Callable[[int, str], None] | None = None,
    ) -> None:
        """keep: number of newest checkpoints to keep, 0 for all; keep_every: steps whose multiples are kept as well, 0 for none.

        staging_bytes: limit of the host memory that a save is copied into. on_saved(path, step, seconds), on_failed(step, message): called
        on rank 0, most often from the thread that writes.
        """
        self.directory, self.ctx, self.keep, self.keep_every = Path(directory), ctx, keep, keep_every
        self.writer = Writer(Staging(staging_bytes, ctx.device, block_bytes))
        self._on_saved, self._on_failed = on_saved, on_failed
        self.before: Callable[[], None] = lambda: None
        """Called on rank 0 before a save; raises CheckpointError where the directory is another run's by now."""
        self._written: Future[None] | None = None
        """Ends when this rank's share of the save in progress is written."""
        self._published: Future[None] | None = None
        """On rank 0: ends when the checkpoint is published."""
        self._patience_ends = math.inf
        self._serial = 0
        """On rank 0: number of the next checkpoint in the directory; 0 before the first."""
        self._known = ""
        """On rank 0: why the save in progress fails, as the ranks have agreed; a rank without a disk cannot leave word in a file."""
        self._began = 0.0
        self.longest = 0.0
        """Seconds of the longest save so far on this rank (rank 0: of all ranks), to the end of its writing; 0 before the first."""
        self._threads: tuple[Future[None], ...] = ()
        """The same two, kept when they have been waited for."""

    def save(self, contents: Contents, portions: Portions, *, wait: bool = True) -> Path:
        """Save the ranks' portions as directory/step_XXXXXXXX (collective over the world) and return that path.

        Unless `wait`, returns as soon as everything is copied. A checkpoint of the same step is replaced; if that one is damaged, it is
        kept as damaged_step_XXXXXXXX. First waits for the save before this one.

        Raises CheckpointError on every rank where this save, or the one before, fails on any (full disk, no permission ...);
        older checkpoints then are unchanged.
        """
        self.finish()
        self._known = ""
        began, self._began = time.perf_counter(), time.monotonic()
        final = self.directory / step_name(contents.step)
        work = self.directory / (SAVING + final.name)
        leads, self.writer.at = self.ctx.world.rank == 0, work
        try:
            with together(self.ctx):
                check_portions(portions, self.ctx)
                files = plan_files(work, portions, self.ctx)
                json.dumps(contents.progress, allow_nan=False)
            sizes = gather_texts(str(sum(file.size for file in files.values())), self.ctx.world.group, self.ctx.device)
            with together(self.ctx):
                if leads:
                    self.before()
                    _make_room(work, sum(map(int, sizes)))
            with together(self.ctx):
                self._stage(work, files, wait)
        except CheckpointError as error:
            if leads:
                _clear(self.directory)
                self._tell_failed(contents.step, error)
            raise
        written = self.writer.then(lambda failure: _settle(work, files, portions, self.ctx, failure))
        self._written = written
        if leads:
            self._published = self.writer.then(lambda _: self._conclude(work, final, contents, began, written))
        self._threads = tuple(future for future in (self._written, self._published) if future is not None)
        for last in self._threads[-1:]:
            last.add_done_callback(partial(self._note_seconds, self._began))
        if wait:
            self.finish()
        return final

    def _note_seconds(self, began: float, done: Future[None]) -> None:
        if done.exception() is None:
            self.longest = max(self.longest, time.monotonic() - began)

    def ended(self) -> bool:
        """Whether the save in progress has ended, or a rank's part of it has failed (collective); does not wait for the disk."""
        group, device = self.ctx.world.group, self.ctx.device
        running = [future for future in (self._written, self._published) if future is not None and not future.done()]
        failed = self._written is not None and self._written.done() and self._written.exception() is not None
        return lowest(bool(running), group, device) is None or lowest(failed, group, device) is not None

    def place(self) -> str:
        """The file or directory that the save is at."""
        return str(self.writer.at)

    def unfinished(self) -> tuple[float, str] | None:
        """When the save in progress has begun (time.monotonic), and the file that it is at; None if all is on the disk.

        Rank 0 waits for the other ranks' files: it gives them some seconds, in which a rank whose own disk does not answer says so.
        """
        mine, *whole = self._threads or (None,)
        if mine is not None and not mine.done():
            return self._began, self.place()
        return next(((self._began + _OTHERS_FIRST_SECONDS, self.place()) for future in whole if not future.done()), None)

    def finish(self) -> None:
        """Wait for the save in progress (collective). Raises CheckpointError on every rank if it has failed on any."""
        written, published = self._written, self._published
        self._written = self._published = None
        with together(self.ctx):
            pass  # all ranks have handed their thread the work that rank 0's thread waits for
        try:
            with together(self.ctx):
                if written is not None:
                    written.result()
        except CheckpointError as error:
            self._known = str(error)
            with together(self.ctx):
                futures.wait([] if published is None else [published])
            raise
        with together(self.ctx):
            if published is not None:
                published.result()

    def close(self) -> None:
        """End the thread. A save in progress is completed, unless another rank does not finish its part in time."""
        self._patience_ends = time.monotonic() + _PATIENCE_SECONDS
        self.writer.close()

    def _stage(self, work: Path, files: Files, wait: bool) -> None:
        """Copy the elements that this rank owns, for the thread to write."""
        if not work.is_dir():
            raise CheckpointError(
                f"{work} is not there, and rank 0 has just made it. Set checkpoint.dir to a directory that all nodes share."
            )
        with self.writer.copying(first=not wait):
            for file in files.values():
                self.writer.write(file)

    def _conclude(self, work: Path, final: Path, contents: Contents, began: float, written: Future[None]) -> None:
        """In rank 0's thread: publish the checkpoint when all ranks have written, or remove their files."""
        try:
            written.result()
            rows = self._rows_of_all(work)
            self._serial = self._serial or next_serial(self.directory)
            _publish(work, final, contents, rows, self.ctx, self.writer.staging.block_bytes, self._serial)
            self._serial += 1
        except Exception as error:
            _clear(self.directory)
            self._tell_failed(contents.step, error)
            raise
        if self._on_saved is not None:
            self._on_saved(final, contents.step, time.perf_counter() - began)
        try:
            if self.keep:
                prune(self.directory, self.keep, self.keep_every, final.name)
        except (CheckpointError, OSError) as error:  # the new one is whole: no failure of the save
            note(f"megatrain: older checkpoints than {final} could not be removed: {error}")

    def _tell_failed(self, step: int, error: Exception) -> None:
        if self._on_failed is not None:
            self._on_failed(step, str(error))

    def _rows_of_all(self, work: Path) -> list[dict[str, Any]]:
        """The rows that the ranks left, in rank order, once all have. Raises CheckpointError if a rank failed."""
        rows: list[dict[str, Any]] = []
        failed: list[str] = []
        while len(rows) + len(failed) < self.ctx.world.size:
            left = self.writer.at = work / f"rank-{len(rows) + len(failed):05d}"
            if left.with_suffix(".json").is_file():
                rows.append(json.loads(left.with_suffix(".json").read_text()))
            elif left.with_suffix(".failed").is_file():
                failed.append(left.with_suffix(".failed").read_text())
            elif self._known:
                raise CheckpointError(self._known)
            elif time.monotonic() > self._patience_ends or not work.is_dir():
                raise CheckpointError(f"rank {len(rows) + len(failed)} has not written its part of {work} to the end")
            else:
                time.sleep(_LOOK_SECONDS)
        if failed:  # only now, when no rank writes here any more
            raise CheckpointError(failed[0])
        return rows


def save(directory: Path, contents: Contents, portions: Portions, ctx: ParallelContext, keep: int = 0) -> Path:
    """Save one checkpoint and return its directory, as `Saver.save` does (collective over the world)."""
    saver = Saver(directory, ctx, keep=keep)
    try:
        return saver.save(contents, portions)
    finally:
        saver.close()


def plan_files(work: Path, portions: Portions, ctx: ParallelContext) -> Files:
    """The files to write of the elements that this rank owns."""
    runs: dict[tuple[str, AverageOver], dict[str, tuple[Elements, int]]] = defaultdict(dict)
    for kind, named in portions.items():
        for name, portion in named.items():
            if (run := _owned(portion, ctx)) is not None:
                runs[kind, portion.spec.average_over][name] = run
    return {(kind, over): PlannedFile(work / file_name(kind, _place(over, ctx)), of) for (kind, over), of in runs.items()}


def _place(over: AverageOver, ctx: ParallelContext) -> dict[str, int]:
    """Place of this rank's files for tensors with replicas along `over`."""
    return file_place(over, {"tp": ctx.tp.rank, "pp": ctx.pp.rank, "ep": ctx.ep.rank, "dp": ctx.part(over)})


def _owned(portion: Portion, ctx: ParallelContext) -> tuple[Elements, int] | None:
    """The elements that this rank writes of a portion, and their number; None for none. Raises ValueError if it does not hold them."""
    spec = portion.spec
    if not spec.owned(ctx):
        return None
    first, stop = portion.partition.run(logical_numel(spec, axis_of(spec, ctx)), ctx.part(spec.average_over))
    if first >= stop:
        return None
    if first < portion.first or stop > portion.first + portion.count:
        raise ValueError(
            f"{spec.name}: this rank is to write elements {first} to {stop} and holds {portion.first} to "
            f"{portion.first + portion.count}"
        )
    return ElementRange(portion.elements, first - portion.first), stop - first


def _make_room(work: Path, need: int) -> None:
    """Make the directory for a save of `need` bytes. Raises CheckpointError if the disk has fewer bytes free."""
    directory = work.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tidy_here(directory)
        work.mkdir()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(
            f"cannot make {work}: {error.strerror or error}. Older checkpoints are as they were. See to it that checkpoint.dir={directory} "
            "can be written."
        ) from error
    if need > free:
        raise CheckpointError(
            f"the checkpoint needs {need:,} bytes, and the disk of {directory} has {free:,} free; nothing was written, and older "
            "checkpoints are as they were. Make room, lower checkpoint.keep, or set checkpoint.dir to another disk."
        )


def _settle(work: Path, files: Files, portions: Portions, ctx: ParallelContext, failure: BaseException | None) -> None:
    """In the thread: leave a file for rank 0 with the rows of what this rank wrote, or with the reason why it did not."""
    left = work / f"rank-{ctx.world.rank:05d}"
    try:
        if failure is not None:
            raise failure
        write_file(left.with_suffix(".draft"), json.dumps(rows_of(files, portions, ctx)).encode())
        left.with_suffix(".draft").replace(left.with_suffix(".json"))
    except Exception as error:
        with suppress(OSError):  # the first error is the one to report
            for file in files.values():
                file.path.unlink(missing_ok=True)  # frees space for the report, on a full disk
            left.with_suffix(".draft").write_text(f"rank {ctx.world.rank}: {error}")
            left.with_suffix(".draft").replace(left.with_suffix(".failed"))
        raise


def rows_of(files: Files, portions: Portions, ctx: ParallelContext) -> dict[str, Any]:
    """This rank's rows of the manifest, as plain JSON, once its files are written. Raises ValueError where two kinds disagree."""
    rows = [asdict(FileRow(f.path.name, kind, _place(over, ctx), f.size, tuple(f.blocks))) for (kind, over), f in files.items()]
    return {"files": rows, "tensors": _describe(files, portions, ctx)}


def _describe(files: Files, portions: Portions, ctx: ParallelContext) -> list[dict[str, Any]]:
    """Rows of the manifest's `tensors` for this rank's files. Raises ValueError where two kinds disagree about a tensor."""
    stored: dict[str, StoredTensor] = {}
    for (kind, over), file in files.items():
        for name in file.runs:
            portion = portions[kind][name]
            dtype = str(portion.elements.dtype).removeprefix("torch.")
            cut = None if portion.spec.split is None else portion.spec.split.axis
            ep = ctx.ep.rank if over == "edp" and cut != "ep" else 0
            _merge(stored, StoredTensor(portion.spec, ctx.pp.rank, {kind: dtype}, portion.partition, ep))
    return [tensor_to_json(tensor) for tensor in stored.values()]


def _merge(stored: dict[str, StoredTensor], tensor: StoredTensor) -> None:
    """Merge the kinds of a tensor that was described before. Raises ValueError where the descriptions differ."""
    known = stored.setdefault(tensor.spec.name, tensor)
    same = known._replace(dtypes={}) == tensor._replace(dtypes={})
    if not same or any(known.dtypes.get(kind, dtype) != dtype for kind, dtype in tensor.dtypes.items()):
        raise ValueError(
            f"{tensor.spec.name} is stored as {tensor} and as {known}; a copy on another stage must say that it is `tied`"
        )
    stored[tensor.spec.name] = known._replace(dtypes={**known.dtypes, **tensor.dtypes})


def _publish(
    work: Path, final: Path, contents: Contents, rows: list[dict[str, Any]], ctx: ParallelContext, block_bytes: int, serial: int
) -> None:
    """Turn the written files into a checkpoint: manifest, rename, `latest`."""
    manifest = manifest_of(contents, rows, ctx, block_bytes, serial, time.time())
    for file in manifest.files:
        try:
            check_file(work, file)
        except DamagedCheckpointError as error:
            raise CheckpointError(f"{error}. Another rank has just written it: do all nodes share {final.parent}?") from error
    for left in work.glob("rank-*"):
        left.unlink()
    write_file(work / MANIFEST, manifest.to_bytes())
    sync(work)
    appear(work, final)


def manifest_of(
    contents: Contents, rows: list[dict[str, Any]], ctx: ParallelContext, block_bytes: int, serial: int, saved_at: float
) -> Manifest:
    """The manifest of a checkpoint, of all ranks' rows in rank order. Raises ValueError where two ranks disagree about a tensor."""
    tensors: dict[str, StoredTensor] = {}
    for row in (row for part in rows for row in part["tensors"]):
        _merge(tensors, tensor_from_json(row))
    files = tuple(row_from_json(row) for part in rows for row in part["files"])
    versions = {name: _version(name) for name in ("megatrain", "torch")} | {"python": platform.python_version()}
    layout = layout_of(ctx)
    return Manifest(
        contents.step, saved_at, contents.progress, layout, files, tensors, contents.config, versions, block_bytes, serial
    )


def _clear(directory: Path) -> None:
    """Remove the files of a failed save; if that fails too, the next start removes them."""
    with suppress(OSError):
        tidy_here(directory)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "unknown"
