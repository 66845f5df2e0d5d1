"""The units that a model counts as its words: words of the text, characters, or the tokens of a tokenizer.

    words             text between blanks, such as the output of any word segmenter
    characters        every character but blanks, such as for Chinese without segmentation
    tokenizer.json    the tokens of each line, as numbers; `bytes`: its bytes

`spacing` puts blanks between the units of a block of text; line ends stay.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from megatrain.data.tokenizer import Tokenizer, load_tokenizer

Spaced = Callable[[bytes], bytes]
"""Function: whole lines -> whole lines with blanks between units."""

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
    """Blanks between characters; bytes that are not UTF-8 become units one by one."""
    return " ".join(block.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _tokens(block: bytes, tokenizer: Tokenizer) -> bytes:
    lines = block.decode("utf-8", "replace").split("\n")
    ids, lengths = tokenizer.encode_batch(lines)
    numbers, ends = list(map(str, ids.tolist())), np.cumsum(lengths).tolist()
    return "\n".join(" ".join(numbers[begin:end]) for begin, end in pairwise([0, *ends])).encode()
