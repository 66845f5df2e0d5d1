"""Start from given weights: model.init_from names a Hugging Face directory or a checkpoint, which gives shapes and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.load import find, load
from megatrain.checkpoint.manifest import WEIGHTS, read_manifest
from megatrain.checkpoint.together import CheckpointError, ContentError, require_same, together
from megatrain.companions import take_along
from megatrain.config.load import from_dict
from megatrain.config.schema import Config, ModelConfig
from megatrain.config.source import ConfigError, saved_values
from megatrain.config.validate import validate_model
from megatrain.huggingface.config import kind_from
from megatrain.huggingface.families import FAMILIES, Part, parts_of
from megatrain.huggingface.model_files import (
    CONFIG,
    Weights,
    check,
    identity_of_hf,
    is_hf,
    keep_companions,
    load_hf,
    model_keys,
    read_config,
)
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.optim.portions import portions
from megatrain.parallel.mesh import Axis, Rows
from megatrain.parallel.param import ParamSpec
from megatrain.training import Run
from megatrain.transport.consensus import gather_texts

_OWN = ("init_from", "preset")
"""Keys of a model section that are not copied with the shapes."""


def shapes_of(path: str) -> dict[str, Any]:
    """The keys of the model section that the weights at `path` imply. Raises ConfigError."""
    try:
        if is_hf(Path(path)):
            return model_keys(Path(path))
        manifest = read_manifest(find(Path(path)))
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"model.init_from={path}: {error}") from error
    keys: dict[str, Any] = saved_values(manifest.config, f"the config in {path}").get("model") or {}
    if "seq_length" in keys and keys.get("max_positions") is None:
        keys["max_positions"] = keys["seq_length"]  # the table has this many rows, whatever this run's seq_length
    embedding = manifest.tensors.get("embedding.tokens")
    vocabulary = {} if embedding is None else {"vocab_size": embedding.spec.shape[0]}
    return {key: value for key, value in (keys | vocabulary).items() if key not in _OWN}


def config_of_hf(path: Path, others: Mapping[str, Any] | None = None) -> Config:
    """The config of a Hugging Face directory, with `others` in its model section. Raises CheckpointError or ConfigError."""
    try:
        config = from_dict({"model": {**model_keys(path), **(others or {})}})
        validate_model(config)
    except ConfigError as error:
        raise ConfigError(f"{Path(path) / CONFIG} gives a model that cannot be: {error}") from None
    return config


def specs_of(model: ModelConfig, vocab_size: int) -> dict[str, ParamSpec]:
    """Name -> spec of the logical tensors of a model, which is built on the meta device and takes no memory."""
    with torch.device("meta"):
        build = Build(Rows(Axis("tp")), torch.float32, torch.device("meta"), model, vocab_size, seed=0)
        gpt = build_gpt(build)[0]
    return {p.spec.name: p.spec for p in gpt.logical_parameters()}


def declared(path: Path, model: ModelConfig, vocab_size: int) -> tuple[Weights, dict[str, Part], dict[str, ParamSpec]]:
    """The tensors of a Hugging Face directory, the place of each logical tensor in them, and the logical specs.

    Reads headers only. Raises CheckpointError for tensors that are missing, too many or of other shapes than the model's.
    """
    family = FAMILIES[kind_from(read_config(path))]
    weights = Weights(path, family)
    if model.num_layers > len(weights.names):
        raise ContentError(f"{path} holds {len(weights.names)} tensors, and the model has {model.num_layers} layers")
    specs = specs_of(model, vocab_size)
    parts = parts_of(family, {name: spec.shape for name, spec in specs.items()}, model)
    check(weights, parts, tied=model.tied_embeddings)
    return weights, parts, specs


def require_weights(config: Config, vocab_size: int) -> None:
    """Check the weights that a run will start from before it allocates memory. Raises CheckpointError.

    Does nothing for a run that has checkpoints, since it goes on from these.
    """
    if any(Path(config.checkpoint_dir).glob("step_*")):
        return
    for path in (config.checkpoint.resume, config.model.init_from):
        if path is not None and is_hf(Path(path)):
            declared(Path(path), config.model, vocab_size)
            return


def start_from(run: Run, path: Path) -> None:
    """Load the weights at `path` into a run (collective). Raises CheckpointError on every rank."""
    weights = portions(run.optimizer)[WEIGHTS]
    with together(run.ctx):
        found = identity_of_hf(path) if is_hf(path) else "a checkpoint"  # of which `load` compares the manifest
    require_same(str(path), found, run.ctx)
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
        with together(run.ctx):
            if run.ctx.world.rank == 0:
                take_along(path.parent, Path(run.config.checkpoint_dir))
    run.optimizer.refresh()
