"""Loads the config and weights of a trained model, under any layout, whatever layout it was saved under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatrain.assembly import layer_pieces, require_schedule
from megatrain.checkpoint.load import load
from megatrain.checkpoint.manifest import WEIGHTS, Manifest, read_manifest
from megatrain.checkpoint.together import CheckpointError
from megatrain.companions import with_kept_tokenizer
from megatrain.config.load import from_dict, restored
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError, read_text, saved_values
from megatrain.config.validate import require_values, validate_layout
from megatrain.models.gpt import GPT, build_gpt, logical_parameters
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.portion import Portion
from megatrain.stderr import note

EMBEDDING = "embedding.tokens"
"""Logical name of the parameter whose first dim is the vocabulary."""


def saved_config(path: Path) -> Config:
    """The config of the run that saved a checkpoint; its tokenizer is the copy kept beside the checkpoints, if there is one."""
    config = restored(saved_values(read_manifest(path).config, f"the config in {path}"))
    return replace(config, data=with_kept_tokenizer(config.data, path))


def laid_out(config: Config, overrides: Sequence[str], world_size: int) -> Config:
    """A run's config with another layout, from overrides `parallel.key=value`; by default one process. Raises ConfigError."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if not key.startswith("parallel."):
            raise ConfigError(
                f"{override}: only the layout can be chosen here, such as parallel.pipeline_parallel_size=2 under "
                "torchrun --nproc-per-node 2."
            )
        values[key.removeprefix("parallel.")] = read_text(value, override, lambda _: "command line").root
    parallel = from_dict({"parallel": values}).parallel
    config = replace(config, parallel=replace(parallel, sequence_parallel=False))
    require_values(config, ("parallel",))
    validate_layout(config, world_size)
    require_schedule(config)
    return config


def load_chunks(path: Path, config: Config, ctx: ParallelContext, dtype: torch.dtype = torch.float32) -> list[GPT]:
    """This rank's chunks of a checkpoint's model, in the layout of `config`; collective over the world of `ctx`."""
    vocab_size = vocab_size_of(read_manifest(path))
    build = Build(Rows(ctx.tp), dtype, ctx.device, config.model, vocab_size, config.train.seed)
    chunks = build_gpt(build, *layer_pieces(config, vocab_size), ctx.pp.rank)
    load(path, {WEIGHTS: {p.spec.name: Portion.whole(p.spec, p) for p in logical_parameters(chunks)}}, ctx)
    return [chunk.eval() for chunk in chunks]


def vocab_size_of(manifest: Manifest) -> int:
    """Vocabulary size of a checkpoint's model. Raises CheckpointError if it has no token embedding."""
    stored = manifest.tensors.get(EMBEDDING)
    if stored is None:
        raise CheckpointError(f"the checkpoint of step {manifest.step} has no {EMBEDDING}: it is not a language model's")
    return stored.spec.shape[0]


def say_damaged(path: Path, reason: str) -> None:
    """Print that a damaged checkpoint was skipped."""
    note(f"megatrain: passed over {path}: {reason}")
