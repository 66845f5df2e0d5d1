"""Starting from given weights: model.init_from names a Hugging Face directory or a checkpoint, which gives shapes and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatrain.checkpoint.hf_files import is_hf, keep_companions, load_hf, model_keys
from megatrain.checkpoint.load import find, load
from megatrain.checkpoint.manifest import WEIGHTS, read_manifest
from megatrain.checkpoint.together import CheckpointError, together
from megatrain.config.source import ConfigError
from megatrain.parallel.consensus import gather_texts
from megatrain.training import Run

_OWN = ("init_from", "preset")
"""Keys of a model section that are no shapes."""


def shapes_of(path: str) -> dict[str, Any]:
    """The keys of the model section that come with the weights at `path`. Raises ConfigError."""
    try:
        if is_hf(Path(path)):
            return model_keys(Path(path))
        manifest = read_manifest(find(Path(path)))
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"model.init_from={path}: {error}") from error
    keys: dict[str, Any] = (yaml.safe_load(manifest.config) or {}).get("model") or {}
    if "seq_length" in keys and keys.get("max_positions") is None:
        keys["max_positions"] = keys["seq_length"]  # the table has so many rows, whatever seq_length this run has
    embedding = manifest.tensors.get("embedding.tokens")
    vocabulary = {} if embedding is None else {"vocab_size": embedding.spec.shape[0]}
    return {key: value for key, value in (keys | vocabulary).items() if key not in _OWN}


def start_from(run: Run, path: Path) -> None:
    """Give a run the weights at `path` (collective). Raises CheckpointError on every rank."""
    weights = run.optimizer.portions()[WEIGHTS]
    if is_hf(path):
        mine = {p.spec.name: p.spec.shape for unit in run.flat.units for p in unit.parameters}
        stages = gather_texts(json.dumps(mine), run.ctx.pp.group, run.ctx.device)
        every = {name: tuple(shape) for stage in stages for name, shape in json.loads(stage).items()}
        load_hf(path, run.config.model, weights, every, run.ctx)
        with together(run.ctx):
            if run.ctx.world.rank == 0:
                keep_companions(path, Path(run.config.checkpoint_dir))
    else:
        with together(run.ctx):
            path = find(path)
        load(path, {WEIGHTS: weights}, run.ctx)
    run.optimizer.refresh()
