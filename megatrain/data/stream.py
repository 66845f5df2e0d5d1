"""The text of a stream of tokens, piece by piece, as soon as it is certain.

A token has no text of its own: SentencePiece's decoders drop a blank at the start of a text, a character may be spread over several
tokens, WordPiece puts a blank before all but the first. So earlier tokens are decoded together with new ones, and the difference is
yielded. Bytes that are not a whole character yet wait for the next token.

    before        new                           decoded together      yielded
    ▁Once         ▁upon                         Once upon             " upon"      (alone: "upon")
    ▁Once ▁upon   <0xE4>                        Once upon�            ""
                  <0xE4> <0xBD> <0xA0>          Once upon你           "你"
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT = 32
"""Number of earlier tokens decoded with new ones: more than any decoder looks back, and few enough that a long text takes linear time."""


class Decodes(Protocol):
    """A tokenizer's decoder."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with U+FFFD for bytes that are not a whole character."""


def pieces_of_text(codec: Decodes, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The text that `ids` add to the text of `before`, piece by piece; the end is never dropped.

    The pieces together are the text of all tokens, without that of `before`.
    """
    window = list(before)[-CONTEXT:]
    shown = text = codec.decode(window)
    for token in ids:
        window.append(token)
        text = codec.decode(window)
        certain = text.rstrip(REPLACEMENT)
        if not shown.startswith(certain):
            yield _new(shown, certain)
            shown = certain
        if len(window) > 2 * CONTEXT and shown == text:
            window = window[-CONTEXT:]
            shown = text = codec.decode(window)
    if not shown.startswith(text):
        yield _new(shown, text)


def _new(shown: str, text: str) -> str:
    """The part of `text` after the prefix that it shares with `shown`."""
    return text[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, text, strict=False))) :]
