"""What a field of the schema is made of: its default and its documentation, which docs/config.md shows."""

from __future__ import annotations

from dataclasses import field
from typing import TypeVar

T = TypeVar("T")


def knob(default: T, doc: str) -> T:
    """A config field with its default and its documentation (shown in docs/config.md)."""
    if isinstance(default, (list, dict)):
        value = default
        return field(default_factory=lambda: type(value)(value), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})
