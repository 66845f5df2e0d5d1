"""What the words of a model are: those of the text, its characters, or the tokens of a tokenizer.

    words             what lies between blanks: also any segmentation that somebody made
    characters        every character but blanks: Chinese without a segmentation
    tokenizer.json    the tokens of each line, as numbers; `bytes`: its bytes

A block of text becomes one in which those units lie between blanks; lines stay lines.
"""

from __future__ import annotations

from collections.abc import Callable

from megatrain.data.tokenizer import Tokenizer, load_tokenizer

Spaced = Callable[[bytes], bytes]
"""Whole lines -> whole lines with blanks between units."""

WORDS = "words"
CHARACTERS = "characters"


def spacing(units: str) -> Spaced:
    """The function for `words`, `characters`, `bytes` or the path of a tokenizer.json. Raises TokenizerError."""
    if units == WORDS:
        return _as_they_are
    if units == CHARACTERS:
        return _characters
    tokenizer = load_tokenizer(units)
    return lambda block: _tokens(block, tokenizer)


def _as_they_are(block: bytes) -> bytes:
    return block


def _characters(block: bytes) -> bytes:
    """Bytes that are no UTF-8 stay as they are, one by one."""
    return " ".join(block.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _tokens(block: bytes, tokenizer: Tokenizer) -> bytes:
    lines = block.decode("utf-8", "replace").split("\n")
    return "\n".join(" ".join(map(str, ids.tolist())) for ids in tokenizer.encode_batch(lines)).encode()
