"""Messages that only the ranks of a job can have written: each carries an HMAC-SHA256 under a key that they share.

The store where ranks meet is open to every process that reaches its port. What is written there and obeyed (an alarm, a verdict) is
therefore sealed; a text without the right seal is as good as not there. The seal covers the key that the text stands under, so that it
cannot be moved to another. A key made of nothing (b"", where ranks share no secret) seals against accidents alone.
"""

from __future__ import annotations

import hashlib
import hmac

SEAL_LETTERS = 64


class Seal:
    """Closes and opens texts under one key."""

    def __init__(self, key: bytes = b"") -> None:
        self._key = key

    def close(self, place: str, text: str) -> str:
        """The text with its seal before it. place: the key of the store that it will stand under."""
        return self._mark(place, text.encode(errors="replace")) + text

    def close_bytes(self, place: str, data: bytes) -> bytes:
        """The bytes with their seal before them."""
        return self._mark(place, data).encode() + data

    def open(self, place: str, data: bytes) -> str | None:
        """The text that was closed for this place; None where the seal is missing or wrong."""
        found = self.open_bytes(place, data)
        return None if found is None else found.decode(errors="replace")

    def open_bytes(self, place: str, data: bytes) -> bytes | None:
        """The bytes that were closed for this place; None where the seal is missing or wrong."""
        said, inside = data[:SEAL_LETTERS], data[SEAL_LETTERS:]
        return inside if hmac.compare_digest(said, self._mark(place, inside).encode()) else None

    def _mark(self, place: str, text: bytes) -> str:
        return hmac.digest(self._key, place.encode() + b"\0" + text, hashlib.sha256).hex()


def derived(secret: str, *what: object) -> str:
    """64 hexadecimal digits that only those who know the secret can tell, for one use of it; empty for an empty secret."""
    words = "\0".join(map(str, what)).encode()
    return hmac.digest(secret.encode(errors="replace"), words, hashlib.sha256).hex() if secret else ""
