"""Text on standard output as it comes: at once, on one rank alone, and on a terminal without control characters."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatrain.files import printable
from megatrain.inference.opening import Opened


def shower(model: Opened) -> Callable[[str], None]:
    """A function that writes text to standard output at once; on a terminal without control characters; nothing but on the first rank."""
    if not model.is_first:
        return lambda _text: None
    out = sys.stdout
    terminal = out.isatty()

    def show(text: str) -> None:
        out.write(printable(text, "\n\t") if terminal else text)
        out.flush()

    return show


def without(leading: str, show: Callable[[str], None]) -> Callable[[str], None]:
    """`show`, without the text that stands before an answer."""
    waiting = leading

    def later(piece: str) -> None:
        nonlocal waiting
        while waiting and piece.startswith(waiting[0]):
            waiting, piece = waiting[1:], piece[1:]
        if piece:
            waiting = ""
            show(piece)

    return later
