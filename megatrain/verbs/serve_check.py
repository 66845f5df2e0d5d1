"""`megatrain export CKPT --serve-check URL`: compare another server, which has the exported model, with our own engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.data.tokenizer import prompt_ids
from megatrain.inference.opening import Opened, TokenizerWish, opened
from megatrain.inference.requests import Answer, Request, Sampling
from megatrain.serving.hand_over import MOST_PROBABLE, NEW_TOKENS, TEXTS, Agreement, OtherServer, agreement
from megatrain.serving.token_texts import TokenTexts

AGREE, DIFFER = 0, 1


@dataclass(frozen=True)
class CheckOptions:
    """The arguments of the comparison."""

    checkpoint: Path
    server: OtherServer
    tolerance: float
    """Nats by which log-probabilities may differ, and two tokens be a tie."""


def main(options: CheckOptions) -> int:
    """Print a line for each prompt, and a verdict. Returns 0 where the servers agree, else 1.

    Raises CheckpointError, HandOverError or ValueError.
    """
    server = options.server.named()
    with opened(options.checkpoint, tokenizer=TokenizerWish()) as model:
        count = new_tokens(model)
        prompts, texts = prompts_of(model), TokenTexts(model.codec)
        ends = frozenset(model.codec.ending.stops)
        pairs = zip(prompts, answers(model, prompts), strict=True)
        found = [agreement(own.tokens, server.complete(ids, count), texts, ends) for ids, own in pairs]
    sys.stdout.write("\n".join([*lines(found, options.tolerance), verdict(found, options.tolerance)]) + "\n")
    return DIFFER if any(each.wrong(options.tolerance) for each in found) else AGREE


def new_tokens(model: Opened) -> int:
    """Number of tokens that are compared: fewer for a model with hardly any positions."""
    return min(NEW_TOKENS, model.engine.max_length // 2)


def prompts_of(model: Opened) -> list[tuple[int, ...]]:
    """The prompts as token ids, as far as they fit the model with their continuations."""
    codec, most = model.codec, model.engine.max_length - new_tokens(model)
    return [tuple(prompt_ids(codec, codec.encode(text))[:most]) for text in TEXTS]


def answers(model: Opened, prompts: Sequence[tuple[int, ...]]) -> list[Answer]:
    """Our own greedy continuations, whether or not a text ends."""
    top = min(MOST_PROBABLE, model.engine.vocab_size)
    return model.engine.run([Request(ids, new_tokens(model), Sampling(greedy=True), top=top) for ids in prompts])


def lines(found: Sequence[Agreement], tolerance: float) -> list[str]:
    """A line for each prompt."""
    rows = [f"{'prompt':38} {'equal':>5}  {'max |dlogp|':>11}  first difference"]
    for text, each in zip(TEXTS, found, strict=True):
        first = "none"
        if each.differs:
            tie = each.margin is not None and each.margin <= tolerance
            by = "" if each.margin is None else f", by {each.margin:.3f} nats{': a tie' if tie else ''}"
            first = f"token {each.compared + 1}: ours {each.ours!r}, theirs {each.theirs!r}{by}"
        rows.append(f"{text[:30]!r:38} {each.compared:>5}  {each.largest:>11.5f}  {first}")
    return rows


def verdict(found: Sequence[Agreement], tolerance: float) -> str:
    """All lines together, in one."""
    count, wrong = sum(each.compared for each in found), sum(each.wrong(tolerance) for each in found)
    mean = sum(each.total for each in found) / max(1, count)
    ties = sum(each.differs and not each.wrong(tolerance) for each in found)
    numbers = (
        f"{count} tokens compared, max |dlogp| {max(each.largest for each in found):.5f} nats, mean {mean:.5f}, {ties} ties"
    )
    if not wrong:
        return f"the servers agree on {len(found)} prompts: {numbers}"
    advice = f"Are weights, dtype and tokenizer the same? Rounding alone stays below --serve-tolerance {tolerance:g}"
    return f"the servers differ on {wrong} of {len(found)} prompts: {numbers}. {advice}."
