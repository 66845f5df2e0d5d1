"""Continue a text with a trained model: one process, one sequence, a key-value cache.

Whatever layout a checkpoint was saved under, its weights are loaded whole. Sampling draws from a generator of its own, so the
same checkpoint, prompt and seed give the same text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import yaml

from megatrain.checkpoint.load import find, load
from megatrain.checkpoint.manifest import WEIGHTS, LocalTensor, Manifest, read_manifest
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.load import from_dict
from megatrain.config.schema import Config
from megatrain.data.tokenizer import load_tokenizer
from megatrain.models.attention import KeyValueCache
from megatrain.models.batch import MicroBatch
from megatrain.models.gpt import GPT
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext

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

    def __init__(self, model: GPT) -> None:
        if model.head is None:
            raise ValueError("only a model with its head gives logits; this is a pipeline stage without one")
        self.model, self.head = model, model.head
        self.capacity = model.build.config.seq_length
        self.caches: list[KeyValueCache] = []
        self.seen: list[int] = []
        """Tokens that the caches hold."""

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Append tokens (at least one) and return the logits [v] of the token after them.

        Where they do not fit model.seq_length any more, the model goes on with the latter half of what it can hold.
        """
        if not self.caches or len(self.seen) + len(ids) > self.capacity:
            ids = [*self.seen, *ids]
            if len(ids) > self.capacity:
                ids = ids[-max(1, self.capacity // 2) :]
            self._restart()
        build = self.model.build
        start = len(self.seen)
        tokens = torch.tensor(ids, dtype=torch.int64, device=build.device)[:, None]
        batch = MicroBatch(
            tokens=tokens,
            labels=tokens,
            loss_weights=torch.zeros(tokens.shape, device=build.device),
            positions=torch.arange(start, start + len(ids), device=build.device)[:, None],
            samples=torch.zeros(1, dtype=torch.int64, device=build.device),
        )
        hidden = self.model(None, batch, self.caches)
        self.seen += ids
        return self.head.logits(hidden[-1:])[0, 0]

    def _restart(self) -> None:
        build, config = self.model.build, self.model.build.config
        self.seen = []
        self.caches = [
            KeyValueCache(1, config.query_groups, self.capacity, config.head_dim, build.dtype, build.device)
            for _ in range(config.num_layers)
        ]


def continuation(
    model: GPT, prompt: Sequence[int], max_tokens: int, choice: Choice, seed: int, end: int | None = None
) -> Iterator[int]:
    """The tokens that follow `prompt` (at least one token), one by one; stops before the token `end`."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model)
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


def load_model(path: Path, device: torch.device) -> tuple[GPT, Config]:
    """The whole model of a checkpoint (a step directory) in one process, in float32, and the config it was trained with.

    Raises CheckpointError where it is damaged or does not fit its own config.
    """
    manifest = read_manifest(path)
    config = from_dict(yaml.safe_load(manifest.config))
    ctx = ParallelContext.single(device)
    build = Build(config.model, ctx.tp, sequence_parallel=False, dtype=torch.float32, device=device, seed=config.train.seed)
    model = GPT(_vocab_size(manifest), build, range(config.model.num_layers))
    load(path, {WEIGHTS: {p.spec.name: LocalTensor(p.spec, p) for p in model.logical_parameters()}}, ctx)
    return model.eval(), config


def _vocab_size(manifest: Manifest) -> int:
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


def _say_damaged(path: Path, reason: str) -> None:
    sys.stderr.write(f"megatrain: passed over {path}: {reason}\n")


def main(arguments: Arguments) -> int:
    """`megatrain generate`: print the prompt and what follows it, token by token. Returns 0.

    Raises CheckpointError, ConfigError or ValueError, with what to change.
    """

    path = find(Path(arguments.checkpoint), _say_damaged)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(path, device)
    codec = _choose_tokenizer(arguments.tokenizer, config)
    prompt = _encode(codec, arguments.prompt, model.vocab_size)
    if len(prompt) > config.model.seq_length:
        kept = max(1, config.model.seq_length // 2)
        note = (
            f"the prompt has {len(prompt)} tokens, and model.seq_length is {config.model.seq_length}: the last {kept} are used"
        )
        sys.stderr.write(f"megatrain: {note}\n")
    choice = Choice(arguments.greedy, arguments.temperature, arguments.top_k, arguments.top_p)
    tokens = continuation(model, prompt, arguments.max_tokens, choice, arguments.seed, codec.eod)
    sys.stdout.write(arguments.prompt)
    for piece in pieces_of_text(codec, tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
