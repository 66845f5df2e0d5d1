"""`megatrain generate`: continue a text with a trained model, or fill its blanks, in one process or under any layout."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TextIO

from megatrain.config.schema import Config
from megatrain.data.samples.sentinels import resolve
from megatrain.data.stream import pieces_of_text
from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.beams import Beams, best_continuation
from megatrain.inference.engine import Engine
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.opening import Opened, TokenizerWish, opened
from megatrain.inference.overflow import fitted, going_on
from megatrain.inference.requests import Request, Sampling


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
    wish = TokenizerWish(arguments.tokenizer, arguments.eod, arguments.bos)
    with opened(arguments.checkpoint, arguments.overrides, tokenizer=wish) as model:
        _generate(arguments, model, sys.stdout if model.is_first else io.StringIO())
    return 0


def _generate(arguments: Arguments, model: Opened, out: TextIO) -> None:
    """Write the prompt and its continuation."""
    config, engine, codec = model.config, model.engine, model.codec
    if config.data.objective == "glm":
        _fill(arguments, config, engine, codec, out)
        return
    prompt = _encode(codec, arguments.prompt, engine.vocab_size)
    if len(prompt) > config.model.positions and out is sys.stdout:
        kept = max(1, config.model.positions // 2)
        note = f"the prompt has {len(prompt)} tokens, and model.max_positions is {config.model.positions}: the last {kept} are used"
        sys.stderr.write(f"megatrain: {note}\n")
    request = asked(arguments, tuple(prompt), codec.ending.stops)
    out.write(arguments.prompt)
    _show(codec, answered(engine, request, beams_of(arguments)), codec.encode(arguments.prompt), out)
    out.write("\n")


def asked(arguments: Arguments, tokens: tuple[int, ...], ends: Iterable[int] = ()) -> Request:
    """The request of a command line for a prompt's tokens."""
    return Request(tokens, arguments.max_tokens, sampling_of(arguments), arguments.seed, ends=frozenset(ends))


def answered(engine: Engine, request: Request, beams: Beams | None) -> Iterator[int]:
    """The tokens that follow a request's prompt, as they come; they go on beyond the model's positions but for beam search."""
    if beams is not None:
        yield from best_continuation(engine, request, beams).text_tokens
        return
    rest: Request | None = fitted(request, engine.max_length)
    while rest is not None:
        tokens, finish = [], None
        engine.add(rest)
        while finish is None:
            for update in engine.step():
                finish = update.finish
                for scored in update.tokens:
                    tokens.append(scored.token)
                    yield scored.token
        rest = going_on(rest, tokens, engine.max_length) if finish == "length" else None


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


def _fill(arguments: Arguments, config: Config, engine: Engine, codec: Tokenizer, out: TextIO) -> None:
    """Write the prompt with its blanks filled; a prompt without blanks is continued."""
    ids, text_vocab = resolve(config.data.glm, codec, engine.vocab_size)
    texts, masks = parsed(arguments.prompt, ids)
    encoded = [codec.encode(text) for text in texts]
    filling = Filling(engine, encoded, masks, ids, text_vocab)
    before: list[int] = []
    for number, text in enumerate(texts):
        out.write(text)
        before += encoded[number]
        if number < len(masks):
            request = filling.request(replace(asked(arguments, (0,)), seed=arguments.seed + number))
            filled: list[int] = []
            before += _show(codec, _kept(answered(engine, request, beams_of(arguments)), filled), before, out)
            filling.fill(request, filled)
    out.write("\n")


def _kept(tokens: Iterable[int], kept: list[int]) -> Iterator[int]:
    """The tokens, which are added to `kept` as they pass."""
    for token in tokens:
        kept.append(token)
        yield token
