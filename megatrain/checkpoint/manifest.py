"""`manifest.json`: everything in a checkpoint but the numbers. docs/checkpoint_format.md describes the format.

A checkpoint is a directory of safetensors files, one for each rank and kind of tensor ("weights", "exp_avg", ...). The manifest holds
the specs of the logical tensors, the layout that they were saved under and how the data-parallel ranks cut them. Which elements lie in
which file follows by arithmetic (`Manifest.pieces`), so the manifest grows with tensors plus files, not with their product.

Nothing is trusted because a file claims it: names are strict, the manifest carries its own checksum, and no tensor is larger than the
files that should hold it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
import xxhash

from megatrain.checkpoint import boxes
from megatrain.checkpoint.run_state import MOST, check_progress
from megatrain.checkpoint.tensor_file import BLOCK_BYTES, TensorFile, check_plain
from megatrain.checkpoint.together import ContentError, DamagedCheckpointError
from megatrain.files import brief, pointer
from megatrain.parallel.mesh import Axis, MeshShape, ParallelContext
from megatrain.parallel.param import AverageOver, Init, ParamSpec, Split
from megatrain.parallel.portion import Partition, Portions, axis_of
from megatrain.untrusted import parse_json, read_plain

FORMAT = "megatrain-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
WEIGHTS = "weights"
"""The kind that holds the parameters: FP32 master weights where the run has them."""
_FILLED = get_args(get_type_hints(Init)["kind"])
"""Kinds of initial values."""
STORED = frozenset(f.name for f in fields(ParamSpec) if f.compare)
"""The fields of a ParamSpec that are written."""
PLACES = ("tp", "pp", "ep", "dp")
"""Coordinates of a file. dp is the part of a slice that one of its replicas writes (`ParallelContext.part`). ep: for the tensors with
replicas along edp alone, which have files of their own; others have replicas along ep too, and their files no such place."""
SIDES = ("tp", "cp", "dp", "pp", "ep")
"""Sides of the mesh. Which data-parallel ranks share ZeRO shards does not change the files."""

STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_KIND_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CHECKSUM = re.compile(rb'\A\{\s*"checksum": "([0-9a-f]{32})"')
_MOST_RANKS = 2**24
_MOST_PLACES = 4096
"""Ranks along tp, pp or ep: a tensor's slices are gone through."""
LARGEST_MANIFEST = 1 << 27
"""Bytes; those of 16,384 ranks have some 30 million."""
_MOST_BRACKETS = 600_000
"""A row of a file has three, of a tensor six."""
_MOST_DIMENSIONS, _MOST_KINDS, _LONGEST_CONFIG, _LARGEST_COUNT = 16, 64, 1 << 20, 2**63


class StoredTensor(NamedTuple):
    """One logical tensor of a checkpoint: its spec, the pipeline stage that saved it, and the kinds that are stored of it."""

    spec: ParamSpec
    stage: int
    dtypes: Mapping[str, str]
    """Kind -> torch dtype name, such as float32."""
    partition: Partition
    """How the replicas divide a slice's elements to write them."""
    ep: int = 0
    """Place along ep of the ranks that have it, if its replicas lie along edp and it is not split over ep; else 0."""


@dataclass(frozen=True)
class FileRow:
    """One safetensors file: the elements of `kind` that the rank at `place` wrote."""

    name: str
    kind: str
    place: Mapping[str, int]
    """Coordinate along each axis of PLACES that its tensors have."""
    bytes: int
    blocks: tuple[str, ...]
    """XXH3-128 checksum of each block of `block_bytes`, as 32 hex digits."""


class Piece(NamedTuple):
    """Elements first .. stop - 1 of a slice of a logical tensor, and the place of the rank whose file holds them."""

    place: Mapping[str, int]
    slice: boxes.Box
    first: int
    stop: int


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    step: int
    """Optimizer updates done."""
    saved_at: float
    """Seconds since 1970 UTC by the clock of rank 0, for people; clocks go wrong, and nothing is ordered by it."""
    progress: Mapping[str, Any]
    """State of the run, plain JSON: samples consumed, tokens ..."""
    layout: MeshShape
    files: tuple[FileRow, ...]
    tensors: Mapping[str, StoredTensor]
    config: str
    """The resolved config as YAML."""
    versions: Mapping[str, str] = field(default_factory=dict)
    block_bytes: int = BLOCK_BYTES
    serial: int = 0
    """Number of this save in its directory: later ones have larger numbers, also after going back to an earlier step; 0 from releases
    without."""
    unknown: tuple[str, ...] = field(default=(), compare=False)
    """Fields of specs in the file that this release does not know, and ignores."""
    checksum: str = field(default="", compare=False)
    """The checksum that the file has, and so the identity of all that it says; empty if it was not read."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors stored, weights first."""
        found = {kind for tensor in self.tensors.values() for kind in tensor.dtypes}
        return tuple(sorted(found, key=lambda kind: (kind != WEIGHTS, kind)))

    def pieces(self, name: str, wanted: boxes.Box | None = None) -> Iterator[Piece]:
        """The pieces that the elements of a logical tensor lie in, each once; with `wanted`, no piece that surely has none of that box."""
        spec, stage, _, partition, ep = self.tensors[name]
        axis = "tp" if spec.split is None else spec.split.axis
        size = getattr(self.layout, axis)
        for rank in range(size):
            box = spec.slices(size, rank)
            numel = boxes.numel(box)
            shared = box if wanted is None else boxes.intersect(box, wanted)
            if not (spec.leads(Axis(axis, size, rank)) and boxes.numel(shared)):
                continue
            shape = tuple(s.stop - s.start for s in box)
            for data in partition.places(*boxes.reach(shape, boxes.within(shared, box))):
                first, stop = partition.run(numel, data)
                if first < stop:
                    place = {"tp": 0, "pp": stage, "ep": ep, axis: rank, "dp": data}
                    yield Piece(file_place(spec.average_over, place), box, first, stop)

    def to_bytes(self) -> bytes:
        """The file's contents. The checksum is XXH3-128 of the whole file with its own 32 digits written as zeros."""
        body = {
            "checksum": "0" * 32,
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "saved_at": self.saved_at,
            "serial": self.serial,
            "progress": dict(self.progress),
            "layout": {side: getattr(self.layout, side) for side in SIDES},
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
        """Parse and check. Raises ContentError for another version; ValueError, TypeError or KeyError for invalid contents."""
        match = _CHECKSUM.match(data)
        if match is None:
            raise ValueError(pointer(data) or "it does not start with a checksum")
        start, end = match.span(1)
        hasher, view = xxhash.xxh3_128(data[:start] + b"0" * 32), memoryview(data)
        hasher.update(view[end:])
        if hasher.hexdigest().encode() != match.group(1):
            raise ValueError(f"its checksum is {hasher.hexdigest()}, and it says {match.group(1).decode()}")
        body = parse_json(data, _MOST_BRACKETS)
        if body["format"] != FORMAT:
            raise ValueError(f"format is {brief(repr(body['format']))}, not {FORMAT!r}")
        if body["version"] != VERSION:
            raise ContentError(
                f"checkpoint format version {brief(repr(body['version']))} was written by another release of megatrain; "
                f"this one reads {VERSION}"
            )
        for key, of, most in (("config", str, _LONGEST_CONFIG), ("progress", dict, 1000), ("versions", dict, 1000)):
            if not isinstance(body[key], of) or len(body[key]) > most:
                raise ValueError(f"{key} is no {of.__name__} of length {most} or less")
        check_progress(body["progress"])
        unknown: set[str] = set()
        stored = [tensor_from_json(row, unknown) for row in body["tensors"]]
        tensors = {tensor.spec.name: tensor for tensor in stored}
        if len(tensors) != len(stored):
            raise ValueError("a tensor is listed twice")
        manifest = cls(
            step=_count(body["step"]),
            saved_at=_finite(body["saved_at"]),
            progress=body["progress"],
            layout=_layout_from_json(body["layout"]),
            files=tuple(row_from_json(row) for row in body["files"]),
            tensors=tensors,
            config=body["config"],
            versions=body["versions"],
            block_bytes=_count(body["block_bytes"], least=1),
            serial=_count(body.get("serial", 0), most=MOST),
            unknown=tuple(sorted(unknown)),
            checksum=match.group(1).decode(),
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise ValueError where rows contradict one another, or claim more bytes than their files have."""
        names = [row.name for row in self.files]
        if len(set(names)) != len(names) or len(self.rows) != len(names):
            raise ValueError("two rows name the same file, or the same kind and place")
        for row in self.files:
            if len(row.blocks) != -(-row.bytes // self.block_bytes):
                raise ValueError(
                    f"{row.name}: {len(row.blocks)} checksums for {row.bytes} bytes in blocks of {self.block_bytes}"
                )
        replicas = self.layout.dp * self.layout.cp
        for name, tensor in self.tensors.items():
            parts = replicas // self.layout.ep if tensor.spec.average_over == "edp" else replicas
            size = 1 if tensor.spec.split is None else getattr(self.layout, tensor.spec.split.axis)
            if tensor.partition.start + boxes.numel(tensor.spec.slices(size, 0)) > tensor.partition.shard * parts:
                raise ValueError(f"{name} has elements behind the last of {parts} parts of {tensor.partition.shard}")
        pp, ep = self.layout.pp, self.layout.ep
        tall = max(self.layout.tp, pp, ep) > _MOST_PLACES or len(self.kinds) > _MOST_KINDS
        if (
            tall
            or self.layout.world > _MOST_RANKS
            or any(tensor.stage >= pp or tensor.ep >= ep for tensor in self.tensors.values())
        ):
            raise ValueError(
                f"the layout {self.layout} is absurd, or has {len(self.kinds)} kinds of files, or fewer stages or places along ep than the "
                "tensors name"
            )
        for kind in self.kinds:
            have = sum(row.bytes for row in self.files if row.kind == kind)
            stored = [t for t in self.tensors.values() if kind in t.dtypes]
            need = sum(tensor.spec.numel * dtype_of(tensor.dtypes[kind]).itemsize for tensor in stored)
            if need > have:
                raise ValueError(f"the tensors of {kind} have {need} bytes and their files only {have}")

    @cached_property
    def rows(self) -> dict[tuple[str, ...], FileRow]:
        """(kind, places) -> row of the file."""
        return {_key(row.kind, row.place): row for row in self.files}

    def row(self, kind: str, place: Mapping[str, int]) -> FileRow:
        """The row of the file of a kind at a place. Raises DamagedCheckpointError if the manifest lists none."""
        row = self.rows.get(_key(kind, place))
        if row is None:
            raise DamagedCheckpointError(
                f"{MANIFEST} lists no file of {kind} for place {dict(place)}, but the layout needs one"
            )
        return row


def _key(kind: str, place: Mapping[str, int]) -> tuple[str, ...]:
    return (kind, *(str(place.get(axis)) for axis in PLACES))


def file_place(over: AverageOver, place: Mapping[str, int]) -> dict[str, int]:
    """The coordinates, of those of all PLACES, of a file of tensors with replicas along an axis."""
    return {axis: place[axis] for axis in PLACES if axis != "ep" or over == "edp"}


def _layout_from_json(sides: Mapping[str, Any]) -> MeshShape:
    """The mesh of a manifest. Raises ValueError unless it has exactly the known sides, each 1 or more."""
    if set(sides) != set(SIDES):
        raise ValueError(f"the layout has the sides {sorted(sides)}, not {sorted(SIDES)}")
    return MeshShape(**{side: _count(sides[side], least=1) for side in SIDES})


def layout_of(ctx: ParallelContext) -> MeshShape:
    """The sides of a context's mesh."""
    return MeshShape(tp=ctx.tp.size, cp=ctx.cp.size, dp=ctx.dp.size, pp=ctx.pp.size, ep=ctx.ep.size)


def step_name(step: int) -> str:
    """Directory name of a step: step_00000200."""
    return f"step_{step:08d}"


def file_name(kind: str, place: Mapping[str, int]) -> str:
    """File name: weights-tp00000-pp00000-dp00000.safetensors. Raises ValueError if the kind is not a lower-case word."""
    if not _KIND_NAME.fullmatch(kind):
        raise ValueError(f"kind of tensors {kind!r} is not a plain lower-case word such as exp_avg")
    return "-".join([kind, *(f"{axis}{place[axis]:05d}" for axis in PLACES if axis in place)]) + ".safetensors"


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name such as float32. Raises ValueError for another name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    """A row of the manifest's `tensors`."""
    return {
        "spec": {key: value for key, value in asdict(tensor.spec).items() if key in STORED},
        "stage": tensor.stage,
        **({"ep": tensor.ep} if tensor.ep else {}),
        "dtypes": dict(tensor.dtypes),
        "start": tensor.partition.start,
        "shard": tensor.partition.shard,
    }


def tensor_from_json(row: Mapping[str, Any], unknown: set[str] | None = None) -> StoredTensor:
    """The inverse of `tensor_to_json`. Raises ValueError, TypeError or KeyError for invalid contents.

    Fields of the spec that are missing have its defaults, as in a checkpoint from before there was such a field; the names of those that
    this release does not know are added to `unknown`.
    """
    unknown = set() if unknown is None else unknown
    given = _known(ParamSpec, row["spec"], unknown)
    if type(given["name"]) is not str:
        raise ValueError(f"{given['name']!r} is not the name of a tensor")
    split = None if given.get("split") is None else Split(**_known(Split, given["split"], unknown, "split."))
    init = Init(**_known(Init, given.get("init", {}), unknown, "init."))
    if len(given["shape"]) > _MOST_DIMENSIONS:
        raise ValueError(
            f"{str(given['name'])[:80]!r} has {len(given['shape']):,} dimensions, and {_MOST_DIMENSIONS} at the most are read"
        )
    shape = tuple(_count(n) for n in given["shape"])
    if prod(n for n in shape if n) >= _LARGEST_COUNT:  # of no elements where one is 0, but strides count the others
        raise ValueError(f"{given['name'][:80]!r} has the absurd shape {list(shape)}")
    if split is not None:
        if not 0 <= _count(split.dim) < len(shape) or _count(split.units, least=1) < 1:
            raise ValueError(f"split of {given['name']!r} does not fit the shape {list(shape)}: {given['split']}")
        _one_of(("tp", "pp", "ep"), given["name"], "split.axis", split.axis)  # those that have files of their own
    _one_of(get_args(AverageOver), given["name"], "average_over", given.get("average_over", ParamSpec.average_over))
    _one_of(_FILLED, given["name"], "init.kind", init.kind)
    spec = ParamSpec(**{**given, "shape": shape, "split": split, "init": init})
    dtypes = dict(row["dtypes"])
    for kind, dtype in dtypes.items():
        file_name(kind, {})
        dtype_of(dtype)
    partition = Partition(_count(row["start"]), _count(row["shard"], least=1))
    return StoredTensor(spec, _count(row["stage"]), dtypes, partition, _count(row.get("ep", 0)))


def _one_of(known: Sequence[str], tensor: str, key: str, value: Any) -> None:
    """Raise ValueError for a value of a tensor's field that this release does not know."""
    if value not in known:
        raise ValueError(
            f"tensor {tensor!r} has {key}={brief(repr(value))}, and this release of megatrain knows {', '.join(known)} alone. If a newer "
            "one wrote it, load it with that"
        )


def _known(of: type, given: Mapping[str, Any], unknown: set[str], prefix: str = "") -> dict[str, Any]:
    """The given values of the fields of a dataclass; the other names are added to `unknown`, behind `prefix`."""
    names = {f.name for f in fields(of)}
    unknown |= {prefix + key for key in given if key not in names}
    return {key: value for key, value in given.items() if key in names}


def row_from_json(row: Mapping[str, Any]) -> FileRow:
    """A row of the manifest's `files`. Raises ValueError, TypeError or KeyError for invalid contents.

    The file's name must be that of a file beside the manifest: no path.
    """
    if not isinstance(row["name"], str) or not _FILE_NAME.fullmatch(row["name"]) or ".." in row["name"]:
        raise ValueError(f"{row['name']!r} is not the name of a safetensors file beside the manifest")
    place = {axis: _count(row["place"][axis]) for axis in PLACES if axis != "ep" or axis in row["place"]}
    blocks = tuple(row["blocks"])
    if not all(isinstance(block, str) and re.fullmatch(r"[0-9a-f]{32}", block) for block in blocks):
        raise ValueError(f"{row['name']}: checksums are 32 hex digits each")
    return FileRow(row["name"], str(row["kind"]), place, _count(row["bytes"]), blocks)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path` (a step directory).

    Raises DamagedCheckpointError if it cannot be used; ContentError if this release does not read its version, so that it is not skipped
    for an older checkpoint.
    """
    path = Path(path)
    file = path / MANIFEST
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise DamagedCheckpointError(f"{path} is a link that leads out of its directory, to {path.resolve()}. Give that one.")
    try:
        return Manifest.from_bytes(read_plain(file, LARGEST_MANIFEST, follow=False))
    except ContentError as error:
        raise ContentError(f"{file}: {error}") from None
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} cannot be used: {brief(error)}") from error


def check_file(path: Path, row: FileRow) -> None:
    """Raise DamagedCheckpointError unless the row's file is a plain file (no link) of the row's size."""
    check_plain(Path(path) / row.name, row.bytes)


def open_file(path: Path, row: FileRow, block_bytes: int = BLOCK_BYTES) -> TensorFile:
    """Open the row's file, to be verified against the row's checksums. Raises DamagedCheckpointError if it is not of the row's size."""
    return TensorFile(Path(path) / row.name, row.bytes, row.blocks, block_bytes)


def check_portions(portions: Portions, ctx: ParallelContext) -> None:
    """Raise ContentError where a portion does not lie within this rank's slice of the tensor that its name and spec say."""
    for kind, named in portions.items():
        for name, portion in named.items():
            axis = axis_of(portion.spec, ctx)
            numel = prod(portion.spec.local_shape(axis.size))
            if portion.spec.name != name or portion.first < 0 or portion.first + portion.count > numel:
                raise ContentError(
                    f"{kind} {name}: the rank gives elements {portion.first} to {portion.first + portion.count}, and the slice "
                    f"of {portion.spec.name!r} has {numel} on {axis.size} ranks of its axis"
                )


def _count(value: Any, least: int = 0, most: int = _LARGEST_COUNT) -> int:
    """A JSON integer of at least `least` and less than `most`. Raises ValueError for anything else."""
    if type(value) is not int or not least <= value < most:
        raise ValueError(f"{str(value)[:80]!r} is not an integer of at least {least} and less than {most}")
    return value


def _finite(value: Any) -> float:
    if not isfinite(number := float(value)):
        raise ValueError(f"{str(value)[:80]!r} is no time")
    return number
