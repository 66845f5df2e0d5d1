"""Lines of bytes that come in chunks, with bounded memory: one that is too long is told of and passed over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_ENDS = re.compile(rb"\n+")
"""Ends of lines; of empty ones, which a bomb has millions of, only the number counts."""


class Line(NamedTuple):
    """A line that is not empty."""

    number: int
    """Line ends before it."""
    at: int
    """Bytes before it."""
    data: bytes | None
    """Without its end; None: it has more than `longest` bytes."""


def lines_of(chunks: Iterable[bytes], longest: int) -> Iterator[Line]:
    r"""The lines that are not empty, split at b"\n" alone, as strings of JSON may hold every other kind of line end.

    A line that is too long comes as soon as that is clear, and what follows of it is read without being kept.
    """
    number, begin, read = 0, 0, 0
    held: list[bytes] = []
    size = 0  # of the line that has begun
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            ends = _ENDS.match(chunk, at)
            if ends is not None:
                if held:
                    yield Line(number, begin, b"".join(held))
                    held.clear()
                number, begin, size, at = number + ends.end() - at, read + ends.end(), 0, ends.end()
                continue
            end = chunk.find(b"\n", at)  # ten times as fast as a pattern
            end = len(chunk) if end < 0 else end
            size += end - at
            if size <= longest:
                held.append(chunk[at:end])
            elif size - (end - at) <= longest:
                held.clear()
                yield Line(number, begin, None)
            at = end
        read += len(chunk)
    if held:
        yield Line(number, begin, b"".join(held))
