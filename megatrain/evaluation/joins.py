"""A context and its continuation as token ids: where the one ends and the other begins.

The two are encoded together, as the model has seen such text, and cut where the context alone ends; blanks at the end of the context
belong to the continuation, since most tokenizers put a blank at the beginning of a word:

    "The answer is: " + "Paris"     ->   The answer is: | ␣Paris
    "Ans" + "wer"                   ->   Ans | wer           the token `Answer` would span the join: the continuation is encoded alone
    "" + "Paris"                    ->   <s> | Paris         the tokens that open a text, else the one that ends the text before it

A text's opening tokens (BOS) are put before the context, once, by `prompt_ids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatrain.data.tokenizer import Tokenizer, prompt_ids

Encode = Callable[[str], Sequence[int]]
"""The ids of a text, without the tokens that open it."""

_ANCHORS = ("\n", ".")
"""Texts after which another one is encoded as inside a text: SentencePiece puts a blank before the first word alone."""


@dataclass(frozen=True)
class Join:
    """A context and a continuation as token ids, each at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    spanned: bool = False
    """Whether a token of the whole text spans the join, so that the continuation was encoded alone."""


def joined(codec: Tokenizer, pairs: Iterable[tuple[str, str]], encode: Encode | None = None) -> list[Join]:
    """The ids of (context, continuation) texts; a context may be empty. A context that several pairs share is encoded once.

    encode: how texts become ids, if not by `codec.encode`: that of a chat template, which knows special tokens in text.
    Raises ValueError for a continuation without a token, and for an empty context where no token is known to begin or end a text.
    """
    found: list[Join] = []
    heads: dict[str, Sequence[int]] = {}
    encode = encode or codec.encode
    for given, continuation in pairs:
        if not continuation:
            raise ValueError(
                f"the continuation of {_end(given)} is empty, so it has no token to score. Give each choice a text of at least one "
                "character."
            )
        context = given.rstrip()
        text = given[len(context) :] + continuation
        if context and context not in heads:
            heads[context] = encode(context)
        found.append(_joined(codec, context, text, heads.get(context, ()), encode))
    return found


def start_of_text(codec: Tokenizer) -> list[int]:
    """The tokens that the first token of a text is conditioned on: those that open a text; else the one that ends the text before it, or
    begins one. Raises ValueError if none is known."""
    start = prompt_ids(codec, ())
    if not start:
        raise ValueError(
            f"the first token of a text has no context: no token of {codec.label} is known to begin or end a text. Say which one does: "
            "--bos NAME or --eod NAME."
        )
    return start


def _joined(codec: Tokenizer, context: str, text: str, head: Sequence[int], encode: Encode) -> Join:
    """A context without blanks at its end, and the text that follows it."""
    whole = encode(context + text)
    rest = whole[len(head) :]
    spanned = not rest or list(whole[: len(head)]) != list(head)
    if spanned:
        rest = _inside(text, codec.encode)
    if not rest:
        raise ValueError(
            f"{codec.label} makes no token of the continuation {text!r} of {_end(context)}, so it has none to score. Give each choice "
            "a text with a visible character."
        )
    before = prompt_ids(codec, head) or start_of_text(codec)
    return Join(tuple(before), tuple(rest), spanned)


def _inside(text: str, encode: Encode) -> Sequence[int]:
    """The ids of a text encoded alone, as it would be inside another."""
    for anchor in _ANCHORS:
        head, whole = encode(anchor), encode(anchor + text)
        if list(whole[: len(head)]) == list(head) and len(whole) > len(head):
            return whole[len(head) :]
    return encode(text)


def _end(context: str) -> str:
    """The end of a context for messages."""
    return repr(context if len(context) <= 40 else f"...{context[-40:]}")
