"""`megatrain generate`: a text continued by a trained model, or its blanks filled, in one process or on any layout of several."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from megatrain.checkpoint.load import find
from megatrain.config.schema import Config
from megatrain.data.samples.sentinels import resolve
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.decoding import Beams, Choice, Decoder, best_continuation, continuation
from megatrain.infill import Filling, parsed
from megatrain.parallel.mesh import ParallelContext
from megatrain.program import mesh_shape
from megatrain.runtime.distributed import connect
from megatrain.runtime.launch import Launch
from megatrain.trained import laid_out, load_chunks, saved_config, say_damaged
from megatrain.training import schedule_of


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
    beams: int
    length_penalty: float
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


def load_decoder(path: Path, config: Config, ctx: ParallelContext) -> Decoder:
    """The model of a checkpoint (a step directory), laid out as `config` says, in float32; collective over the world of `ctx`.

    Raises CheckpointError where it is damaged or does not fit its own config.
    """
    return Decoder(load_chunks(path, config, ctx), ctx, schedule_of(config, 1, backward=False))


def _choose_tokenizer(given: str | None, config: Config) -> Tokenizer:
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
    if config.data.objective == "glm":
        _fill(arguments, config, decoder, codec, out)
        return
    prompt = _encode(codec, arguments.prompt, decoder.chunks[0].vocab_size)
    if len(prompt) > config.model.seq_length and out is sys.stdout:
        kept = max(1, config.model.seq_length // 2)
        note = (
            f"the prompt has {len(prompt)} tokens, and model.seq_length is {config.model.seq_length}: the last {kept} are used"
        )
        sys.stderr.write(f"megatrain: {note}\n")
    choice = Choice(arguments.greedy, arguments.temperature, arguments.top_k, arguments.top_p)
    tokens = continuation(decoder, prompt, arguments.max_tokens, choice, arguments.seed, codec.eod)
    if arguments.beams > 1:
        tokens = iter(best_continuation(decoder, prompt, arguments.max_tokens, beams_of(arguments), codec.eod))
    out.write(arguments.prompt)
    for piece in pieces_of_text(codec, tokens):
        out.write(piece)
        out.flush()
    out.write("\n")


def beams_of(arguments: Arguments) -> Beams:
    """Beam search as the command line has it."""
    return Beams(arguments.beams, arguments.length_penalty)


def _fill(arguments: Arguments, config: Config, decoder: Decoder, codec: Tokenizer, out: TextIO) -> None:
    """Write the prompt with its blanks filled; a prompt without any is continued."""
    ids, text_vocab = resolve(config.data.glm, codec, decoder.chunks[0].vocab_size)
    texts, masks = parsed(arguments.prompt, ids)
    filling = Filling(decoder, [codec.encode(text) for text in texts], masks, ids, text_vocab)
    choice = Choice(arguments.greedy, arguments.temperature, arguments.top_k, arguments.top_p)
    beams = beams_of(arguments) if arguments.beams > 1 else None
    for number, text in enumerate(texts):
        out.write(text)
        if number < len(masks):
            tokens = filling.fill(number, arguments.max_tokens, choice, arguments.seed + number, beams)
            for piece in pieces_of_text(codec, tokens):
                out.write(piece)
                out.flush()
    out.write("\n")
