"""`megatrain generate`: continue a text with a trained model, or fill its blanks, in one process or under any layout."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from megatrain.assembly import mesh_shape
from megatrain.checkpoint.load import find
from megatrain.companions import tokenizer_beside
from megatrain.config.schema import Config
from megatrain.data.samples.sentinels import resolve
from megatrain.data.stream import pieces_of_text
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.inference.decoding import Beams, Decoder, Sampling, best_continuation, continuation
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.trained import laid_out, load_chunks, saved_config, say_damaged
from megatrain.parallel.mesh import ParallelContext
from megatrain.runtime.distributed import connect
from megatrain.runtime.interface import launched
from megatrain.training import schedule_of


class Arguments(Protocol):
    """The arguments of `megatrain generate`."""

    checkpoint: str
    prompt: str
    max_tokens: int
    seed: int
    tokenizer: str | None
    eod: str | None
    bos: str | None
    greedy: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    beams: int | None
    length_penalty: float
    overrides: Sequence[str]


def load_decoder(path: Path, config: Config, ctx: ParallelContext) -> Decoder:
    """The model of a checkpoint (a step directory) in float32, in the layout of `config`; collective over the world of `ctx`.

    Raises CheckpointError if it is damaged or does not fit its own config.
    """
    return Decoder(load_chunks(path, config, ctx), ctx, schedule_of(config, 1, backward=False))


def _choose_tokenizer(arguments: Arguments, config: Config, checkpoint: Path) -> Tokenizer:
    """The tokenizer of the command line, or else the run's, or else the one that came with its first weights."""
    given, data = arguments.tokenizer, config.data
    name = given or tokenizer_beside(data, checkpoint)
    if name is None:
        raise ValueError("the run of this checkpoint has no data.tokenizer. Give one: --tokenizer TOKENIZER.json, or bytes.")
    if name != "bytes" and not Path(name).is_file():
        origin = "--tokenizer" if given else "data.tokenizer of the checkpoint's run"
        raise ValueError(f"{origin} is {name}, and there is no such file here. Say where it is: --tokenizer TOKENIZER.json.")
    eod, bos = (data.eod if arguments.eod is None else arguments.eod), (data.bos if arguments.bos is None else arguments.bos)
    return load_tokenizer(name, eod, bos)


def _encode(codec: Tokenizer, prompt: str, vocab_size: int) -> list[int]:
    """Token ids of the prompt, after the tokens that the tokenizer puts before a text; for an empty prompt, a start-of-document token."""
    ids = [*codec.beginning.opening, *map(int, codec.encode(prompt))]
    if not ids:
        start = codec.beginning.bos if codec.eod is None else codec.eod
        if start is None:
            raise ValueError(
                'the prompt is empty, and no token of the tokenizer is known to end or begin a document. Give a --prompt "TEXT".'
            )
        ids = [start]
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer made token {max(ids)} of the prompt, and the checkpoint's vocabulary has {vocab_size} tokens. "
            "Give the tokenizer that the run was trained with: --tokenizer TOKENIZER.json."
        )
    return ids


def main(arguments: Arguments) -> int:
    """`megatrain generate`: print the prompt and its continuation, token by token. Returns 0.

    Raises CheckpointError, ConfigError or ValueError, with advice.
    """
    path = find(Path(arguments.checkpoint), say_damaged)
    launch = launched(os.environ)
    config = laid_out(saved_config(path), arguments.overrides, launch.world_size)
    session = connect(launch, config.parallel, config.train.hang_timeout_seconds)
    try:
        ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, launch.world_size), session.device)
        codec = _choose_tokenizer(arguments, config, path)
        _generate(arguments, config, load_decoder(path, config, ctx), codec, sys.stdout if session.rank == 0 else io.StringIO())
    finally:
        session.close()
    return 0


def _generate(arguments: Arguments, config: Config, decoder: Decoder, codec: Tokenizer, out: TextIO) -> None:
    """Write the prompt and its continuation."""
    if config.data.objective == "glm":
        _fill(arguments, config, decoder, codec, out)
        return
    prompt = _encode(codec, arguments.prompt, decoder.chunks[0].build.vocab_size)
    if len(prompt) > config.model.positions and out is sys.stdout:
        kept = max(1, config.model.positions // 2)
        note = f"the prompt has {len(prompt)} tokens, and model.max_positions is {config.model.positions}: the last {kept} are used"
        sys.stderr.write(f"megatrain: {note}\n")
    beams, ends = beams_of(arguments), codec.ending.stops
    if beams is None:
        tokens = continuation(decoder, prompt, arguments.max_tokens, sampling_of(arguments), arguments.seed, ends)
    else:
        tokens = iter(best_continuation(decoder, prompt, arguments.max_tokens, beams, ends))
    out.write(arguments.prompt)
    _show(codec, tokens, codec.encode(arguments.prompt), out)
    out.write("\n")


def sampling_of(arguments: Arguments) -> Sampling:
    """How a token is chosen, from the command line; one beam means the most probable token."""
    greedy = arguments.greedy or arguments.beams is not None
    return Sampling(greedy, arguments.temperature, arguments.top_k, arguments.top_p)


def beams_of(arguments: Arguments) -> Beams | None:
    """Beam search from the command line; None for a single text."""
    several = arguments.beams is not None and arguments.beams > 1
    return Beams(arguments.beams or 1, arguments.length_penalty) if several else None


def _show(codec: Tokenizer, tokens: Iterable[int], before: Sequence[int], out: TextIO) -> list[int]:
    """Write the text of tokens, as they come, after the text of `before`; special tokens have no text. Returns the tokens shown."""
    shown: list[int] = []

    def passing() -> Iterator[int]:
        for token in tokens:
            if codec.special_id(codec.name_of(token)) is None:
                shown.append(token)
                yield token

    for piece in pieces_of_text(codec, passing(), before):
        out.write(piece)
        out.flush()
    return shown


def _fill(arguments: Arguments, config: Config, decoder: Decoder, codec: Tokenizer, out: TextIO) -> None:
    """Write the prompt with its blanks filled; a prompt without blanks is continued."""
    ids, text_vocab = resolve(config.data.glm, codec, decoder.chunks[0].build.vocab_size)
    texts, masks = parsed(arguments.prompt, ids)
    encoded = [codec.encode(text) for text in texts]
    filling = Filling(decoder, encoded, masks, ids, text_vocab)
    before: list[int] = []
    for number, text in enumerate(texts):
        out.write(text)
        before += encoded[number]
        if number < len(masks):
            seed = arguments.seed + number
            tokens = filling.fill(number, arguments.max_tokens, sampling_of(arguments), seed, beams_of(arguments))
            before += _show(codec, tokens, before, out)
    out.write("\n")
