"""Types of arguments on the command line; each refuses other values with a message on what is valid."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress


def positive(given: str) -> int:
    """An integer of 1 or more."""
    if not (given.isascii() and given.isdigit() and int(given)):
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number of 1 or more")
    return int(given)


def index(given: str) -> int:
    """A place, counted from 0."""
    if not (given.isascii() and given.isdigit() and len(given) < 19):
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number of 0 or more")
    return int(given)


def text(given: str) -> str:
    """Text in UTF-8, whatever the locale's encoding. Refuses other bytes, which arrive as lone surrogates that no tokenizer accepts."""
    with suppress(UnicodeError):
        return given.encode("utf-8", "surrogateescape").decode()
    try:
        given.encode()
    except UnicodeEncodeError as error:
        code, before = ord(given[error.start]), given[: error.start][-20:]
        what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        raise argparse.ArgumentTypeError(
            f"this text is not UTF-8: {what} stands after {before!r}. Give it in UTF-8; a file in another encoding as "
            '"$(iconv -f ENCODING -t utf-8 FILE)"'
        ) from None
    return given


def seed(given: str) -> int:
    """A seed: a whole number from 0 to 2^63 - 1."""
    try:
        number = int(given)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number from 0 to {(1 << 63) - 1}")
    return number


def finite(given: str) -> float:
    """A finite number."""
    return _number(given, math.isfinite, "a number")


def temperature(given: str) -> float:
    """A number above 0."""
    return _number(given, lambda number: 0 < number < math.inf, "a number above 0; for the most probable token use --greedy")


def probability(given: str) -> float:
    """A number in (0, 1]."""
    return _number(given, lambda number: 0 < number <= 1, "a probability above 0 and at most 1")


def share(given: str) -> float:
    """A number in [0, 1]."""
    return _number(given, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def positive_number(given: str) -> float:
    """A number above 0."""
    return _number(given, lambda number: 0 < number < math.inf, "a number above 0")


def stop_text(given: str) -> str:
    """A text that ends another. Refuses an empty one, and the letters of an escape that the shell has left as they are."""
    found = text(given)
    if not found:
        raise argparse.ArgumentTypeError("an empty text would end every text before it begins")
    if found in ("\\n", "\\n\\n", "\\t"):
        raise argparse.ArgumentTypeError(
            f"{found} is a backslash and a letter here. For the character, in bash: --stop $'{found}'"
        )
    return found


def _number(given: str, holds: Callable[[float], bool], what: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not holds(number):
        raise argparse.ArgumentTypeError(f"{given!r} is not {what}")
    return number
