"""Load a checkpoint: find the newest one that verifies, and fill this rank's elements from it, under any layout.

Both sides of a load are ranges of elements of a slice of a logical tensor: the pieces in files (`Manifest.pieces`) and the portions
that this rank holds. A range is a few boxes; where boxes of the two sides meet, elements are copied out of the memory-mapped file, and
only blocks that contain such elements are read and verified:

    saved under tp 2:   file 0 rows 0-5 | file 1 rows 6-9        needed by place 1 of tp 4: rows 3-5  ->  file 0, its rows 3-5
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
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError, require_same, together
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Partition, Portion, Portions, TensorElements, axis_of, logical_numel
from megatrain.stderr import note
from megatrain.transport.consensus import broadcast_text, gather_texts

OnDamaged = Callable[[Path, str], None]
"""Called on every rank for a damaged checkpoint that is skipped: its path, and what is wrong with it."""

_SHOWN = 4
"""Most names that an error lists."""


class _Source(NamedTuple):
    """The elements that a rank needs of one tensor in one file."""

    row: FileRow
    name: str
    numel: int
    """Number of elements that the file must hold under that name."""
    dtype: torch.dtype
    """Dtype that the file must have under that name."""
    shape: tuple[int, ...]
    """Shape of the slice of which the file holds a range."""
    first: int
    """Number of the first element of that range in the slice."""
    boxes: list[tuple[boxes.Box, boxes.Box]]
    """Elements to copy: a box in the file's slice, and the same elements as a box of the rank's slice."""

    def ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """Byte ranges of the needed elements in the file, where the tensor begins at byte `start`."""
        for box, _ in self.boxes:
            first, stop = boxes.reach(self.shape, box)
            yield start + (first - self.first) * self.dtype.itemsize, start + (stop - self.first) * self.dtype.itemsize


class _Target(NamedTuple):
    """A portion of this rank and the files that its numbers come from."""

    portion: Portion
    shape: tuple[int, ...]
    """Shape of the rank's slice, without padding."""
    stop: int
    """Number of the element after the portion's last logical one; after it comes padding."""
    sources: list[_Source]


def newest(directory: Path, on_damaged: OnDamaged | None = None) -> Path | None:
    """The newest checkpoint of `directory` of which every byte verifies, or None. Damaged ones are skipped. For one process."""
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
    """Load the newest whole checkpoint of `directory` (collective); None if it holds no checkpoint at all.

    `own`, called on rank 0, decides whether a checkpoint counts; its manifest is None if it cannot be read.

    Each rank verifies the blocks that it reads, so that together they verify all that is loaded, in one pass. A damaged checkpoint is
    skipped and left as it is. `accept` may refuse one by raising. Raises CheckpointError where there are checkpoints and none is whole: a
    run that has lost its checkpoints must not begin anew by itself.
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
    """Check every byte of a checkpoint; each rank checks a share of the files (collective).

    Raises DamagedCheckpointError that names the first file that differs from the manifest.
    """
    ctx = ParallelContext.single() if ctx is None else ctx
    with together(ctx):
        manifest = read_manifest(path)
        for row in manifest.files[ctx.world.rank :: ctx.world.size]:
            open_file(path, row, manifest.block_bytes).verify_all()


def find(path: Path, on_damaged: OnDamaged | None = None) -> Path:
    """The checkpoint that a user means by `path`: a step directory, a directory of checkpoints, or a run directory.

    For one process. Raises CheckpointError if there is none that verifies.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    damaged: list[str] = []

    def tell(at: Path, reason: str) -> None:
        damaged.append(f"{at.name}: {reason}")
        if on_damaged is not None:
            on_damaged(at, reason)

    for directory in (path, path / "checkpoints"):
        found = newest(directory, on_damaged=tell)
        if found is not None:
            return found
    why = f" ({len(damaged)} cannot be used; the newest is {damaged[0]})" if damaged else ""
    raise CheckpointError(
        f"no whole checkpoint in {path}{why}. Give a step directory (it holds {MANIFEST}), a directory with step_XXXXXXXX in it, "
        "or a run directory."
    )


def load(path: Path, portions: Portions, ctx: ParallelContext, *, check: bool = True) -> Manifest:
    """Fill this rank's portions from the checkpoint at `path` (collective over the world) and return its manifest.

    Works under any layout. Numbers are cast to the dtype of the elements given, padding becomes zero; kinds that the checkpoint has and
    `portions` does not are ignored. `check`: verify the checksums of all blocks that this rank reads.

    Raises, on every rank, ContentError before anything is filled (ranks have different checkpoints at this path; tensors missing, too many,
    of other shapes), or DamagedCheckpointError, after which the contents of the portions are undefined.
    """
    with together(ctx):
        manifest = read_manifest(path)
        check_portions(portions, ctx)
    require_same(str(path), f"the checkpoint of step {manifest.step} with the checksum {manifest.checksum}", ctx)
    if ctx.world.rank == 0:
        tell_unknown(path, manifest)
    check_contents(manifest, portions, ctx)
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


def check_contents(manifest: Manifest, portions: Portions, ctx: ParallelContext) -> None:
    """Raise ContentError on every rank unless a checkpoint has the kinds and tensors of the ranks' portions (collective)."""
    for kind in portions:
        names = set(portions[kind])
        for axis in (ctx.dp_cp, ctx.pp):
            names = {
                name for text in gather_texts(json.dumps(sorted(names)), axis.group, ctx.device) for name in json.loads(text)
            }
        with together(ctx):
            if names:
                _check_kind(manifest, kind)
            _check_names(manifest, kind, names)


def needed_files(manifest: Manifest, portions: Portions, ctx: ParallelContext) -> set[str]:
    """Names of the files that this rank's portions are loaded from. Raises ContentError where shapes or dtypes do not fit."""
    return {row.name for row in _rows(_targets(manifest, portions, ctx))}


def read_weights(path: Path, *, check: bool = True) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint as a whole logical tensor on the CPU, in the dtype that it was saved in. For one process."""
    manifest = read_manifest(path)
    for row in manifest.files:
        check_file(path, row)  # before memory is allocated for their tensors
    tensors = {
        name: torch.empty(stored.spec.shape, dtype=dtype_of(stored.dtypes[WEIGHTS]))
        for name, stored in manifest.tensors.items()
        if WEIGHTS in stored.dtypes
    }
    wanted = {name: Portion.whole(manifest.tensors[name].spec, tensor) for name, tensor in tensors.items()}
    load(path, {WEIGHTS: wanted}, ParallelContext.single(), check=check)
    return tensors


class StoredElements:
    """All elements of one kind of a logical tensor of a checkpoint, read on demand. For one process."""

    def __init__(self, path: Path, manifest: Manifest, kind: str, name: str) -> None:
        self._path, self._manifest, self._kind, self._name = path, manifest, kind, name
        self.dtype = dtype_of(manifest.tensors[name].dtypes[kind])

    direct = False

    def read(self, part: slice) -> torch.Tensor:
        """The elements of `part`, as a new tensor [n]."""
        values = torch.empty(part.stop - part.start, dtype=self.dtype)
        spec = self._manifest.tensors[self._name].spec
        portion = Portion(spec, part.start, values.numel(), TensorElements(values), Partition(0, max(1, spec.numel)))
        target = _target(self._manifest, self._kind, self._name, portion, ParallelContext.single())
        with ExitStack() as opened:
            rows = {source.row.name: source.row for source in target.sources}.values()
            files = {row.name: opened.enter_context(open_file(self._path, row, self._manifest.block_bytes)) for row in rows}
            _check_entries(files, [target])
            _fill(target, files)
        return values

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Raises CheckpointError: a checkpoint is only read."""
        raise CheckpointError(f"{self._path} is only read")


def tell_unknown(path: Path, manifest: Manifest) -> None:
    """Say in one line, if there are any, which fields of tensors in a checkpoint are ignored."""
    if manifest.unknown:
        these = ", ".join(manifest.unknown)
        note(f"megatrain: {path}: fields of tensors that this release does not know are ignored: {these}")


def _check_kind(manifest: Manifest, kind: str) -> None:
    """Raise ContentError for a kind of tensors that the checkpoint lacks."""
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
    """The first few names, as text."""
    return ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _targets(manifest: Manifest, portions: Portions, ctx: ParallelContext) -> list[_Target]:
    """The sources of each portion. Raises ContentError where shapes or dtypes do not fit."""
    given = [(kind, name, portion) for kind, named in portions.items() for name, portion in named.items()]
    problems = [problem for kind, name, portion in given if (problem := _misfit(manifest, kind, name, portion))]
    problems = list(dict.fromkeys(problems))  # a wrong shape is found again in each of the tensor's moments
    if problems:
        raise ContentError(f"{len(problems)} tensors do not fit the config: " + "; ".join(problems[:_SHOWN]))
    return [_target(manifest, kind, name, portion, ctx) for kind, name, portion in given]


def table_hint(have: Sequence[int], give: Sequence[int]) -> str:
    """Advice where two shapes of a table of learned positions differ in rows only; "" elsewhere."""
    if tuple(have[1:]) != tuple(give[1:]):
        return ""
    return f" (in training: model.max_positions={have[0]}, whatever model.seq_length is)"


def _misfit(manifest: Manifest, kind: str, name: str, portion: Portion) -> str:
    """Why a stored tensor cannot fill a portion; "" if it can."""
    stored = manifest.tensors[name]
    if stored.spec.shape != portion.spec.shape:
        have, give = stored.spec.shape, portion.spec.shape
        positions = portion.spec.part == "embedding" and portion.spec.split is None  # the matrix of tokens is split
        hint = table_hint(have, give) if positions else ""
        return f"{name}: the checkpoint has {list(have)}, the config gives {list(give)}{hint}"
    kept, want = dtype_of(stored.dtypes[kind]), portion.elements.dtype
    if kept != want and not (kept.is_floating_point and want.is_floating_point):
        return f"{kind} of {name}: the checkpoint has {kept}, this run {want}"
    return ""


def _target(manifest: Manifest, kind: str, name: str, portion: Portion, ctx: ParallelContext) -> _Target:
    """A portion with the files and boxes that its elements come from."""
    axis = axis_of(portion.spec, ctx)
    mine = portion.spec.slices(axis.size, axis.rank)
    shape = tuple(s.stop - s.start for s in mine)
    stop = min(portion.first + portion.count, logical_numel(portion.spec, axis))
    wanted = [boxes.moved(box, mine) for box in boxes.of_run(shape, portion.first, stop)]  # boxes of the logical tensor
    dtype = dtype_of(manifest.tensors[name].dtypes[kind])
    found: dict[tuple[int, ...], _Source] = {}
    for want in wanted:
        for place, stored, first, end in manifest.pieces(name, want):
            part = tuple(s.stop - s.start for s in stored)
            key = tuple(place.values())
            for box in boxes.of_run(part, first, end):
                shared = boxes.intersect(boxes.moved(box, stored), want)
                if boxes.numel(shared):
                    if key not in found:
                        found[key] = _Source(manifest.row(kind, place), name, end - first, dtype, part, first, [])
                    found[key].boxes.append((boxes.within(shared, stored), boxes.within(shared, mine)))
    return _Target(portion, shape, stop, list(found.values()))


def _rows(targets: list[_Target]) -> list[FileRow]:
    """The manifest's rows of the files that the targets need, each once."""
    return list({source.row.name: source.row for target in targets for source in target.sources}.values())


def _check_entries(files: dict[str, TensorFile], targets: list[_Target]) -> None:
    """Raise DamagedCheckpointError where a file lacks a tensor, or has it with another size or dtype than the manifest says."""
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
    """By file, the bytes that can be copied as they are, since their order in file and memory is the same; and the targets of all others.

    Padding after the logical elements of the former is set to zero.
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
    """The bytes to copy from each source, if the elements have the same order and dtype in files and memory; else None."""
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
    """Verify the checksums of the headers and of all blocks that will be read."""
    ranges = {name: [(0, file.header_bytes)] for name, file in files.items()}
    for source in (source for target in targets for source in target.sources):
        ranges[source.row.name].extend(source.ranges(files[source.row.name].entries[source.name].start))
    for name, file in files.items():
        file.verify(ranges[name])


def _fill(target: _Target, files: dict[str, TensorFile]) -> None:
    """Fill one portion: copy box by box, with casts; padding becomes zero."""
    portion = target.portion
    everything = slice(0, portion.count)
    values = portion.elements.read(everything)
    values[target.stop - portion.first if target.stop > portion.first else 0 :] = 0
    for source in target.sources:
        stored = files[source.row.name].tensor(source.name)
        for theirs, mine in source.boxes:
            to = boxes.view(values, target.shape, portion.first, mine)
            to.copy_(boxes.view(stored, source.shape, source.first, theirs))
    portion.elements.write(everything, values)
