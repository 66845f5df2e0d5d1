"""`megatrain import`, `export` and `checkpoint`: inspect, verify and convert directories of weights.

Tensors are read on demand, so a model larger than memory can be converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint import boxes
from megatrain.checkpoint.claim import claim
from megatrain.checkpoint.load import StoredElements, find, tell_unknown, verify
from megatrain.checkpoint.manifest import WEIGHTS, Manifest, dtype_of, read_manifest
from megatrain.checkpoint.save import Contents, Saver
from megatrain.checkpoint.together import CheckpointError
from megatrain.companions import TOKENIZER, take_along
from megatrain.config.load import dump
from megatrain.config.schema import Config
from megatrain.data.boundaries import TokenizerError
from megatrain.data.tokenizer import load_tokenizer
from megatrain.files import whole
from megatrain.huggingface.families import Part
from megatrain.huggingface.model_files import (
    COMPANION_FOLDER,
    COMPANIONS,
    CONFIG,
    Weights,
    export,
    is_hf,
    keep_companions,
)
from megatrain.inference.trained import saved_config, vocab_size_of
from megatrain.init_from import config_of_hf, declared
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Elements, Partition, Portion
from megatrain.verbs.export_tokenizer import TokenizerFiles, files_of

SINGLE = ParallelContext.single()


class HFElements:
    """The elements of a logical tensor in a Hugging Face directory, in the stored dtype."""

    def __init__(self, weights: Weights, part: Part, shape: tuple[int, ...]) -> None:
        self._weights, self._part, self._shape = weights, part, shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return self._weights.tensor(self._part.stored).dtype

    direct = False

    def read(self, part: slice) -> torch.Tensor:
        """The elements of `part`, as a tensor [n]."""
        stored = self._weights.tensor(self._part.stored)
        return torch.cat([self._part.read(stored, box).reshape(-1) for box in boxes.of_run(self._shape, part.start, part.stop)])

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Raises CheckpointError: a Hugging Face directory is only read."""
        raise CheckpointError("a directory of Hugging Face is only read")


class Cast:
    """Elements converted to another dtype when they are read."""

    def __init__(self, elements: Elements, dtype: torch.dtype) -> None:
        self._elements, self.dtype = elements, dtype

    direct = False

    def read(self, part: slice) -> torch.Tensor:
        """The elements of `part`, as a tensor [n]."""
        return self._elements.read(part).to(self.dtype)

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Raises CheckpointError: converted elements are only read."""
        raise CheckpointError("elements that are cast are only read")


class WholeTensors(Mapping[str, torch.Tensor]):
    """The weights of a checkpoint by logical name, each read on demand."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, tensor in self._manifest.tensors.items() if WEIGHTS in tensor.dtypes]

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self._manifest.tensors[name].spec
        return StoredElements(self._path, self._manifest, WEIGHTS, name).read(slice(0, spec.numel)).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _portion(spec: ParamSpec, elements: Elements) -> Portion:
    return Portion(spec, 0, spec.numel, elements, Partition(0, max(1, spec.numel)))


def _write(out: Path, contents: Contents, portions: Mapping[str, Mapping[str, Portion]]) -> Path:
    """Save one checkpoint, a block at a time. Raises CheckpointError if a run saves in that directory."""
    held, saver = claim(out, SINGLE), Saver(out, SINGLE, staging_bytes=1)
    try:
        return saver.save(contents, portions)
    finally:
        saver.close()
        held.release()


def import_hf(source: Path, out: Path) -> int:
    """`megatrain import HF_DIR OUT`."""
    if not is_hf(source):
        raise CheckpointError(f"{source} has no config.json: it is not a directory of Hugging Face")
    config = config_of_hf(source, {"init_from": str(source)})
    config = replace(config, log=replace(config.log, dir=str(out)))
    model, vocab_size = config.model, config.model.vocab_size or 0
    weights, parts, specs = declared(source, model, vocab_size)
    portions = {name: _portion(spec, HFElements(weights, parts[name], spec.shape)) for name, spec in specs.items()}
    progress = {"samples": 0, "step": 0, "tokens": 0, "updates": 0}
    path = _write(out / "checkpoints", Contents(0, progress, dump(config)), {WEIGHTS: portions})
    keep_companions(source, out / "checkpoints")
    print(f"{path}: {sum(spec.numel for spec in specs.values()):,} parameters from {source}")  # noqa: T201
    return 0


def export_hf(checkpoint: Path, out: Path, like: Path | None, dtype: str | None) -> int:
    """`megatrain export CKPT HF_DIR`."""
    path = find(checkpoint)
    manifest = read_manifest(path)
    tell_unknown(path, manifest)
    config, vocab_size = saved_config(path), vocab_size_of(manifest)
    if like is not None and not any(file for name in (CONFIG, *COMPANIONS) for file in like.glob(name)):
        raise CheckpointError(
            f"--like {like} has no {CONFIG} and no files of a tokenizer. Give a directory that has, or leave it out."
        )
    companions = path.parent / COMPANION_FOLDER
    came = like or (companions if is_hf(companions) else None)
    tokenizer, said = _tokenizer_files(config, came, chosen=like is not None)
    verify(path)
    kind = export(
        out,
        config.model,
        vocab_size,
        WholeTensors(path, manifest),
        like=came,
        companions=came if tokenizer is None else None,
        ids=None if tokenizer is None else tokenizer.ids,
        dtype=None if dtype is None else dtype_of(dtype),
    )
    for name, text in ({} if tokenizer is None else tokenizer.texts).items():
        with whole(out / name, text=True) as file:
            file.write(text)
    print(f"{out}: {kind}, from {path}; {said}")  # noqa: T201
    return 0


def _tokenizer_files(config: Config, came: Path | None, *, chosen: bool) -> tuple[TokenizerFiles | None, str]:
    """The tokenizer files to write, None if they are copied from `came`; and text about it for the user.

    chosen: the user gave `came`.
    """
    given = came is not None and any(came.glob("tokenizer*"))
    name = config.data.tokenizer
    if given and (chosen or name is None or _same_tokenizer(config, Path(came or ".") / TOKENIZER)):
        return None, f"with the tokenizer of {came}"
    if name is None:
        return None, "without a tokenizer: the run has none. --like DIR takes one from there"
    if name != "bytes" and not Path(name).is_file():
        return None, f"without a tokenizer: {name} of the run is not there any more. --like DIR takes one from there"
    return files_of(config.data, config.model.position_rows), f"with the tokenizer {name}"


def _same_tokenizer(config: Config, other: Path) -> bool:
    """Whether a run's tokenizer, with default special tokens, is the one in a file."""
    data = config.data
    if data.tokenizer in (None, "bytes") or (data.eod, data.bos) != (None, None) or not other.is_file():
        return False
    try:
        return load_tokenizer(str(data.tokenizer)).identity == load_tokenizer(other).identity
    except TokenizerError:
        return False


def inspect(checkpoint: Path, as_json: bool) -> int:
    """`megatrain checkpoint inspect`."""
    path = find(checkpoint)
    manifest = read_manifest(path)
    numel = sum(tensor.spec.numel for tensor in manifest.tensors.values())
    said: dict[str, Any] = {
        "path": str(path),
        "step": manifest.step,
        "progress": {key: value for key, value in manifest.progress.items() if key != "identity"},
        "layout": {axis: getattr(manifest.layout, axis) for axis in ("tp", "cp", "dp", "pp", "ep")},
        "tensors": len(manifest.tensors),
        "parameters": numel,
        "kinds": {
            kind: sorted({t.dtypes[kind] for t in manifest.tensors.values() if kind in t.dtypes}) for kind in manifest.kinds
        },
        "files": len(manifest.files),
        "bytes": sum(row.bytes for row in manifest.files),
        "versions": dict(manifest.versions),
        **({"ignored": list(manifest.unknown)} if manifest.unknown else {}),
    }
    print(json.dumps(said) if as_json else "\n".join(f"{key:12} {value}" for key, value in said.items()))  # noqa: T201
    return 0


def verify_all(checkpoint: Path) -> int:
    """`megatrain checkpoint verify`: check every byte of one checkpoint, or of all in a directory."""
    path = Path(checkpoint)
    found = (
        [path]
        if (path / "manifest.json").exists()
        else sorted(p for d in (path, path / "checkpoints") for p in d.glob("step_*"))
    )
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint")
    damaged = 0
    for each in found:
        try:
            verify(each)
            print(f"{each}: whole")  # noqa: T201
        except CheckpointError as error:
            damaged += 1
            print(f"{each}: DAMAGED: {error}")  # noqa: T201
    return 1 if damaged else 0


def convert(checkpoint: Path, out: Path, weights_only: bool, dtype: str | None) -> int:
    """`megatrain checkpoint convert`: write the same numbers as one file for each kind; optionally only weights, or in another dtype."""
    path = find(checkpoint)
    manifest = read_manifest(path)
    tell_unknown(path, manifest)
    verify(path)
    portions: dict[str, dict[str, Portion]] = {}
    for name, tensor in manifest.tensors.items():
        for kind in tensor.dtypes:
            if kind == WEIGHTS or not weights_only:
                stored: Elements = StoredElements(path, manifest, kind, name)
                elements = Cast(stored, dtype_of(dtype)) if dtype is not None and kind == WEIGHTS else stored
                portions.setdefault(kind, {})[name] = _portion(tensor.spec, elements)
    made = _write(out, Contents(manifest.step, manifest.progress, manifest.config), portions)
    take_along(path.parent, made.parent)
    print(f"{made}: {', '.join(portions)} from {path}")  # noqa: T201
    return 0
