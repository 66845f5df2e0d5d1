"""Lines of bytes that come in chunks, with bounded memory: one that is too long is told of and passed over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


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
    number, begin = 0, 0
    rest: list[bytes] = []
    held, over = 0, False  # of the line that has begun: its bytes, and whether it was too long
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        held += len(first)
        if not over and first:
            if over := held > longest:
                yield Line(number, begin, None)
                rest.clear()
            else:
                rest.append(first)
        if not others:
            continue
        if rest:
            yield Line(number, begin, b"".join(rest))
            rest.clear()
        begin += held + 1
        number += 1
        last = others.pop()
        for part in others:
            if part:
                yield Line(number, begin, part if len(part) <= longest else None)
            begin += len(part) + 1
            number += 1
        held, over = len(last), len(last) > longest
        if over:
            yield Line(number, begin, None)
        elif last:
            rest.append(last)
    if rest:
        yield Line(number, begin, b"".join(rest))
