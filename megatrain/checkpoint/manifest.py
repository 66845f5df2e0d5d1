"""`manifest.json`: everything about a checkpoint but the numbers. The format is described in docs/checkpoint_format.md.

A checkpoint is a directory of safetensors files, one per writing rank and kind of tensor ("weights", "exp_avg", ...). The
manifest holds the specs of the logical tensors and the layout they were saved under; which slice of which tensor lies in which
file follows from the two by arithmetic (`Manifest.pieces`), so it grows with tensors plus files, not with their product.

Nothing here is trusted because a file claims it: names are strict, the manifest carries its own checksum, and no tensor is
larger than the files that should hold it.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from megatrain.checkpoint.together import ContentError, DamagedCheckpointError
from megatrain.parallel.mesh import AXES, Axis, MeshShape, ParallelContext
from megatrain.parallel.param import Init, ParamSpec, Split

FORMAT = "megatrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
WEIGHTS = "weights"
"""The kind that holds the parameters: FP32 masters where there are such."""
BLOCK_BYTES = 64 * 2**20
"""Files are hashed in blocks of this many bytes, so that a reader can verify only what it reads."""
PLACE_AXES = ("tp", "pp")
"""Axes whose places hold different elements: each has its own files."""

STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_KIND_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CHECKSUM = re.compile(rb'\A\{\s*"checksum": "([0-9a-f]{32})"')
_MOST_RANKS = 2**24
_READ_BYTES = 4 * 2**20


class LocalTensor(NamedTuple):
    """What one rank stores of a logical tensor."""

    spec: ParamSpec
    tensor: torch.Tensor
    """Shape `spec.local_shape(axis size)`, padding included."""


LocalTensors = Mapping[str, Mapping[str, LocalTensor]]
"""Kind of tensor ("weights", "exp_avg", ...) -> logical name -> this rank's part."""


@dataclass(frozen=True)
class StoredTensor:
    """One logical tensor of a checkpoint: its spec, the pipeline stage that holds it, and which kinds are stored of it."""

    spec: ParamSpec
    stage: int
    dtypes: Mapping[str, str]
    """Kind -> torch dtype name, such as float32."""


@dataclass(frozen=True)
class FileRow:
    """One safetensors file: the elements of `kind` that the rank at `place` owned."""

    name: str
    kind: str
    place: Mapping[str, int]
    """Place along each axis of PLACE_AXES."""
    bytes: int
    blocks: tuple[str, ...]
    """XXH3-128 of each block of `block_bytes`, 32 hex digits."""


class Piece(NamedTuple):
    """A box of a logical tensor and the place of the rank whose file holds it."""

    place: Mapping[str, int]
    box: tuple[slice, ...]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    step: int
    """Optimizer updates done."""
    saved_at: float
    """Seconds since 1970 UTC; later checkpoints of a directory have larger values, also after going back to an earlier step."""
    progress: Mapping[str, Any]
    """The run's own state, plain JSON: samples consumed, tokens ..."""
    layout: MeshShape
    files: tuple[FileRow, ...]
    tensors: Mapping[str, StoredTensor]
    config: str
    """The resolved config, as text."""
    versions: Mapping[str, str] = field(default_factory=dict)
    block_bytes: int = BLOCK_BYTES

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors stored, weights first."""
        found = {kind for tensor in self.tensors.values() for kind in tensor.dtypes}
        return tuple(sorted(found, key=lambda kind: (kind != WEIGHTS, kind)))

    def pieces(self, name: str) -> Iterator[Piece]:
        """Where the elements of a logical tensor lie: boxes that cover it, each element once."""
        spec, stage = self.tensors[name].spec, self.tensors[name].stage
        axis = "tp" if spec.split is None else spec.split.axis
        size = getattr(self.layout, axis)
        for rank in range(size):
            box = spec.slices(size, rank)
            if spec.leads(Axis(axis, size, rank)) and box_numel(box):
                yield Piece({**dict.fromkeys(PLACE_AXES, 0), "pp": stage, axis: rank}, box)

    def to_bytes(self) -> bytes:
        """The file's contents. The checksum is XXH3-128 of the whole file with its own 32 digits written as zeros."""
        body = {
            "checksum": "0" * 32,
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "saved_at": self.saved_at,
            "progress": dict(self.progress),
            "layout": asdict(self.layout),
            "block_bytes": self.block_bytes,
            "versions": dict(self.versions),
            "files": [asdict(row) for row in self.files],
            "tensors": [tensor_to_json(tensor) for tensor in self.tensors.values()],
            "config": self.config,
        }
        data = json.dumps(body, indent=1, allow_nan=False).encode()
        return data.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(data).encode(), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse and check. Raises ValueError, TypeError or KeyError on whatever does not belong."""
        match = _CHECKSUM.match(data)
        if match is None:
            raise ValueError("it does not start with a checksum")
        start, end = match.span(1)
        found = xxhash.xxh3_128_hexdigest(data[:start] + b"0" * 32 + data[end:])
        if found.encode() != match.group(1):
            raise ValueError(f"its checksum is {found}, and it says {match.group(1).decode()}")
        body = json.loads(data, object_pairs_hook=_object)
        if body["format"] != FORMAT:
            raise ValueError(f"format is {body['format']!r}, not {FORMAT!r}")
        if body["version"] != VERSION:
            raise ValueError(
                f"format version {body['version']} was written by another release; this one reads version {VERSION}"
            )
        stored = [tensor_from_json(row) for row in body["tensors"]]
        tensors = {tensor.spec.name: tensor for tensor in stored}
        if len(tensors) != len(stored):
            raise ValueError("a tensor is listed twice")
        manifest = cls(
            step=_count(body["step"]),
            saved_at=float(body["saved_at"]),
            progress=body["progress"],
            layout=MeshShape(**{axis: _count(size, least=1) for axis, size in body["layout"].items()}),
            files=tuple(row_from_json(row) for row in body["files"]),
            tensors=tensors,
            config=body["config"],
            versions=body["versions"],
            block_bytes=_count(body["block_bytes"], least=1),
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise ValueError where rows contradict one another, or claim more than their files can hold."""
        names = [row.name for row in self.files]
        if len(set(names)) != len(names) or len(self.rows) != len(names):
            raise ValueError("two rows name the same file, or the same kind and place")
        for row in self.files:
            if len(row.blocks) != -(-row.bytes // self.block_bytes):
                raise ValueError(
                    f"{row.name}: {len(row.blocks)} checksums for {row.bytes} bytes in blocks of {self.block_bytes}"
                )
        if self.layout.world > _MOST_RANKS or any(tensor.stage >= self.layout.pp for tensor in self.tensors.values()):
            raise ValueError(f"the layout {self.layout} is absurd, or has fewer stages than the tensors name")
        for kind in self.kinds:
            have = sum(row.bytes for row in self.files if row.kind == kind)
            stored = [t for t in self.tensors.values() if kind in t.dtypes]
            need = sum(tensor.spec.numel * dtype_of(tensor.dtypes[kind]).itemsize for tensor in stored)
            if need > have:
                raise ValueError(f"the tensors of {kind} have {need} bytes and their files only {have}")

    @cached_property
    def rows(self) -> dict[tuple[str, int, int], FileRow]:
        """File of each (kind, place along tp, place along pp)."""
        return {(row.kind, row.place["tp"], row.place["pp"]): row for row in self.files}

    def row(self, kind: str, place: Mapping[str, int]) -> FileRow:
        """File of a kind at a place. Raises DamagedCheckpointError where there should be one and is not."""
        row = self.rows.get((kind, place["tp"], place["pp"]))
        if row is None:
            raise DamagedCheckpointError(
                f"{MANIFEST} lists no file of {kind} for place {dict(place)}, but the layout needs one"
            )
        return row


def layout_of(ctx: ParallelContext) -> MeshShape:
    """Sides of the mesh that a context lies on."""
    return MeshShape(tp=ctx.tp.size, cp=ctx.cp.size, dp=ctx.dp.size, pp=ctx.pp.size, ep=ctx.ep.size)


def box_numel(box: tuple[slice, ...]) -> int:
    """Number of elements of a box."""
    return prod(part.stop - part.start for part in box)


def step_name(step: int) -> str:
    """Directory name of a step: step_00000200."""
    return f"step_{step:08d}"


def file_name(kind: str, place: Mapping[str, int]) -> str:
    """File name of a kind at a place: weights-tp00000-pp00000.safetensors. Raises ValueError if the kind is no plain word."""
    if not _KIND_NAME.fullmatch(kind):
        raise ValueError(f"kind of tensors {kind!r} is not a plain lower-case word such as exp_avg")
    return "-".join([kind, *(f"{axis}{place[axis]:05d}" for axis in PLACE_AXES)]) + ".safetensors"


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name such as float32. Raises ValueError for another name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    """A row of the manifest's `tensors`."""
    return {"spec": asdict(tensor.spec), "stage": tensor.stage, "dtypes": dict(tensor.dtypes)}


def tensor_from_json(row: Mapping[str, Any]) -> StoredTensor:
    """The inverse of `tensor_to_json`. Raises ValueError, TypeError or KeyError on whatever does not belong."""
    given = dict(row["spec"])
    if set(given) != {f.name for f in fields(ParamSpec)}:
        raise ValueError(f"spec of {given.get('name')!r} has the keys {sorted(given)}")
    split = None if given["split"] is None else Split(**given["split"])
    shape = tuple(_count(n) for n in given["shape"])
    if split is not None:
        if not 0 <= _count(split.dim) < len(shape) or _count(split.units, least=1) < 1 or split.axis not in AXES:
            raise ValueError(f"split of {given['name']!r} does not fit the shape {list(shape)}: {given['split']}")
        if split.axis not in PLACE_AXES:
            raise ValueError(
                f"{given['name']!r} is split over axis {split.axis!r}; only {', '.join(PLACE_AXES)} have files of their own"
            )
    spec = ParamSpec(**{**given, "shape": shape, "split": split, "init": Init(**given["init"])})
    dtypes = dict(row["dtypes"])
    for kind, dtype in dtypes.items():
        file_name(kind, dict.fromkeys(PLACE_AXES, 0))
        dtype_of(dtype)
    return StoredTensor(spec, _count(row["stage"]), dtypes)


def row_from_json(row: Mapping[str, Any]) -> FileRow:
    """A row of the manifest's `files`. Raises ValueError, TypeError or KeyError on whatever does not belong.

    A file's name must be that of a file beside the manifest: no path.
    """
    if not isinstance(row["name"], str) or not _FILE_NAME.fullmatch(row["name"]) or ".." in row["name"]:
        raise ValueError(f"{row['name']!r} is not the name of a safetensors file beside the manifest")
    place = {axis: _count(row["place"][axis]) for axis in PLACE_AXES}
    blocks = tuple(row["blocks"])
    if not all(isinstance(block, str) and re.fullmatch(r"[0-9a-f]{32}", block) for block in blocks):
        raise ValueError(f"{row['name']}: checksums are 32 hex digits each")
    return FileRow(row["name"], str(row["kind"]), place, _count(row["bytes"]), blocks)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path` (a step directory). Raises DamagedCheckpointError if it cannot be used."""
    file = Path(path) / MANIFEST
    try:
        return Manifest.from_bytes(file.read_bytes())
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} cannot be used: {error}") from error


def hash_file(file: Path, block_bytes: int = BLOCK_BYTES) -> tuple[str, ...]:
    """XXH3-128 of each block of a file, as hex digits."""
    blocks = []
    buffer = memoryview(bytearray(min(block_bytes, _READ_BYTES)))
    with file.open("rb", buffering=0) as stream:
        digest, taken = xxhash.xxh3_128(), 0
        while count := stream.readinto(buffer[: block_bytes - taken]):
            digest.update(buffer[:count])
            taken += count
            if taken == block_bytes:
                blocks.append(digest.hexdigest())
                digest, taken = xxhash.xxh3_128(), 0
    return (*blocks, digest.hexdigest()) if taken else tuple(blocks)


def check_file(path: Path, row: FileRow) -> None:
    """Raise DamagedCheckpointError unless the row's file is a plain file (no link) of the size that the row says."""
    file = Path(path) / row.name
    try:
        found = file.lstat()
    except OSError as error:
        raise DamagedCheckpointError(f"{file} is missing: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpointError(f"{file} is a link or no plain file; a checkpoint holds its files itself")
    if found.st_size != row.bytes:
        raise DamagedCheckpointError(f"{file} has {found.st_size} bytes, and {MANIFEST} says {row.bytes}")


def verify_file(path: Path, row: FileRow, block_bytes: int = BLOCK_BYTES) -> None:
    """As `check_file`, and raise DamagedCheckpointError unless every block has the checksum that the row says."""
    check_file(path, row)
    found = hash_file(Path(path) / row.name, block_bytes)
    for index, (have, want) in enumerate(zip(found, row.blocks, strict=True)):
        if have != want:
            start = index * block_bytes
            raise DamagedCheckpointError(
                f"{Path(path) / row.name} is damaged between bytes {start} and {min(start + block_bytes, row.bytes)}: "
                f"its XXH3-128 is {have}, and {MANIFEST} says {want}"
            )


def check_parts(tensors: LocalTensors, ctx: ParallelContext) -> None:
    """Raise ContentError where this rank's tensors do not have the shapes that their specs give them under this layout."""
    for kind, parts in tensors.items():
        for name, (spec, tensor) in parts.items():
            size = 1 if spec.split is None else getattr(ctx, spec.split.axis).size
            want = spec.local_shape(size)
            if spec.name != name or tuple(tensor.shape) != want:
                raise ContentError(
                    f"{kind} {name}: the rank stores {list(tensor.shape)}, "
                    f"and the spec of {spec.name!r} gives {list(want)} on {size} ranks of its axis"
                )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that appears twice is an error, since readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key appears twice among {[key for key, _ in pairs][:8]}")
    return found


def _count(value: Any, least: int = 0) -> int:
    """A JSON integer of at least `least`. Raises ValueError for anything else."""
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is not an integer of at least {least}")
    return value


def intersect(a: tuple[slice, ...], b: tuple[slice, ...]) -> tuple[slice, ...]:
    """The box that two boxes share; it may be empty."""
    shared = ((max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return tuple(slice(start, max(start, stop)) for start, stop in shared)


def within(box: tuple[slice, ...], outer: tuple[slice, ...]) -> tuple[slice, ...]:
    """`box` in coordinates that start at the corner of `outer`."""
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True))
