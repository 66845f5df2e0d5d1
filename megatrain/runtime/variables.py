"""Numbers in environment variables, which a launcher sets or a user does: read in one way, and told by name where they are none."""

from __future__ import annotations

import re
from collections.abc import Mapping

DIGITS = "[0-9]{1,12}"
"""The longest number that a variable may hold; Python itself refuses some thousands of digits, with a message of its own."""
SHOWN = 40
"""Letters of a value that a message has."""


def number_in(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    """The whole number that a variable holds, or `default` without it. Raises ValueError, which names the variable."""
    text = env.get(key)
    if text is None and default is not None:
        return default
    if not re.fullmatch(rf"\s*[-+]?{DIGITS}\s*", text or ""):
        raise ValueError(f"The environment variable {key}={cut(text)} is not a number.")
    return int(text or "")


def cut(text: str | None) -> str:
    """A value in quotes as a message shows it: the beginning of a long one."""
    return repr(text) if text is None or len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text)} letters)"
