"""Load a checkpoint: find the newest that verifies, and fill this rank's elements with what they need, under any layout.

Both sides of a load are runs of elements of a slice of a logical tensor: the pieces that lie in files (`Manifest.pieces`) and the
portions that this rank holds. A run is a few boxes; where boxes of the two sides meet, elements are copied out of the memory-mapped file,
and only blocks in which such elements lie are read and verified:

    saved under tp 2:   file 0 rows 0-5 | file 1 rows 6-9        wanted by place 1 of tp 4: rows 3-5  ->  file 0, its rows 3-5
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from megatrain.checkpoint import boxes
from megatrain.checkpoint.directory import catalogue
from megatrain.checkpoint.manifest import (
    MANIFEST,
    WEIGHTS,
    FileRow,
    Manifest,
    check_file,
    check_portions,
    dtype_of,
    open_file,
    read_manifest,
)
from megatrain.checkpoint.tensor_file import Move, TensorFile, move
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError, together
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Cut, Plain, Portion, Portions, axis_of, logical_numel
from megatrain.transport.consensus import broadcast_text, gather_texts

OnDamaged = Callable[[Path, str], None]
"""Told of a damaged checkpoint that was passed over: its path, and what is wrong with it. Called on every rank."""

_SHOWN = 4
"""How many names an error lists."""


class _Source(NamedTuple):
    """Elements of one tensor of one file that a rank needs."""

    row: FileRow
    name: str
    numel: int
    """Elements that the file must hold under that name."""
    dtype: torch.dtype
    """Dtype the file must have under that name."""
    shape: tuple[int, ...]
    """Of the slice that the file holds a run of."""
    first: int
    """Of that run."""
    boxes: list[tuple[boxes.Box, boxes.Box]]
    """What to copy: a box of the slice in the file, and the same elements as a box of the rank's slice."""

    def ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """Bytes of the file, of which the tensor begins at `start`."""
        for box, _ in self.boxes:
            first, stop = boxes.reach(self.shape, box)
            yield start + (first - self.first) * self.dtype.itemsize, start + (stop - self.first) * self.dtype.itemsize


class _Target(NamedTuple):
    """A portion of this rank and where its numbers come from."""

    portion: Portion
    shape: tuple[int, ...]
    """Of the rank's slice, without padding."""
    stop: int
    """The element behind the last logical one of the portion."""
    sources: list[_Source]


def newest(directory: Path, on_damaged: OnDamaged | None = None) -> Path | None:
    """The newest checkpoint of `directory` whose every byte is right, or None; for one process. A damaged one is passed over."""
    for path, _, known in catalogue(Path(directory)):
        reason = known
        if not reason:
            try:
                verify(path)
            except CheckpointError as error:
                reason = str(error)
        if not reason:
            return path
        if on_damaged is not None:
            on_damaged(path, reason)
    return None


def load_newest(
    directory: Path,
    portions: Portions,
    ctx: ParallelContext,
    on_damaged: OnDamaged | None = None,
    accept: Callable[[Path, Manifest], None] | None = None,
    own: Callable[[Path, Manifest | None], bool] | None = None,
) -> tuple[Path, Manifest] | None:
    """Load the newest checkpoint of `directory` that is whole (collective); None where there is none at all.

    `own`, asked on rank 0, says whether one counts; its manifest is None where that cannot be read.

    Ranks verify what they read, so that together they verify all that is loaded, in one pass. A damaged checkpoint is passed over,
    never touched. `accept` may refuse one by raising. Raises CheckpointError where there are checkpoints and none is whole: a run
    that has lost its past must not begin anew by itself.
    """
    found = "[]"
    with together(ctx):
        if ctx.world.rank == 0:
            listed = catalogue(Path(directory))
            found = json.dumps([(path.name, reason) for path, manifest, reason in listed if own is None or own(path, manifest)])
    damaged: list[str] = []
    for name, known in json.loads(broadcast_text(found, ctx.world.group, ctx.device)):
        path, reason = Path(directory) / name, known
        if not reason:
            try:
                with together(ctx):
                    if accept is not None:
                        accept(path, read_manifest(path))
                return path, load(path, portions, ctx)
            except DamagedCheckpointError as error:
                reason = str(error)
        damaged.append(f"{name}: {reason}")
        if on_damaged is not None:
            on_damaged(path, reason)
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {directory} is whole (the newest: {damaged[0]}). "
            "Put a whole copy of one back, or begin anew in another checkpoint.dir, which leaves them where they are."
        )
    return None


def verify(path: Path, ctx: ParallelContext | None = None) -> None:
    """Check every byte of a checkpoint, each rank a share of its files (collective).

    Raises DamagedCheckpointError, naming the first file that is not as its manifest says.
    """
    ctx = ParallelContext.single() if ctx is None else ctx
    with together(ctx):
        manifest = read_manifest(path)
        for row in manifest.files[ctx.world.rank :: ctx.world.size]:
            open_file(path, row, manifest.block_bytes).verify_all()


def find(path: Path, on_damaged: OnDamaged | None = None) -> Path:
    """The checkpoint that a person means by `path`: a step directory, a directory of checkpoints, or a run directory.

    For one process. Raises CheckpointError if there is none that verifies.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        found = newest(directory, on_damaged=on_damaged)
        if found is not None:
            return found
    raise CheckpointError(
        f"no whole checkpoint in {path}. Give a step directory (it holds {MANIFEST}), a directory with step_XXXXXXXX in it, "
        "or a run directory."
    )


def load(path: Path, portions: Portions, ctx: ParallelContext, *, check: bool = True) -> Manifest:
    """Fill what this rank holds from the checkpoint at `path` (collective over the world) and return its manifest.

    Under any layout; numbers are cast to the dtype of the elements given, padding becomes zero, and kinds that the checkpoint has and
    `portions` has not are left alone. `check`: compare the checksums of all blocks that this rank reads.

    Raises, on every rank, ContentError (tensors missing, too many, of other shapes), before anything is filled, or
    DamagedCheckpointError; what was to be filled then holds anything.
    """
    with together(ctx):
        manifest = read_manifest(path)
        check_portions(portions, ctx)
        _check_kinds(manifest, portions)
    for kind in portions:
        names = set(portions[kind])
        for axis in (ctx.dp_cp, ctx.pp):
            names = {
                name for text in gather_texts(json.dumps(sorted(names)), axis.group, ctx.device) for name in json.loads(text)
            }
        with together(ctx):
            _check_names(manifest, kind, names)
    with ExitStack() as opened:
        with together(ctx):
            targets = _targets(manifest, portions, ctx)
            files = {row.name: opened.enter_context(open_file(path, row, manifest.block_bytes)) for row in _rows(targets)}
            _check_entries(files, targets)
        with together(ctx), torch.no_grad():
            rest = targets
            if check:
                moves, rest = _moves(targets, files)
                move([(files[name], of) for name, of in moves.items()])
                _verify(files, targets)
            for target in rest:
                _fill(target, files)
    return manifest


def read_weights(path: Path, *, check: bool = True) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint as a whole logical tensor on the CPU, in the dtype it was saved in. For one process."""
    manifest = read_manifest(path)
    for row in manifest.files:
        check_file(path, row)  # before memory is taken for what they should hold
    tensors = {
        name: torch.empty(stored.spec.shape, dtype=dtype_of(stored.dtypes[WEIGHTS]))
        for name, stored in manifest.tensors.items()
        if WEIGHTS in stored.dtypes
    }
    wanted = {name: Portion.whole(manifest.tensors[name].spec, tensor) for name, tensor in tensors.items()}
    load(path, {WEIGHTS: wanted}, ParallelContext.single(), check=check)
    return tensors


class StoredElements:
    """All elements of one kind of a logical tensor of a checkpoint, read when they are asked for. For one process."""

    def __init__(self, path: Path, manifest: Manifest, kind: str, name: str) -> None:
        self._path, self._manifest, self._kind, self._name = path, manifest, kind, name
        self.dtype = dtype_of(manifest.tensors[name].dtypes[kind])

    direct = False

    def read(self, part: slice) -> torch.Tensor:
        """Elements [n]; a copy."""
        values = torch.empty(part.stop - part.start, dtype=self.dtype)
        spec = self._manifest.tensors[self._name].spec
        portion = Portion(spec, part.start, values.numel(), Plain(values), Cut(0, max(1, spec.numel)))
        target = _target(self._manifest, self._kind, self._name, portion, ParallelContext.single())
        with ExitStack() as opened:
            rows = {source.row.name: source.row for source in target.sources}.values()
            files = {row.name: opened.enter_context(open_file(self._path, row, self._manifest.block_bytes)) for row in rows}
            _check_entries(files, [target])
            _fill(target, files)
        return values

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Not to be done. Raises CheckpointError."""
        raise CheckpointError(f"{self._path} is only read")


def _check_kinds(manifest: Manifest, portions: Portions) -> None:
    """Raise ContentError for a kind that is not there."""
    for kind in portions:
        if kind not in manifest.kinds:
            raise ContentError(
                f"the checkpoint of step {manifest.step} holds {', '.join(manifest.kinds)}, but no {kind}. Was it saved with "
                "another optim.name? To take its weights alone: checkpoint.weights_only=true, checkpoint.resume=PATH of the "
                "checkpoint, and another checkpoint.dir."
            )


def _check_names(manifest: Manifest, kind: str, wanted: Collection[str]) -> None:
    """Raise ContentError unless the model and the checkpoint have the same tensors of a kind."""
    stored = {name for name, tensor in manifest.tensors.items() if kind in tensor.dtypes}
    for these, what in ((set(wanted) - stored, "lacks"), (stored - set(wanted), "has, and the config does not give,")):
        if these:
            raise ContentError(
                f"the checkpoint of step {manifest.step} {what} {len(these)} of {len(stored | set(wanted))} tensors of {kind}: "
                f"{_some(these)}. Check the model section of the config against the checkpoint's."
            )


def _some(names: Collection[str]) -> str:
    """The first few names."""
    return ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _targets(manifest: Manifest, portions: Portions, ctx: ParallelContext) -> list[_Target]:
    """What to copy from where. Raises ContentError where shapes or dtypes do not fit."""
    given = [(kind, name, portion) for kind, named in portions.items() for name, portion in named.items()]
    problems = [problem for kind, name, portion in given if (problem := _misfit(manifest, kind, name, portion))]
    problems = list(dict.fromkeys(problems))  # a shape is that of a tensor's moments too
    if problems:
        raise ContentError(f"{len(problems)} tensors do not fit the config: " + "; ".join(problems[:_SHOWN]))
    return [_target(manifest, kind, name, portion, ctx) for kind, name, portion in given]


def table_hint(name: str, have: Sequence[int], give: Sequence[int]) -> str:
    """What to set where only the rows of a table of learned positions differ; "" elsewhere."""
    if name not in ("embedding.positions", "embedding.block_positions") or tuple(have[1:]) != tuple(give[1:]):
        return ""
    return f" (in training: model.max_positions={have[0]}, whatever model.seq_length is)"


def _misfit(manifest: Manifest, kind: str, name: str, portion: Portion) -> str:
    """Why a stored tensor cannot fill the one given; "" if it can."""
    stored = manifest.tensors[name]
    if stored.spec.shape != portion.spec.shape:
        have, give = stored.spec.shape, portion.spec.shape
        return f"{name}: the checkpoint has {list(have)}, the config gives {list(give)}{table_hint(name, have, give)}"
    kept, want = dtype_of(stored.dtypes[kind]), portion.elements.dtype
    if kept != want and not (kept.is_floating_point and want.is_floating_point):
        return f"{kind} of {name}: the checkpoint has {kept}, this run {want}"
    return ""


def _target(manifest: Manifest, kind: str, name: str, portion: Portion, ctx: ParallelContext) -> _Target:
    """Where the elements of one portion come from."""
    axis = axis_of(portion.spec, ctx)
    mine = portion.spec.slices(axis.size, axis.rank)
    shape = tuple(s.stop - s.start for s in mine)
    stop = min(portion.first + portion.count, logical_numel(portion.spec, axis))
    wanted = [boxes.moved(box, mine) for box in boxes.of_run(shape, portion.first, stop)]  # of the logical tensor
    dtype = dtype_of(manifest.tensors[name].dtypes[kind])
    found: dict[tuple[int, ...], _Source] = {}
    for want in wanted:
        for place, stored, first, end in manifest.pieces(name, want):
            there = tuple(s.stop - s.start for s in stored)
            key = tuple(place.values())
            for box in boxes.of_run(there, first, end):
                shared = boxes.intersect(boxes.moved(box, stored), want)
                if boxes.numel(shared):
                    if key not in found:
                        found[key] = _Source(manifest.row(kind, place), name, end - first, dtype, there, first, [])
                    found[key].boxes.append((boxes.within(shared, stored), boxes.within(shared, mine)))
    return _Target(portion, shape, stop, list(found.values()))


def _rows(targets: list[_Target]) -> list[FileRow]:
    """The files that are needed, each once."""
    return list({source.row.name: source.row for target in targets for source in target.sources}.values())


def _check_entries(files: dict[str, TensorFile], targets: list[_Target]) -> None:
    """Raise DamagedCheckpointError where a file does not hold what the manifest says."""
    for source in (source for target in targets for source in target.sources):
        file = files[source.row.name]
        entry = file.entries.get(source.name)
        if entry is None:
            raise DamagedCheckpointError(f"{file.path} has no {source.name}, which {MANIFEST} says it holds")
        if entry.shape != (source.numel,) or entry.dtype != source.dtype:
            raise DamagedCheckpointError(
                f"{file.path}: {source.name} is {list(entry.shape)} of {entry.dtype}, {MANIFEST} says [{source.numel}] of {source.dtype}"
            )


def _moves(targets: list[_Target], files: dict[str, TensorFile]) -> tuple[dict[str, list[Move]], list[_Target]]:
    """By file, the bytes of the portions that lie in files as in this process's memory, row by row; and the other portions.

    What lies behind the logical elements of the former becomes zero.
    """
    found: dict[str, list[Move]] = {name: [] for name in files}
    rest: list[_Target] = []
    for target in targets:
        moves = _in_rows(target, files)
        if moves is None:
            rest.append(target)
            continue
        portion = target.portion
        if target.stop < portion.first + portion.count:
            portion.elements.read(slice(target.stop - portion.first, portion.count)).zero_()
        for source, of in zip(target.sources, moves, strict=True):
            found[source.row.name].append(of)
    return found, rest


def _in_rows(target: _Target, files: dict[str, TensorFile]) -> list[Move] | None:
    """The bytes of each source of a portion, where all of them lie in the file as in this process's memory; else None."""
    portion, elements = target.portion, target.portion.elements
    if not elements.direct or target.stop <= portion.first:
        return None
    values = elements.read(slice(0, portion.count))
    size, moves = values.element_size(), []
    for source in target.sources:
        count = sum(boxes.numel(box) for box, _ in source.boxes)
        first, stop = boxes.span(source.shape, [box for box, _ in source.boxes])
        here, end = boxes.span(target.shape, [box for _, box in source.boxes])
        if values.is_cuda or source.dtype != values.dtype or not stop - first == end - here == count:
            return None
        start = files[source.row.name].entries[source.name].start + (first - source.first) * size
        moves.append(Move(start, count * size, values.data_ptr() + (here - portion.first) * size))
    return moves


def _verify(files: dict[str, TensorFile], targets: list[_Target]) -> None:
    """Compare the checksums of what will be read."""
    ranges = {name: [(0, file.header_bytes)] for name, file in files.items()}
    for source in (source for target in targets for source in target.sources):
        ranges[source.row.name].extend(source.ranges(files[source.row.name].entries[source.name].start))
    for name, file in files.items():
        file.verify(ranges[name])


def _fill(target: _Target, files: dict[str, TensorFile]) -> None:
    """Copy what one portion needs."""
    portion = target.portion
    everything = slice(0, portion.count)
    values = portion.elements.read(everything)
    values[target.stop - portion.first if target.stop > portion.first else 0 :] = 0
    for source in target.sources:
        stored = files[source.row.name].tensor(source.name)
        for there, here in source.boxes:
            to = boxes.view(values, target.shape, portion.first, here)
            to.copy_(boxes.view(stored, source.shape, source.first, there))
    portion.elements.write(everything, values)
