"""Continue a text with a trained model: one sequence, a key-value cache, in one process or on any layout of several.

Whatever layout a checkpoint was saved under, its weights load under the one that is asked for here. A step of decoding is the
forward-only schedule with one micro-batch; the last stage's logits go to every rank, and all draw the same token from generators
of their own, so the same checkpoint, prompt and seed give the same text.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import yaml

from megatrain.checkpoint.load import find, load
from megatrain.checkpoint.manifest import WEIGHTS, Manifest, read_manifest
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.load import from_dict
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate_layout
from megatrain.data.tokenizer import load_tokenizer
from megatrain.kernels.attention_mask import causal_mask
from megatrain.models.attention import KeyValueCache
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import GPT, build_gpt, logical_parameters
from megatrain.models.transformer import Block
from megatrain.parallel.collectives import all_reduce
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.pipeline_parallel import Chunk, Stage, run_schedule
from megatrain.parallel.portion import Portion
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.weights import Postponed
from megatrain.program import mesh_shape, require_schedule
from megatrain.runtime.distributed import Launch, connect
from megatrain.training import layer_pieces, schedule_of

EMBEDDING = "embedding.tokens"
"""Logical name of the parameter whose first dim is the vocabulary."""


class Arguments(Protocol):
    """What `megatrain generate` was given."""

    checkpoint: str
    prompt: str
    max_tokens: int
    seed: int
    tokenizer: str | None
    greedy: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    overrides: Sequence[str]


class Codec(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def eod(self) -> int | None:
        """Token that ends a document."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; U+FFFD where bytes are no whole character."""


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from its logits."""

    greedy: bool = False
    """The most probable token; the rest does not matter then."""
    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int | None = None
    """Only the k most probable tokens."""
    top_p: float | None = None
    """Only the fewest most probable tokens that have this probability together (nucleus sampling, arXiv:1904.09751)."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [v] -> probabilities [v], float32 on the CPU. Raises ValueError where logits are not finite."""
        logits = logits.float().cpu()
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "the model's logits are not finite numbers: its training has diverged. Take an earlier checkpoint."
            )
        if self.greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        logits = (logits - logits.max()) / self.temperature
        order = logits.argsort(descending=True, stable=True)
        kept = order[: self.top_k]
        probabilities = torch.softmax(logits[kept], 0)
        if self.top_p is not None:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return torch.zeros_like(logits).index_copy_(0, kept, probabilities / probabilities.sum())

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token id for logits [v]."""
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator).item())


class Decoder:
    """A model with a key-value cache, fed one piece of a single sequence after another."""

    def __init__(self, chunks: Sequence[GPT], ctx: ParallelContext | None = None, schedule: Schedule | None = None) -> None:
        """chunks: this rank's; by default there is one rank, which has the whole model. Ranks decode together."""
        self.chunks, self.ctx = chunks, ctx or ParallelContext.single()
        self.schedule = schedule or Schedule("1f1b", 1, 1, 1, backward=False)
        self.capacity = chunks[0].build.config.seq_length
        self.caches: list[list[KeyValueCache]] = []
        """Of each layer of each chunk."""
        self.seen: list[int] = []
        """Tokens that the caches hold."""

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Append tokens (at least one) and return the logits [v] of the token after them, on every rank.

        Where they do not fit model.seq_length any more, the model goes on with the latter half of what it can hold.
        """
        if not self.caches or len(self.seen) + len(ids) > self.capacity:
            ids = [*self.seen, *ids]
            if len(ids) > self.capacity:
                ids = ids[-max(1, self.capacity // 2) :]
            self._restart()
        device, start, config = self.ctx.device, len(self.seen), self.chunks[0].build.config
        tokens = torch.tensor(ids, dtype=torch.int64, device=device)[:, None]
        batch = MicroBatch(
            tokens=tokens,
            labels=tokens,
            loss_weights=torch.zeros(tokens.shape, device=device),
            positions=torch.arange(start, start + len(ids), device=device)[:, None],
            samples=torch.zeros(1, dtype=torch.int64, device=device),
            mask=causal_mask(config.window, config.sparse),
        )
        executed = run_schedule(self._stage(), self.schedule, [batch], scale=1.0)
        self.seen += ids
        return all_reduce(executed.statistics, self.ctx.pp).float()

    def _stage(self) -> Stage:
        """This rank's share of the pipeline, which ends in the logits of the last token."""
        head, ctx = self.chunks[-1].head, self.ctx

        def last_logits(hidden: torch.Tensor, _batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            if head is None:
                raise ValueError("only the last virtual stage of a pipeline gives logits")
            return hidden.new_zeros(()), head.logits(hidden[-1:])[0, 0]

        chunks = [_cached(chunk, caches) for chunk, caches in zip(self.chunks, self.caches, strict=True)]
        first = self.chunks[0]
        return Stage(
            ctx.pp.rank, chunks, last_logits, first.boundary, ctx.sends, ctx.receives, ctx.device, statistics=first.vocab_size
        )

    def _restart(self) -> None:
        self.seen = []
        self.caches = [[self._empty_cache(block) for block in chunk.stack.blocks] for chunk in self.chunks]

    def _empty_cache(self, block: Block) -> KeyValueCache:
        build = self.chunks[0].build
        head_dim = build.config.head_size
        return KeyValueCache(1, block.attention.key_heads, self.capacity, head_dim, build.dtype, build.device)


def _cached(chunk: GPT, caches: Sequence[KeyValueCache]) -> Chunk:
    def forward(hidden: torch.Tensor | None, batch: MicroBatch, _postponed: Postponed | None) -> torch.Tensor:
        return chunk(hidden, batch, caches)

    return forward


def continuation(
    decoder: Decoder, prompt: Sequence[int], max_tokens: int, choice: Choice, seed: int, end: int | None = None
) -> Iterator[int]:
    """The tokens that follow `prompt` (at least one token), one by one; stops before the token `end`. The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    new = list(prompt)
    for _ in range(max_tokens):
        token = choice.draw(decoder.logits(new), generator)
        if token == end:
            return
        yield token
        new = [token]


def pieces_of_text(codec: Codec, ids: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens as soon as it is certain: bytes that are no whole character yet wait for the next."""
    seen: list[int] = []
    shown = ""
    text = ""
    for token in ids:
        seen.append(token)
        text = codec.decode(seen)
        certain = text.rstrip("\ufffd")
        if len(certain) > len(shown):
            yield certain[len(shown) :]
            shown = certain
    if len(text) > len(shown):
        yield text[len(shown) :]


def saved_config(path: Path) -> Config:
    """The config of the run that saved a checkpoint."""
    return from_dict(yaml.safe_load(read_manifest(path).config))


def laid_out(config: Config, overrides: Sequence[str], world_size: int) -> Config:
    """The config of a run with another layout, one process by default. Raises ConfigError."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if not key.startswith("parallel."):
            raise ConfigError(f"{override}: only the layout can be chosen here, such as parallel.pipeline_parallel_size=2.")
        values[key.removeprefix("parallel.")] = yaml.safe_load(value)
    parallel = from_dict({"parallel": values}).parallel
    config = replace(config, parallel=replace(parallel, sequence_parallel=False))
    validate_layout(config, world_size)
    require_schedule(config)
    return config


def load_decoder(path: Path, config: Config, ctx: ParallelContext) -> Decoder:
    """The model of a checkpoint (a step directory), laid out as `config` says, in float32; collective over the world of `ctx`.

    Raises CheckpointError where it is damaged or does not fit its own config.
    """
    return Decoder(load_chunks(path, config, ctx), ctx, schedule_of(config, 1, backward=False))


def load_chunks(path: Path, config: Config, ctx: ParallelContext) -> list[GPT]:
    """This rank's part of a checkpoint's model as `load_decoder` has it, for evaluation."""
    vocab_size = vocab_size_of(read_manifest(path))
    chunks = build_gpt(
        config.model,
        vocab_size,
        ctx,
        *layer_pieces(config, vocab_size),
        sequence_parallel=False,
        dtype=torch.float32,
        seed=config.train.seed,
    )
    load(path, {WEIGHTS: {p.spec.name: Portion.whole(p.spec, p) for p in logical_parameters(chunks)}}, ctx)
    return [chunk.eval() for chunk in chunks]


def vocab_size_of(manifest: Manifest) -> int:
    """Tokens of the vocabulary of a checkpoint's model. Raises CheckpointError where it is no language model's."""
    stored = manifest.tensors.get(EMBEDDING)
    if stored is None:
        raise CheckpointError(f"the checkpoint of step {manifest.step} has no {EMBEDDING}: it is not a language model's")
    return stored.spec.shape[0]


def _choose_tokenizer(given: str | None, config: Config) -> Codec:
    """The tokenizer of the command line, or else of the run."""
    name = given or config.data.tokenizer
    if name is None:
        raise ValueError("the run of this checkpoint has no data.tokenizer. Give one: --tokenizer TOKENIZER.json, or bytes.")
    if name != "bytes" and not Path(name).is_file():
        origin = "--tokenizer" if given else "data.tokenizer of the checkpoint's run"
        raise ValueError(f"{origin} is {name}, and there is no such file here. Say where it is: --tokenizer TOKENIZER.json.")
    return load_tokenizer(name)


def _encode(codec: Codec, prompt: str, vocab_size: int) -> list[int]:
    """Token ids of the prompt; an empty one stands for the start of a document."""
    ids = [int(token) for token in codec.encode(prompt)]
    if not ids:
        if codec.eod is None:
            raise ValueError('the prompt is empty, and the tokenizer has no end-of-document token. Give a --prompt "TEXT".')
        ids = [codec.eod]
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer made token {max(ids)} of the prompt, and the checkpoint's vocabulary has {vocab_size} tokens. "
            "Give the tokenizer that the run was trained with: --tokenizer TOKENIZER.json."
        )
    return ids


def say_damaged(path: Path, reason: str) -> None:
    """Tell of a checkpoint that is not whole, when another one is taken."""
    sys.stderr.write(f"megatrain: passed over {path}: {reason}\n")


def main(arguments: Arguments) -> int:
    """`megatrain generate`: print the prompt and what follows it, token by token. Returns 0.

    Raises CheckpointError, ConfigError or ValueError, with what to change.
    """

    path = find(Path(arguments.checkpoint), say_damaged)
    launch = Launch.from_environment(os.environ)
    config = laid_out(saved_config(path), arguments.overrides, launch.world_size)
    session = connect(launch, config.parallel, config.train.hang_timeout_seconds)
    try:
        ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, launch.world_size), session.device)
        decoder = load_decoder(path, config, ctx)
        _generate(arguments, config, decoder, sys.stdout if session.rank == 0 else io.StringIO())
    finally:
        session.close()
    return 0


def _generate(arguments: Arguments, config: Config, decoder: Decoder, out: TextIO) -> None:
    """Write the prompt and what follows it."""
    codec = _choose_tokenizer(arguments.tokenizer, config)
    prompt = _encode(codec, arguments.prompt, decoder.chunks[0].vocab_size)
    if len(prompt) > config.model.seq_length and out is sys.stdout:
        kept = max(1, config.model.seq_length // 2)
        note = (
            f"the prompt has {len(prompt)} tokens, and model.seq_length is {config.model.seq_length}: the last {kept} are used"
        )
        sys.stderr.write(f"megatrain: {note}\n")
    choice = Choice(arguments.greedy, arguments.temperature, arguments.top_k, arguments.top_p)
    tokens = continuation(decoder, prompt, arguments.max_tokens, choice, arguments.seed, codec.eod)
    out.write(arguments.prompt)
    for piece in pieces_of_text(codec, tokens):
        out.write(piece)
        out.flush()
    out.write("\n")
