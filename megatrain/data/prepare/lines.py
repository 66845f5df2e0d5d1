"""Lines of bytes that come in chunks, with bounded memory: one that is too long is told of and passed over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NOT_EMPTY = re.compile(rb"[^\n]+")
"""Lines of a chunk; of empty ones, which a bomb has millions of, only the number counts."""


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
        for part in _NOT_EMPTY.finditer(chunk):
            start, end = part.span()
            if start > at:  # all between are line ends
                if held:
                    yield Line(number, begin, b"".join(held))
                    held.clear()
                number, begin, size = number + start - at, read + start, 0
            size += end - start
            if size <= longest:
                held.append(part.group())
            elif size - (end - start) <= longest:
                held.clear()
                yield Line(number, begin, None)
            at = end
        if at < len(chunk):
            if held:
                yield Line(number, begin, b"".join(held))
                held.clear()
            number, begin, size = number + len(chunk) - at, read + len(chunk), 0
        read += len(chunk)
    if held:
        yield Line(number, begin, b"".join(held))
