"""The text of a stream of tokens, piece by piece, as soon as it is certain.

A token has no text of its own: SentencePiece's decoders drop a blank at the start of a text, a character may be spread over several
tokens, WordPiece puts a blank before all but the first. So earlier tokens are decoded together with new ones, and what is new is
shown. Bytes that begin a character wait for the next token, three at the most; bytes that no character begins with do not.

    before        new                           decoded together      shown
    ▁Once         ▁upon                         Once upon             " upon"      (alone: "upon")
    ▁Once ▁upon   <0xE4>                        Once upon�            ""
                  <0xE4> <0xBD> <0xA0>          Once upon你           "你"
                  <0xFF>                        Once upon你�          "�"
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT = 8
"""Earlier tokens decoded with new ones: more than any decoder looks back, and few enough that a long text takes linear time."""
MOST_BEGUN = 3
"""Bytes of UTF-8 at the most that are not a whole character yet."""


class Decodes(Protocol):
    """A tokenizer's decoder."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with U+FFFD for bytes that are not a whole character."""

    def unfinished(self, ids: Sequence[int]) -> int:
        """How many replacement characters at the end of decode(ids) stand for a character that has begun and may yet become whole."""


class GrowingText:
    """The text that tokens add to the text of earlier ones; all pieces together are the text of all, without that of the earlier ones."""

    def __init__(self, codec: Decodes, before: Sequence[int] = ()) -> None:
        """before: the earlier tokens."""
        self._codec, self._window = codec, list(before)[-CONTEXT:]
        self._shown = self._text = codec.decode(self._window)

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._window.append(token)
        self._text = self._codec.decode(self._window)
        begun_here = self._codec.unfinished(self._window) if self._text.endswith(REPLACEMENT) else 0
        piece = self._show(self._text[: len(self._text) - begun_here])
        if len(self._window) > 2 * CONTEXT and self._shown == self._text:
            self._window = self._window[-CONTEXT:]
            self._shown = self._text = self._codec.decode(self._window)
        return piece

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was begun."""
        return self._show(self._text)

    def _show(self, text: str) -> str:
        """The part of `text` after the prefix that it shares with what is shown already."""
        shown = self._shown
        if shown.startswith(text):
            return ""
        self._shown = text
        if text.startswith(shown):
            return text[len(shown) :]
        return text[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, text, strict=False))) :]


def begun(last: Iterable[bytes]) -> int:
    """How many bytes at the end of a text are the beginning of a character of UTF-8, and no more.

    last: the bytes of its tokens, the last token first; b"" for one of whole characters.
    """
    tail = b""
    for part in last:
        tail = part + tail
        if not part or len(tail) >= MOST_BEGUN:
            break
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tail[-MOST_BEGUN:])
    waiting, _ = decoder.getstate()
    return len(waiting)
