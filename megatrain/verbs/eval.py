"""`megatrain eval`: loss, perplexity, bits per byte and token accuracy of a checkpoint on each held-out set.

Bits per byte compare models with different tokenizers: the loss summed over all tokens, in bits, divided by the bytes of the text.
End- and begin-of-document tokens add to the loss, but not to the bytes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatrain.assembly import mesh_shape, objective_of
from megatrain.checkpoint.load import find
from megatrain.companions import tokenizer_of
from megatrain.config.load import load_overrides
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError
from megatrain.data.held_out import Evaluated
from megatrain.data.sources import open_sources
from megatrain.data.tokenizer import Tokenizer
from megatrain.evaluate import Evaluation, evaluate
from megatrain.inference.trained import laid_out, load_chunks, saved_config, say_damaged
from megatrain.parallel.mesh import ParallelContext
from megatrain.records.rows import perplexity
from megatrain.runtime.distributed import connect
from megatrain.runtime.interface import launched
from megatrain.training import Model

COUNTED_TOKENS = 1 << 22
"""Bytes per token are measured on at most this many tokens from the beginning of each store."""


def config_to_evaluate(saved: Config, overrides: Sequence[str], world_size: int) -> Config:
    """The config of a checkpoint's run with the data, batches and layout that `overrides` give. Raises ConfigError."""
    layout = [text for text in overrides if text.startswith("parallel.")]
    others = [text for text in overrides if not text.startswith("parallel.")]
    for text in others:
        if not text.startswith(("data.", "train.micro_batch_size=", "train.eval_batches=")):
            raise ConfigError(
                f"{text}: only data.*, parallel.*, train.micro_batch_size and train.eval_batches can be chosen here, "
                "such as data.valid=PREFIX. The rest is the checkpoint's."
            )
    config = load_overrides(saved, others)
    if not config.data.valid:
        raise ConfigError("data.valid is empty, so there is nothing to evaluate on. Use data.valid=PREFIX of a token store.")
    replicas = laid_out(config, layout, world_size).data_parallel_size(world_size)
    train = replace(config.train, global_batch_size=config.train.micro_batch_size * replicas, batch_ramp=None)
    every = replace(train, eval_batches=config.train.eval_batches if any("eval_batches" in text for text in others) else 0)
    return laid_out(replace(config, train=every), layout, world_size)


def bytes_per_token(held_out: Evaluated, tokenizer: Tokenizer) -> float:
    """Mean bytes of text for each token of a validation set."""
    around = {tokenizer.ending.eod, tokenizer.beginning.first}
    tokens = size = 0
    for store in held_out.stores:
        seen = 0
        for number in range(len(store.document_lengths())):
            document = store.document(number)
            ids = [int(token) for token in document if int(token) not in around]
            size += len(tokenizer.decode(ids).encode())
            tokens, seen = tokens + document.size, seen + document.size
            if seen >= COUNTED_TOKENS:
                break
    return size / max(tokens, 1)


def row_of(name: str, result: Evaluation, held_out: Evaluated, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The numbers of one validation set; bits_per_byte is null without a tokenizer, and for text with blanks."""
    # In a text with blanks only some tokens are predicted, and their bytes are unknown.
    per_token = bytes_per_token(held_out, tokenizer) if tokenizer is not None and result.cloze_accuracy is None else 0.0
    cloze = {} if result.cloze_accuracy is None else {"cloze_accuracy": result.cloze_accuracy}
    return {
        "set": name or "valid",
        "loss": result.loss,
        "perplexity": perplexity(result.loss),
        "bits_per_byte": result.loss / math.log(2) / per_token if per_token else None,
        "token_accuracy": result.accuracy,
        "tokens": result.tokens,
        **cloze,
    }


def main(checkpoint: str, overrides: Sequence[str], as_json: bool) -> int:
    """`megatrain eval`: print a line for each validation set. Returns 0. Raises CheckpointError, ConfigError or TokenStoreError."""
    path = find(Path(checkpoint), say_damaged)
    launch = launched(os.environ)
    config = config_to_evaluate(saved_config(path), overrides, launch.world_size)
    session = connect(launch, config.parallel, config.train.hang_timeout_seconds)
    try:
        ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, launch.world_size), session.device)
        chunks = load_chunks(path, config, ctx)
        with session.together("opening the data"):
            tokenizer = tokenizer_of(config)
            _, _, sets = open_sources(config, chunks[0].build.vocab_size, tokenizer, train=False)
        model = Model(config, ctx, chunks, objective_of(config), held_out=sets)
        result = evaluate(model, config.train.eval_batches)
        if session.rank == 0:
            for name, of in result.sets.items():
                row = row_of(name, of, sets[name], tokenizer)
                sys.stdout.write((json.dumps(row) if as_json else line_of(row)) + "\n")
    finally:
        session.close()
    return 0


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    bits = "unknown (no data.tokenizer)" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    special = f"bits per byte {bits}"
    if "cloze_accuracy" in row:
        special = f"blanks filled right {100 * row['cloze_accuracy']:.2f}%"
    return (
        f"{row['set']}: loss {row['loss']:.4f} nats | perplexity {row['perplexity']:.4f} | {special} | "
        f"token accuracy {100 * row['token_accuracy']:.2f}% | {row['tokens']:,} tokens"
    )
