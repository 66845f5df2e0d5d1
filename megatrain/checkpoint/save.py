"""Save the state of a run: every logical element once, published by one atomic rename.

    .saving_step_00000200/   every writing rank writes and fsyncs its shards
                             rank 0 writes manifest.json last, fsyncs, and renames
    step_00000200/           from here on the checkpoint is whole
    latest                   "step_00000200", replaced atomically after the rename

A crash at any point leaves the older checkpoints and `latest` as they were; what it leaves behind has a name that starts with
a dot and is removed by `tidy`, at the next start or save.

Who writes: the ranks of the first replica (place 0 of dp_cp), each the elements it owns (`ParamSpec.owned`), without padding.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatrain.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    PLACE_AXES,
    STEP_NAME,
    FileRow,
    LocalTensor,
    LocalTensors,
    Manifest,
    StoredTensor,
    box_numel,
    check_file,
    check_parts,
    file_name,
    hash_file,
    layout_of,
    read_manifest,
    row_from_json,
    step_name,
    tensor_from_json,
    tensor_to_json,
)
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError, together
from megatrain.parallel.consensus import gather_texts
from megatrain.parallel.mesh import Axis, ParallelContext

_SAVING, _REMOVING, _REPLACED, _LATEST_DRAFT = ".saving_", ".removing_", ".replaced_", ".latest_draft"


def save(
    directory: Path,
    step: int,
    tensors: LocalTensors,
    ctx: ParallelContext,
    progress: Mapping[str, Any],
    config_text: str,
    keep: int = 0,
) -> Path:
    """Write the checkpoint of `step` (collective over the world) and return its directory, `directory`/step_XXXXXXXX.

    `tensors`: kind -> logical name -> what this rank stores; every rank of the first replica gives its own, the others may give
    the same or nothing. `progress` is plain JSON. `keep`: how many of the newest checkpoints stay, 0 for all. A checkpoint of
    the same step is replaced; if it is damaged, it is kept as damaged_step_XXXXXXXX.

    Raises CheckpointError on every rank if any rank fails (full disk, no permission ...); older checkpoints are then as before.
    """
    directory = Path(directory)
    final = directory / step_name(step)
    work = directory / (_SAVING + final.name)
    writes, leads = ctx.dp_cp.rank == 0, ctx.world.rank == 0
    try:
        with together(ctx):
            if leads:
                directory.mkdir(parents=True, exist_ok=True)
                _tidy(directory)
                work.mkdir()
        contribution = ""
        with together(ctx):
            if writes:
                contribution = json.dumps(_write_shards(work, tensors, ctx))
        contributions = gather_texts(contribution, ctx.mp.group, ctx.device) if writes else []
        with together(ctx):
            if leads:
                _publish(work, final, _manifest(step, contributions, ctx, progress, config_text))
                if keep:
                    _prune(directory, keep, final.name)
    except CheckpointError:
        if leads:
            with suppress(OSError):  # the first error is the one to tell; the next start tidies again
                _tidy(directory)
        raise
    return final


def tidy(directory: Path, ctx: ParallelContext) -> None:
    """Clear away what crashed saves left in `directory` and let `latest` name the newest checkpoint again (collective).

    To be called at the start of a run that owns the directory: what another process is just saving there would be lost.
    """
    with together(ctx):
        if ctx.world.rank == 0 and Path(directory).is_dir():
            _tidy(Path(directory))
            whole = [path for path, _, reason in catalogue(Path(directory)) if not reason]
            if whole and _latest(Path(directory)) != whole[0].name:
                _point_latest(whole[0])


def catalogue(directory: Path) -> list[tuple[Path, Manifest | None, str]]:
    """Checkpoints of a directory, newest first: path, manifest, and "" or why it is not whole as far as names and sizes tell.

    Newest is what was published last (`saved_at`; the directory's own time where the manifest cannot be read), not the largest
    step: a run that went back and saved again continues from there.
    """
    found = []
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
        when = path.stat().st_mtime if manifest is None else manifest.saved_at
        found.append((when, path.name, path, manifest, reason))
    return [(path, manifest, reason) for _, _, path, manifest, reason in sorted(found, key=lambda f: f[:2], reverse=True)]


def _write_shards(work: Path, tensors: LocalTensors, ctx: ParallelContext) -> dict[str, Any]:
    """Write this rank's files and return its part of the manifest as JSON: the rows, and from place 0 of tp the tensors."""
    check_parts(tensors, ctx)
    tensors = {kind: {name: p for name, p in parts.items() if not _is_copy(p, ctx)} for kind, parts in tensors.items()}
    work.mkdir(
        parents=True, exist_ok=True
    )  # not there only where nodes do not share the directory; rank 0 then misses the files
    place = {axis: getattr(ctx, axis).rank for axis in PLACE_AXES}
    rows = []
    for kind, parts in tensors.items():
        shard = {name: data for name, part in parts.items() if (data := _owned_data(part, ctx)) is not None}
        if shard:
            rows.append(asdict(_write_shard(work / file_name(kind, place), kind, place, shard)))
    _sync(work)
    return {"files": rows, "tensors": _describe(tensors, ctx.pp.rank) if ctx.tp.rank == 0 else []}


def _is_copy(part: LocalTensor, ctx: ParallelContext) -> bool:
    """Whether another stage writes this tied tensor."""
    return part.spec.tied is not None and getattr(ctx, part.spec.tied).rank > 0


def _owned_data(part: LocalTensor, ctx: ParallelContext) -> torch.Tensor | None:
    """The logical elements that this rank writes, contiguous on the CPU, copied only where they must be; None for none."""
    spec, tensor = part
    axis: Axis = ctx.tp if spec.split is None else getattr(ctx, spec.split.axis)
    box = spec.slices(axis.size, axis.rank)
    if not spec.owned(ctx) or not box_numel(box):
        return None
    data = tensor.detach()
    if spec.split is not None:
        mine = box[spec.split.dim]
        data = data.narrow(spec.split.dim, 0, mine.stop - mine.start)
    return data.cpu().contiguous()


def _describe(tensors: LocalTensors, stage: int) -> list[dict[str, Any]]:
    """Rows of the manifest's `tensors`. Raises ValueError where two kinds disagree about a spec."""
    stored: dict[str, StoredTensor] = {}
    for kind, parts in tensors.items():
        for name, (spec, tensor) in parts.items():
            known = stored.get(name, StoredTensor(spec, stage, {}))
            if known.spec != spec:
                raise ValueError(f"{name} has the spec {spec} in {kind}, and {known.spec} in {', '.join(known.dtypes)}")
            stored[name] = StoredTensor(spec, stage, {**known.dtypes, kind: str(tensor.dtype).removeprefix("torch.")})
    return [tensor_to_json(tensor) for tensor in stored.values()]


def _write_shard(file: Path, kind: str, place: dict[str, int], shard: dict[str, torch.Tensor]) -> FileRow:
    """Write one safetensors file to the disk and return its row. Raises CheckpointError that says how much room was needed."""
    need = sum(data.nbytes for data in shard.values())
    try:
        save_file(shard, file)
        _sync(file)
        return FileRow(file.name, kind, place, file.stat().st_size, hash_file(file))
    except Exception as error:  # safetensors reports a full disk as an error of its own, which is no OSError
        free = shutil.disk_usage(file.parent).free
        raise CheckpointError(
            f"cannot write {file}: {error}. It needs {need:,} bytes, and the disk has {free:,} free. Older checkpoints are as "
            "they were. Make room, lower checkpoint.keep, or set checkpoint.dir to another disk."
        ) from error


def _manifest(step: int, contributions: list[str], ctx: ParallelContext, progress: Mapping[str, Any], config: str) -> Manifest:
    """Join what the writing ranks sent."""
    parts = [json.loads(text) for text in contributions]
    stored = [tensor_from_json(row) for part in parts for row in part["tensors"]]
    tensors = {tensor.spec.name: tensor for tensor in stored}
    if len(tensors) != len(stored):
        raise ValueError("two pipeline stages write a tensor of the same name; a copy must say over which axis it is `tied`")
    return Manifest(
        step=step,
        saved_at=time.time(),
        progress=progress,
        layout=layout_of(ctx),
        files=tuple(row_from_json(row) for part in parts for row in part["files"]),
        tensors=tensors,
        config=config,
        versions={name: _version(name) for name in ("megatrain", "torch", "safetensors")}
        | {"python": platform.python_version()},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "unknown"


def _publish(work: Path, final: Path, manifest: Manifest) -> None:
    """Make the written files a checkpoint: manifest, rename, `latest`."""
    for row in manifest.files:
        try:
            check_file(work, row)
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"{error}. Another rank has just written it: do all nodes share {final.parent}? "
                "Set checkpoint.dir to a directory that they share."
            ) from error
    _write_text(work / MANIFEST, manifest.to_bytes())
    _sync(work)
    replaced = _set_aside(final) if final.is_dir() else None
    work.rename(final)
    _sync(final.parent)
    _point_latest(final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _set_aside(final: Path) -> Path | None:
    """Make room for a checkpoint of the same step; return what to remove afterwards: the old one, unless it is damaged."""
    if _latest(final.parent) == final.name:
        (final.parent / LATEST).unlink()  # it would name nothing between the two renames
    if _whole(final):
        aside = final.with_name(_REPLACED + final.name)
        final.rename(aside)
        return aside
    names = (f"damaged_{final.name}" + (f"_{i}" if i else "") for i in range(10**6))
    final.rename(next(path for path in map(final.with_name, names) if not path.exists()))
    return None


def _whole(path: Path) -> bool:
    """Whether names and sizes of a checkpoint are right."""
    try:
        for row in read_manifest(path).files:
            check_file(path, row)
    except DamagedCheckpointError:
        return False
    return True


def _latest(directory: Path) -> str:
    """What `latest` names; "" if there is no such file."""
    file = directory / LATEST
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def _point_latest(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint."""
    draft = checkpoint.with_name(_LATEST_DRAFT)
    _write_text(draft, f"{checkpoint.name}\n".encode())
    draft.replace(checkpoint.with_name(LATEST))
    _sync(checkpoint.parent)


def _prune(directory: Path, keep: int, newest: str) -> None:
    """Remove all but the `keep` newest checkpoints. Damaged ones are neither counted nor removed."""
    whole = [path for path, _, reason in catalogue(directory) if not reason and path.name != newest]
    for path in whole[keep - 1 :]:
        doomed = path.with_name(_REMOVING + path.name)
        path.rename(doomed)  # at once: a kill half-way through the removal must not leave a checkpoint that looks damaged
        shutil.rmtree(doomed, ignore_errors=True)


def _tidy(directory: Path) -> None:
    """Remove or restore what crashed saves left: every name that starts with a dot and is ours."""
    for path in list(directory.iterdir()):
        name = re.sub(r"^\.[a-z]+_", "", path.name)
        if path.name == _LATEST_DRAFT:
            path.unlink()
        elif not STEP_NAME.fullmatch(name):
            continue
        elif path.name == _REPLACED + name and not path.with_name(name).exists():
            path.rename(path.with_name(name))
            _point_latest(path.with_name(name))
        elif path.name in (_SAVING + name, _REMOVING + name, _REPLACED + name):
            shutil.rmtree(path, ignore_errors=True)


def _write_text(file: Path, data: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
