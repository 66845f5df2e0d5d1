"""Load a checkpoint: find the newest that verifies, and fill this rank's tensors with the slices they need.

Both sides of a load are boxes of a logical tensor: the pieces that lie in files (`Manifest.pieces`) and the slice that this
rank holds (`ParamSpec.slices`). Where two boxes meet, elements are copied; nothing else is read, since files are memory-mapped:

    saved under tp 2:   file 0 rows 0-5 | file 1 rows 6-9        wanted by place 1 of tp 4: rows 3-5  ->  file 0, its rows 3-5
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatrain.checkpoint.manifest import (
    MANIFEST,
    WEIGHTS,
    FileRow,
    LocalTensor,
    LocalTensors,
    Manifest,
    box_numel,
    check_file,
    check_parts,
    dtype_of,
    intersect,
    layout_of,
    read_manifest,
    verify_file,
    within,
)
from megatrain.checkpoint.save import catalogue
from megatrain.checkpoint.together import (
    CheckpointError,
    ContentError,
    DamagedCheckpointError,
    LayoutError,
    together,
)
from megatrain.parallel.consensus import broadcast_text, gather_texts
from megatrain.parallel.mesh import ParallelContext

OnDamaged = Callable[[Path, str], None]
"""Told of a damaged checkpoint that was passed over: its path, and what is wrong with it. Called on every rank."""

_WEIGHTS_ALONE = "checkpoint.weights_only=true, checkpoint.resume=PATH of the checkpoint, and another checkpoint.dir"
"""What to set to take the weights of a checkpoint and nothing else."""

_SHOWN = 4
"""How many names an error lists."""


class _Copy(NamedTuple):
    """One copy out of a file."""

    name: str
    """Logical name: the key in the file."""
    stored_shape: tuple[int, ...]
    """Shape the file must have under that name."""
    dtype: torch.dtype
    """Dtype the file must have under that name."""
    source: tuple[slice, ...]
    """What to read of the stored tensor."""
    target: torch.Tensor
    """View of the rank's tensor to fill, of the shape of `source`."""


def newest(directory: Path, ctx: ParallelContext | None = None, on_damaged: OnDamaged | None = None) -> Path | None:
    """The newest checkpoint of `directory` that verifies, the same on every rank; None if there is none (collective).

    Every byte is checked, once in the world: the files of a checkpoint are dealt out over the ranks. A damaged one is passed
    over, never touched.
    """
    ctx = ParallelContext.single() if ctx is None else ctx
    found = "[]"
    with together(ctx):
        if ctx.world.rank == 0:
            found = json.dumps([(path.name, reason) for path, _, reason in catalogue(Path(directory))])
    for name, known in json.loads(broadcast_text(found, ctx.world.group, ctx.device)):
        path, reason = Path(directory) / name, known
        if not reason:
            try:
                verify(path, ctx)
            except CheckpointError as error:
                reason = str(error)
        if not reason:
            return path
        if on_damaged is not None:
            on_damaged(path, reason)
    return None


def verify(path: Path, ctx: ParallelContext | None = None) -> None:
    """Check every byte of a checkpoint, each rank a share of its files (collective).

    Raises DamagedCheckpointError, naming the first file that is not as its manifest says.
    """
    ctx = ParallelContext.single() if ctx is None else ctx
    with together(ctx):
        manifest = read_manifest(path)
        for row in manifest.files[ctx.world.rank :: ctx.world.size]:
            verify_file(path, row, manifest.block_bytes)


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


def load(path: Path, tensors: LocalTensors, ctx: ParallelContext, *, check: bool = True) -> Manifest:
    """Fill this rank's tensors in place from the checkpoint at `path` (collective over the world) and return its manifest.

    `tensors`: kind -> logical name -> spec and tensor of shape `spec.local_shape(axis size)`, on any device; padding becomes
    zero. Kinds that the checkpoint has and `tensors` has not are left alone. Weights load under any layout, and are cast to the
    dtype of the tensor given; the other kinds load under the layout they were saved with, in the dtype they were saved in.
    `check`: compare the checksums of the files that this rank reads before anything is filled; False where `newest` just did.

    Raises, on every rank, DamagedCheckpointError, ContentError (tensors missing, too many, other shapes or dtypes) or
    LayoutError; nothing is filled then, unless a file turns out to be damaged while it is read.
    """
    with together(ctx):
        manifest = read_manifest(path)
        check_parts(tensors, ctx)
        _check_layout(manifest, tensors, ctx)
    for kind in tensors:
        wanted = gather_texts(json.dumps(list(tensors[kind])), ctx.pp.group, ctx.device)
        with together(ctx):
            _check_names(manifest, kind, {name for text in wanted for name in json.loads(text)})
    with together(ctx):
        plans = {kind: _plan(manifest, kind, parts, ctx) for kind, parts in tensors.items()}
        for row, _ in (step for plan in plans.values() for step in plan):
            verify_file(path, row, manifest.block_bytes) if check else check_file(path, row)
    with together(ctx), torch.no_grad():
        for parts in tensors.values():
            for part in parts.values():
                _zero_padding(part, ctx)
        for plan in plans.values():
            for row, copies in plan:
                _copy_from(path / row.name, copies)
    return manifest


def read_weights(path: Path, *, check: bool = True) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint as a whole logical tensor on the CPU, in the dtype it was saved in. For one process."""
    manifest = read_manifest(path)
    for row in manifest.files:
        check_file(path, row)  # before memory is taken for what they should hold
    whole = {
        name: LocalTensor(stored.spec, torch.empty(stored.spec.shape, dtype=dtype_of(stored.dtypes[WEIGHTS])))
        for name, stored in manifest.tensors.items()
        if WEIGHTS in stored.dtypes
    }
    load(path, {WEIGHTS: whole}, ParallelContext.single(), check=check)
    return {name: part.tensor for name, part in whole.items()}


def _check_layout(manifest: Manifest, tensors: LocalTensors, ctx: ParallelContext) -> None:
    """Raise ContentError for a kind that is not there, LayoutError for optimizer state of another layout."""
    for kind in tensors:
        if kind not in manifest.kinds:
            raise ContentError(
                f"the checkpoint of step {manifest.step} holds {', '.join(manifest.kinds)}, but no {kind}. "
                "Was it saved with another optim.name or train.precision?"
            )
    here, states = layout_of(ctx), [kind for kind in tensors if kind != WEIGHTS]
    if states and manifest.layout != here:
        raise LayoutError(
            f"the checkpoint of step {manifest.step} was saved under {_describe(manifest.layout)}, and this run has "
            f"{_describe(here)}: optimizer state ({', '.join(states)}) loads under the layout it was saved with. "
            f"Use that layout to go on, or start from the weights alone, which load under any, with {_WEIGHTS_ALONE}."
        )


def _describe(layout: Any) -> str:
    """tp=2, dp=1, ... for messages."""
    return ", ".join(f"{axis}={getattr(layout, axis)}" for axis in ("tp", "cp", "dp", "pp", "ep"))


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


def _plan(manifest: Manifest, kind: str, parts: Any, ctx: ParallelContext) -> list[tuple[FileRow, list[_Copy]]]:
    """What to copy from which file for one kind. Raises ContentError where shapes or dtypes do not fit."""
    problems = [problem for name, part in parts.items() if (problem := _misfit(manifest, kind, name, part))]
    if problems:
        raise ContentError(f"{len(problems)} tensors do not fit the config: " + "; ".join(problems[:_SHOWN]))
    plan: dict[str, tuple[FileRow, list[_Copy]]] = {}
    for name, part in parts.items():
        for row, copy in _copies(manifest, kind, name, part, ctx):
            plan.setdefault(row.name, (row, []))[1].append(copy)
    return list(plan.values())


def _misfit(manifest: Manifest, kind: str, name: str, part: LocalTensor) -> str:
    """Why a stored tensor cannot fill the one given; "" if it can."""
    stored = manifest.tensors[name]
    if stored.spec.shape != part.spec.shape:
        return f"{name}: the checkpoint has {list(stored.spec.shape)}, the config gives {list(part.spec.shape)}"
    have, want = dtype_of(stored.dtypes[kind]), part.tensor.dtype
    if have != want and (kind != WEIGHTS or not (have.is_floating_point and want.is_floating_point)):
        return f"{kind} of {name}: the checkpoint has {have}, this run {want} (train.precision)"
    return ""


def _copies(
    manifest: Manifest, kind: str, name: str, part: LocalTensor, ctx: ParallelContext
) -> Iterator[tuple[FileRow, _Copy]]:
    """The copies that fill one tensor."""
    wanted = _local_box(part, ctx)
    dtype = dtype_of(manifest.tensors[name].dtypes[kind])
    for place, box in manifest.pieces(name):
        shared = intersect(box, wanted)
        if box_numel(shared):
            shape = tuple(side.stop - side.start for side in box)
            target = part.tensor.detach()[within(shared, wanted)]
            yield manifest.row(kind, place), _Copy(name, shape, dtype, within(shared, box), target)


def _local_box(part: LocalTensor, ctx: ParallelContext) -> tuple[slice, ...]:
    """The box of the logical tensor that this rank holds."""
    axis = ctx.tp if part.spec.split is None else getattr(ctx, part.spec.split.axis)
    return part.spec.slices(axis.size, axis.rank)


def _zero_padding(part: LocalTensor, ctx: ParallelContext) -> None:
    """Set to zero what lies behind the logical elements of a padded dim."""
    split = part.spec.split
    if split is not None and split.pad:
        mine = _local_box(part, ctx)[split.dim]
        used = mine.stop - mine.start
        tensor = part.tensor.detach()
        tensor.narrow(split.dim, used, tensor.shape[split.dim] - used).zero_()


def _copy_from(file: Path, copies: list[_Copy]) -> None:
    """Read slices of one memory-mapped file. Raises DamagedCheckpointError where it is not what the manifest says."""
    try:
        with safe_open(file, framework="pt") as stored:
            for copy in copies:
                view = stored.get_slice(copy.name)
                if tuple(view.get_shape()) != copy.stored_shape:
                    raise DamagedCheckpointError(
                        f"{file}: {copy.name} is {view.get_shape()}, {MANIFEST} says {list(copy.stored_shape)}"
                    )
                data = view[copy.source] if copy.source else stored.get_tensor(copy.name)
                if data.dtype != copy.dtype:
                    raise DamagedCheckpointError(f"{file}: {copy.name} is {data.dtype}, {MANIFEST} says {copy.dtype}")
                copy.target.copy_(data)
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error}") from error
