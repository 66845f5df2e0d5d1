"""The text and the bytes of single tokens, as log-probabilities show them.

A token is not always text: a Chinese character may be spread over three. Such a token is shown as OpenAI does, `bytes:\\xe4\\xbd`, and its
bytes are given beside it, so that those of several can be joined.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from megatrain.data.stream import REPLACEMENT
from megatrain.data.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """How the tokens of a tokenizer look; each is looked at once."""

    def __init__(self, codec: Tokenizer) -> None:
        self._codec = codec
        self._known: dict[int, tuple[str, bytes]] = {}
        self._anchor = codec.encode("a")[-1:]
        self._before = codec.decode(self._anchor)

    def of(self, token: int) -> tuple[str, bytes]:
        """(text, bytes) of a token, as it stands behind others."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look(token)
        return found

    def name(self, token: int) -> str:
        """The text of a token alone."""
        return self.of(token)[0]

    def _look(self, token: int) -> tuple[str, bytes]:
        name = self._codec.name_of(token)
        if self._codec.special_id(name) == token:
            return name, name.encode(errors="replace")
        text = self._codec.decode([*self._anchor, token])
        text = text[len(self._before) :] if text.startswith(self._before) else self._codec.decode([token])
        if REPLACEMENT not in text:
            return text, text.encode()
        raw = bytes_of_name(name)
        if raw is None:
            return text, text.encode()
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw), raw


def bytes_of_name(name: str) -> bytes | None:
    """The bytes that a token's name spells: <0xE4>, or the letters with which GPT-2's tokenizers write bytes; None for other names."""
    if (found := _BYTE.fullmatch(name)) is not None:
        return bytes((int(found[1], 16),))
    values = [_BYTE_LEVEL.get(letter) for letter in name]
    return None if None in values else bytes(value for value in values if value is not None)


def _byte_level() -> dict[str, int]:
    """Letters of GPT-2's tokenizers -> bytes: those that can be seen stand for themselves, others for letters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in seen}
    hidden = [value for value in range(256) if value not in seen]
    return table | {chr(0x100 + place): value for place, value in enumerate(hidden)}


_BYTE_LEVEL = _byte_level()


class Offsets:
    """How many characters of a text stand before each of its tokens."""

    def __init__(self, before: int = 0) -> None:
        """before: characters of the text in front of the first token."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = before

    def of(self, pieces: Iterable[bytes]) -> list[int]:
        """The places of the next tokens, by their bytes."""
        places = []
        for piece in pieces:
            broken = bool(self._decoder.getstate()[0]) and not 0x80 <= piece[:1].ljust(1)[0] < 0xC0
            places.append(self._length + broken)  # what came before is no whole character, and is shown as one
            self._length += len(self._decoder.decode(piece))
        return places
