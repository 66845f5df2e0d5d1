"""`knob` makes a field of the schema: its default, its documentation and when it has an effect, all shown in docs/config.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Effect:
    """The condition under which a knob has an effect. Elsewhere a value other than the default is refused, so that no value is ignored."""

    words: str
    """The condition as text, to follow `when`."""
    keys: tuple[str, ...]
    """The keys whose values decide."""
    holds: Callable[[Any], bool]
    """The condition as a function of a whole config."""

    def __and__(self, other: Effect) -> Effect:
        keys = (*self.keys, *(key for key in other.keys if key not in self.keys))
        return Effect(f"{self.words}, and {other.words}", keys, lambda config: self.holds(config) and other.holds(config))


def where(key: str, *values: Any) -> Effect:
    """The effect of a knob that counts only while `key` has one of `values`."""
    get = attrgetter(key)
    shown = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    words = " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return Effect(f"{key} is {words}", (key,), lambda config: get(config) in values)


def above(key: str, number: float) -> Effect:
    """The effect of a knob that counts only while `key` is above `number`."""
    get = attrgetter(key)
    return Effect(f"{key} is above {number:g}", (key,), lambda config: get(config) > number)


def given(key: str) -> Effect:
    """The effect of a knob that counts only while `key` has a value: not null, nor an empty list."""
    get = attrgetter(key)
    return Effect(f"{key} is given", (key,), lambda config: get(config) not in (None, ()))


def knob(default: T, doc: str, effect: Effect | None = None) -> T:
    """A config field with its default, its documentation (shown in docs/config.md), and when it has an effect (None: always)."""
    metadata = {"doc": doc, "effect": effect}
    if isinstance(default, (list, dict)):
        value = default
        return field(default_factory=lambda: type(value)(value), metadata=metadata)
    return field(default=default, metadata=metadata)
