"""Hugging Face directories: loads their weights into this rank's parameters, and writes them from a checkpoint.

Every rank reads only the elements that it holds, from memory-mapped safetensors files, under any layout; nothing is converted
beforehand. Files that contain pickles (pytorch_model.bin) are refused.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatrain.checkpoint import boxes
from megatrain.checkpoint.load import table_hint
from megatrain.checkpoint.tensor_file import TensorFile
from megatrain.checkpoint.together import CheckpointError, ContentError, DamagedCheckpointError, together
from megatrain.config.schema import ModelConfig
from megatrain.data.identity import hash_of, sampled
from megatrain.files import HEAD_BYTES, brief, doing, make_folder, not_text, require_own, whole
from megatrain.huggingface.config import config_of, kind_from, kind_of, model_of, names_of, same_model
from megatrain.huggingface.families import FAMILIES, Family, Part, Shapes, joined, parts_of, rows_of
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Portion, axis_of, logical_numel
from megatrain.untrusted import leads_out, parse_json, read_beside

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
COMPANIONS = (
    "generation_config.json",
    "chat_template*",
    CHAT_TEMPLATES,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""Other files of a model: tokenizer, chat template, generation settings."""
COMPANION_FOLDER = "hf"
"""Folder beside the checkpoints of a model that came from Hugging Face, for its config.json and COMPANIONS."""
SHARD_BYTES = 5 * 10**9
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_LARGEST_JSON, _LARGEST_COMPANION = 10**8, 10**9


def is_hf(path: Path) -> bool:
    """Whether a directory is a Hugging Face one: it has a config.json."""
    return (Path(path) / CONFIG).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a directory. Raises ContentError."""
    found = _json(Path(path) / CONFIG)
    if not isinstance(found, dict):
        raise ContentError(f"{Path(path) / CONFIG} is no JSON object")
    return found


def model_keys(path: Path) -> dict[str, Any]:
    """The keys of the model section that a Hugging Face directory gives. Raises ContentError."""
    try:
        return model_of(read_config(path))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ContentError(f"{Path(path) / CONFIG} cannot be read: {type(error).__name__}: {brief(error)}") from error
    except ContentError as error:
        raise ContentError(f"{Path(path) / CONFIG}: {brief(error)}") from None


class Weights:
    """The tensors of a directory, by name with the family's prefix."""

    def __init__(self, path: Path, family: Family) -> None:
        """Read the list of tensors. Raises ContentError or DamagedCheckpointError."""
        self.path, self.family = Path(path), family
        self._files: dict[str, TensorFile] = {}
        self._home: dict[str, tuple[str, str]] = {}
        for name, file in self._listed():
            if not name.endswith(family.ignored or ("\0",)):
                self._home[self._prefixed(name)] = (name, file)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._home)

    @property
    def files(self) -> list[Path]:
        """Files that hold them."""
        return [self.path / file for file in sorted({file for _, file in self._home.values()})]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, memory-mapped. Raises DamagedCheckpointError if its file lacks it."""
        own, file = self._home[name]
        if own not in self._open(file).entries:
            raise DamagedCheckpointError(f"{self.path / file} has no {own}, which {INDEX} says it holds")
        return self._open(file).tensor(own)

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            path = self.path / file
            if leads_out(path):
                raise ContentError(
                    f"{path} is a link that leads out of its folder, to {path.resolve()}: put the file itself there"
                )
            self._files[file] = TensorFile(path.resolve())  # resolved, as the hub's cache consists of links
        return self._files[file]

    def _listed(self) -> Iterator[tuple[str, str]]:
        """(name, file) of every tensor."""
        if (self.path / INDEX).exists():
            if (self.path / SINGLE).is_file():
                raise ContentError(
                    f"{self.path} has {SINGLE} and {INDEX}: two sets of weights, of which transformers takes the first. Move away the "
                    "one that is not meant."
                )
            listed = _json(self.path / INDEX)
            where = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(where, dict) or not all(isinstance(f, str) and _FILE.fullmatch(f) for f in where.values()):
                raise ContentError(
                    f"{self.path / INDEX}: weight_map must give each tensor the name of a safetensors file beside it"
                )
            yield from where.items()
        elif (self.path / SINGLE).is_file():
            yield from ((name, SINGLE) for name in self._open(SINGLE).entries)
        else:
            pickles = sorted(file.name for file in self.path.glob("pytorch_model*.bin"))
            why = f": {pickles[0]} holds pickles, which can run code and are not read" if pickles else ""
            raise ContentError(
                f"{self.path} has neither {SINGLE} nor {INDEX}{why}. Save it again with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)."
            )

    def _prefixed(self, name: str) -> str:
        """A stored name as the family's rows have it; files on the hub may lack the prefix."""
        name = name.removeprefix(self.family.outer)
        return name if name == self.family.head or name.startswith(self.family.prefix) else self.family.prefix + name


def identity_of_hf(path: Path) -> str:
    """The identity of a directory's config.json and weights: a line for each file, with its size and a hash of blocks all over it.

    Raises ContentError or DamagedCheckpointError.
    """
    files = [Path(path) / CONFIG, *Weights(path, FAMILIES[kind_from(read_config(path))]).files]
    return "\n".join(f"{file.name} of {file.stat().st_size} bytes with the hash {hash_of(sampled(file))}" for file in files)


def load_hf(path: Path, model: ModelConfig, portions: Mapping[str, Portion], every: Shapes, ctx: ParallelContext) -> None:
    """Fill the weights that this rank holds from a Hugging Face directory (collective).

    every: shapes of all logical tensors of the model, those of other ranks included. Raises ContentError or DamagedCheckpointError on every
    rank.
    """
    with together(ctx), torch.no_grad():
        config = read_config(path)
        model_keys(path)
        kind = kind_from(config)
        weights = Weights(path, FAMILIES[kind])
        parts = parts_of(FAMILIES[kind], every, model)
        check(weights, parts, tied=model.tied_embeddings)
        for name, portion in portions.items():
            _fill(portion, parts[name], weights, ctx)


def check(weights: Weights, parts: Mapping[str, Part], tied: bool) -> None:
    """Raise ContentError for tensors that are missing, too many, of 8 bits, or of other shapes."""
    for name in sorted(weights.names):
        dtype = weights.tensor(name).dtype
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise ContentError(
                f"{weights.path}: {name} is of {dtype}. Weights of 8 bits mean something only with their scales, which are not read here: "
                "give the directory of the model in bfloat16, float16 or float32."
            )
    wanted = {part.stored: part for part in parts.values()}
    logical = {part.stored: name for name, part in parts.items()}
    surplus = weights.names - set(wanted)
    if tied and weights.family.head in surplus:
        head, embedding = (weights.tensor(n) for n in (weights.family.head, parts["embedding.tokens"].stored))
        if not (head.shape == embedding.shape and torch.equal(head, embedding)):
            raise ContentError(
                f"{weights.path} has a {weights.family.head} that is not its embedding, and the model ties the two: set "
                "model.tied_embeddings=false"
            )
        surplus.discard(weights.family.head)
    if not tied and weights.family.head in set(wanted) - weights.names:
        raise ContentError(
            f"{weights.path} has no {weights.family.head}, and config.json says that the model has a head of its own. If its head is the "
            'embedding, set "tie_word_embeddings": true in config.json, or in training model.tied_embeddings=true.'
        )
    for names, what in ((set(wanted) - weights.names, "lacks"), (surplus, "has, and the model section does not give,")):
        if names:
            raise ContentError(f"{weights.path} {what} {len(names)} tensors: {', '.join(sorted(names)[:4])}")
    for name, part in wanted.items():
        tensor = weights.tensor(name)
        if tuple(tensor.shape) != part.shape or not tensor.is_floating_point():
            positions = logical[name] in ("embedding.positions", "embedding.block_positions")
            raise ContentError(
                f"{weights.path}: {name} is {list(tensor.shape)} of {tensor.dtype}, and the model gives {list(part.shape)}"
                + (table_hint(tensor.shape, part.shape) if positions else "")
            )


def _fill(portion: Portion, part: Part, weights: Weights, ctx: ParallelContext) -> None:
    """Fill one portion from its stored tensor; padding becomes zero."""
    spec, axis = portion.spec, axis_of(portion.spec, ctx)
    mine = spec.slices(axis.size, axis.rank)
    shape = tuple(s.stop - s.start for s in mine)
    stop = min(portion.first + portion.count, logical_numel(spec, axis))
    everything = slice(0, portion.count)
    values = portion.elements.read(everything)
    values[max(stop - portion.first, 0) :] = 0
    stored = weights.tensor(part.stored)
    for box in boxes.of_run(shape, portion.first, stop):
        boxes.view(values, shape, portion.first, box).copy_(part.read(stored, boxes.moved(box, mine)))
    portion.elements.write(everything, values)


def export(
    out: Path,
    model: ModelConfig,
    vocab_size: int,
    weights: Mapping[str, torch.Tensor],
    *,
    like: Path | None = None,
    companions: Path | None = None,
    ids: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a Hugging Face directory and return its model_type.

    weights: every logical tensor, whole; they are read one stored tensor at a time. dtype: dtype to write, None for that of `weights`.
    like: directory whose config.json is the base. companions: directory whose tokenizer files are copied. ids: special tokens for
    config.json, which win over the base's. Raises ContentError if no family can express the model, CheckpointError if `out` holds files.
    """
    out = Path(out)
    base = read_config(like) if like is not None and is_hf(like) else {}
    kind = kind_from(base) if base else kind_of(model, vocab_size)
    new = config_of(model, vocab_size, kind)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty. Give a directory that is, or that is not there yet.")
    make_folder(out)
    rows = list(rows_of(FAMILIES[kind], weights.keys(), model.num_layers))
    with _taken_back(out):
        stored = _write_weights(out, rows, weights, model.num_attention_heads, dtype)
        with whole(out / CONFIG, text=True) as file:
            file.write(json.dumps({**_merged(base, new, kind, stored), **(ids or {})}, indent=2) + "\n")
        if companions is not None:
            copy_files(companions, out, COMPANIONS)
    return kind


@contextmanager
def _taken_back(out: Path) -> Iterator[None]:
    """On failure remove the files written into a directory that was empty, so that the export can be tried again."""
    try:
        yield
    except BaseException:
        for file in out.iterdir():
            file.unlink()
        raise


def _merged(base: dict[str, Any], new: dict[str, Any], kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json updated with what the model says now; unchanged, but for the dtype, if both describe the same model."""
    named = {"torch_dtype": str(dtype).removeprefix("torch.")}
    if base and same_model(base, new):
        return base | {name: named["torch_dtype"] for name in ("torch_dtype", "dtype") if name in base}
    others = {key: value for key, value in base.items() if key not in names_of(kind) and key not in ("dtype", "torch_dtype")}
    return {**others, **new, **named}


def _write_weights(
    out: Path, rows: list[Any], weights: Mapping[str, torch.Tensor], heads: int, dtype: torch.dtype | None
) -> torch.dtype:
    """Write the stored tensors in files of at most SHARD_BYTES, reading each once; returns the dtype of the last one."""
    shards: list[list[str]] = []
    tensors: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        part = out / f"{len(shards)}.part"
        part.touch()
        mode = part.stat().st_mode  # mode of a new file; the library's files are readable by their owner only
        try:
            save_file(tensors, part, {"format": "pt"})
        except SafetensorError as error:  # the library turns an OSError into this
            raise CheckpointError(f"{part} cannot be written: {error}") from error
        part.chmod(mode)
        shards.append(list(tensors))
        tensors.clear()

    for row in rows:
        made = joined(row, [weights[name] for name in row.of], heads)
        made = made if dtype is None else made.to(dtype)
        if tensors and sum(t.nbytes for t in tensors.values()) + made.nbytes > SHARD_BYTES:
            write()
        tensors[row.name] = made
        total += made.nbytes
    write()
    where: dict[str, str] = {}
    for number, names in enumerate(shards):  # their number is known only now
        file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"{number}.part").rename(out / file)
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        listed = {"metadata": {"total_size": total}, "weight_map": where}
        with whole(out / INDEX, text=True) as file:
            file.write(json.dumps(listed, indent=2) + "\n")
    return made.dtype


def keep_companions(source: Path, directory: Path) -> None:
    """Copy config.json and the other files of a model into a folder beside the checkpoints made from it."""
    require_own(Path(directory) / COMPANION_FOLDER, stat.S_ISDIR)
    copy_files(source, Path(directory) / COMPANION_FOLDER, (CONFIG, *COMPANIONS))


def copy_files(source: Path, target: Path, patterns: Sequence[str], name: str | None = None) -> None:
    """Copy the files of a folder, or of folders in it, that match, with the modes of new files. name: new name, for a pattern that
    matches one file.

    Raises ContentError for a link that leads out of the folder (but not out of the hub's cache of its repository), and for a file of
    absurd size; OSError that names the file, or a link that stands where it would write.
    """
    found = [file for pattern in patterns for file in sorted(Path(source).glob(pattern)) if file.is_file()]
    for file in found:
        if leads_out(file) or (file.parent != Path(source) and leads_out(file.parent)):
            raise ContentError(
                f"{file} is not copied: it is a link that leads out of its folder, to {file.resolve()}. Put the file there."
            )
        if file.stat().st_size > _LARGEST_COMPANION:
            raise ContentError(
                f"{file} is not copied: it has {file.stat().st_size:,} bytes, and is no tokenizer. Take it away."
            )
    for file in found:
        place = target / (name or file.relative_to(source))
        if place.parent != target:
            require_own(place.parent, stat.S_ISDIR)
        place.parent.mkdir(parents=True, exist_ok=True)
        require_own(place)
        with doing("writing", place):
            shutil.copyfile(file, place)


def _json(file: Path) -> Any:
    """The contents of a JSON file. Raises ContentError."""
    try:
        data = read_beside(file, _LARGEST_JSON)
        if problem := not_text(data[:HEAD_BYTES]):
            raise ValueError(problem)
        return parse_json(data.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ContentError(f"{file} cannot be read: {error}") from error
