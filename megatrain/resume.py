"""Going on from a checkpoint: which one, whether it is of this run, and what of the config has changed since.

A run goes on from the newest checkpoint of its directory that is whole. Layout, schedule, batch and optimizer settings may be others
than they were; another model, tokenizer or training text is refused unless checkpoint.accept_changes names it, since a loss curve
that changes its subject half-way looks like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
import yaml

from megatrain.checkpoint.hf_files import is_hf
from megatrain.checkpoint.load import load, load_newest
from megatrain.checkpoint.manifest import Manifest, read_manifest
from megatrain.checkpoint.together import ContentError, together
from megatrain.config.load import dump
from megatrain.config.schema import Config
from megatrain.init_from import start_from
from megatrain.job import Job
from megatrain.training import Run

_LOOKED_AT = 2**20
"""Bytes of a token store's index that tell it from others."""
_SUBJECTS = ("model", "tokenizer", "data")
"""What must not change unasked."""
_NO_MATTER = {"model.init_from", "model.preset", "data.tokenizer", "data.train", "data.valid", "data.cache_dir"}
"""Keys of these subjects that say where something is, or how a run that is new begins; contents are compared by themselves."""


def progress_of(run: Run) -> dict[str, Any]:
    """The run's own state in a checkpoint."""
    config = run.config
    return {
        "samples": run.consumed_samples,
        "step": run.step,
        "tokens": run.consumed_samples * config.model.seq_length,
        "updates": int(run.optimizer.updates.item()),
        "loss_scale": run.loss_scale.state(),
    }


def restore(run: Run, path: Path) -> Manifest:
    """Bring a run to where the checkpoint at `path` has left off (collective). Raises CheckpointError on every rank."""
    manifest = load(path, run.optimizer.portions(), run.ctx)
    take_over(run, manifest)
    return manifest


def take_over(run: Run, manifest: Manifest) -> None:
    """Go on from a checkpoint whose tensors the optimizer's portions hold (collective)."""
    progress = manifest.progress
    run.optimizer.refresh()
    run.consumed_samples, run.step = progress["samples"], progress["step"]
    run.optimizer.updates.fill_(progress["updates"])
    run.loss_scale.restore(progress.get("loss_scale", run.loss_scale.state()))


def identity_of(config: Config) -> dict[str, Any]:
    """What the training text and the tokenizer are, wherever their files lie."""
    tokenizer = config.data.tokenizer
    return {
        "data": [[_store_identity(Path(corpus.path)), corpus.weight] for corpus in config.data.train],
        "tokenizer": _file_identity(Path(tokenizer)) if tokenizer not in (None, "bytes") else tokenizer,
    }


def _store_identity(prefix: Path) -> str:
    """Of a token store: its sizes and the beginning of its index."""
    index, tokens = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    with index.open("rb") as file:
        return f"{index.stat().st_size}-{tokens.stat().st_size}-{xxhash.xxh3_128_hexdigest(file.read(_LOOKED_AT))}"


def _file_identity(path: Path) -> str:
    return str(xxhash.xxh3_128_hexdigest(path.read_bytes()))


def resume(job: Job) -> None:
    """Bring a run to where the checkpoint that `checkpoint.resume` means has left it, if there is one (collective).

    A run that has no checkpoint of its own yet starts from the weights at that path with checkpoint.weights_only, or where the path
    is a directory of Hugging Face, or else from those of model.init_from, if it is given.
    """
    checkpoint, init_from = job.config.checkpoint, job.config.model.init_from
    if checkpoint.resume != "never":
        _resume(job)
    if job.resumed_from is None and init_from is not None:
        start_from(job, Path(init_from))


def _resume(job: Job) -> None:
    checkpoint = job.config.checkpoint
    portions, ctx = job.optimizer.portions(), job.ctx

    def accept(path: Path, manifest: Manifest) -> None:
        _require_same_subject(path, manifest, job.config)

    path = Path(checkpoint.resume)
    weights_only = checkpoint.weights_only or is_hf(path)
    if checkpoint.resume == "auto" or weights_only:
        found = load_newest(Path(job.config.checkpoint_dir), portions, ctx, lambda path, why: _tell(job, path, why), accept)
        if found is not None:
            _go_on(job, *found)
            return
    if checkpoint.resume == "auto":
        return
    if weights_only:
        start_from(job, path)
        job.resumed_from = path
        return
    with together(ctx):
        accept(path, read_manifest(path))
    _go_on(job, path, load(path, portions, ctx))


def _tell(job: Job, path: Path, reason: str) -> None:
    job.damaged.append(f"{path}: {reason}")
    if job.session.rank == 0:
        print(f"megatrain: passing over the damaged checkpoint {path}: {reason}", file=sys.stderr, flush=True)  # noqa: T201


def _go_on(job: Job, path: Path, manifest: Manifest) -> None:
    """Take over what a loaded checkpoint says of the run."""
    job.changes = [f"{key}: {was} -> {now}" for key, was, now in changes(manifest, job.config)]
    take_over(job, manifest)
    job.resumed_from = path


def changes(manifest: Manifest, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Keys of the config that are not as they were when a checkpoint was saved, with the value then and now."""
    was = yaml.safe_load(manifest.config)
    was = was if isinstance(was, dict) else {}
    before = dict(_leaves(asdict(Config()))) | dict(_leaves(was))  # a key that an older release did not have was at its default
    now = yaml.safe_load(dump(config, {}))  # as it would be saved: what has its default inside of a list is left out there
    for key, value in _leaves(now):
        if before[key] != value:
            yield key, before[key], value


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` or `section.group.key` of every value of a config."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, _plain(value)


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _require_same_subject(path: Path, manifest: Manifest, config: Config) -> None:
    """Raise ContentError where model, tokenizer or training text are others than they were, and nobody has asked for that."""
    accepted = set(config.checkpoint.accept_changes)
    was, now = manifest.progress.get("identity", {}), identity_of(config)
    different = {
        subject: f"{was[subject]} -> {now[subject]}" for subject in now if subject in was and was[subject] != now[subject]
    }
    for key, before, after in changes(manifest, config):
        section = key.partition(".")[0]
        if (section in _SUBJECTS and key not in _NO_MATTER) or key == "train.seed":
            subject = "data" if key == "train.seed" else section
            different[subject] = f"{key}: {before} -> {after}"
    for subject, what in different.items():
        if subject not in accepted:
            raise ContentError(
                f"{path} is of another {subject} than this config: {what}. Use the same, or another checkpoint.dir to begin anew; to "
                f"go on with the change, checkpoint.accept_changes=[{', '.join(sorted(accepted | {subject}))}]."
            )
