"""Kinds of numbers on the command line, each refused with what it should be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def temperature(text: str) -> float:
    """A number above 0."""
    return _number(text, lambda number: 0 < number < math.inf, "a number above 0; for the most probable token use --greedy")


def probability(text: str) -> float:
    """A number in (0, 1]."""
    return _number(text, lambda number: 0 < number <= 1, "a probability above 0 and at most 1")


def _number(text: str, holds: Callable[[float], bool], what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not holds(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number
