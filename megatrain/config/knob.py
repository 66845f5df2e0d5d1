"""What a field of the schema is made of: its default, its documentation and when it has an effect, which docs/config.md shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Effect:
    """When a knob has an effect: a key given otherwise is refused, since what is given is not ignored."""

    words: str
    """After `when`."""
    keys: tuple[str, ...]
    """What it hangs on."""
    holds: Callable[[Any], bool]
    """Of a whole config."""

    def __and__(self, other: Effect) -> Effect:
        keys = (*self.keys, *(key for key in other.keys if key not in self.keys))
        return Effect(f"{self.words}, and {other.words}", keys, lambda config: self.holds(config) and other.holds(config))


def where(key: str, *values: Any) -> Effect:
    """An effect while a key has one of some values."""
    get = attrgetter(key)
    shown = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    words = " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return Effect(f"{key} is {words}", (key,), lambda config: get(config) in values)


def above(key: str, number: float) -> Effect:
    """An effect while a key is above a number."""
    get = attrgetter(key)
    return Effect(f"{key} is above {number:g}", (key,), lambda config: get(config) > number)


def given(key: str) -> Effect:
    """An effect while a key has a value: not null, nor an empty list."""
    get = attrgetter(key)
    return Effect(f"{key} is given", (key,), lambda config: get(config) not in (None, ()))


def knob(default: T, doc: str, effect: Effect | None = None) -> T:
    """A config field with its default, its documentation (shown in docs/config.md), and when it has an effect (None: always)."""
    metadata = {"doc": doc, "effect": effect}
    if isinstance(default, (list, dict)):
        value = default
        return field(default_factory=lambda: type(value)(value), metadata=metadata)
    return field(default=default, metadata=metadata)
