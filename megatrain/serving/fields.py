"""Fields of requests: what each may be, checked before anything is done. A field that is unknown, unsupported or wrong is refused by name.

A check is a function of a field's name and its JSON value that returns the value to use, or raises a Refusal with one that would do.
`null` means that a field is not given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from megatrain.serving.refusal import Refusal

Check = Callable[[str, Any], Any]
Body = TypeVar("Body")
_SHOWN = 60
_LARGEST_ID = (1 << 31) - 1


@dataclass(frozen=True)
class Unsupported:
    """A field of OpenAI's that is known here and not supported, but for values that ask for nothing."""

    why: str
    """Advice: what to do instead."""
    neutral: tuple[Any, ...] = ()


def given(check: Check, default: Any = None) -> Any:
    """A field of a body."""
    return field(default=default, metadata={"check": check})


def wanted(check: Check) -> Any:
    """A field that every request must give."""
    return field(metadata={"check": check})


def parsed(kind: type[Body], data: Any, unsupported: Mapping[str, Unsupported]) -> Body:
    """A body of a kind from JSON. Raises Refusal."""
    if not isinstance(data, dict):
        raise Refusal(f'the body is {_name(data)}, and should be a JSON object such as {{"model": ...}}.')
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key in known:
            if value is not None:
                values[key] = known[key].metadata["check"](key, value)
        elif key in unsupported:
            if value is not None and value not in unsupported[key].neutral:
                raise Refusal(f"{key} is not supported: {unsupported[key].why}", key, code="unsupported_parameter")
        else:
            near = get_close_matches(key, [*known, *unsupported], 1, 0.6)
            hint = f"The nearest known one is {near[0]}." if near else f"Known are {', '.join(known)}."
            raise Refusal(f"there is no field {key[:_SHOWN]!r} here. {hint}", key[:_SHOWN], code="unknown_parameter")
    for name, each in known.items():
        if each.default is MISSING and name not in values:
            raise Refusal(f"{name} is missing, and must be given.", name, code="missing_required_parameter")
    return kind(**values)


def number(low: float, high: float, example: float, above: bool = False) -> Check:
    """A number from low (or above it) to high."""

    def check(key: str, value: Any) -> float:
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not right or not (low < value if above else low <= value) or value > high:
            range_ = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
            raise _wrong(key, value, range_, example)
        return float(value)

    return check


def whole(low: int, high: int, example: int) -> Check:
    """A whole number from low to high."""

    def check(key: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _wrong(key, value, f"a whole number from {low} to {high}", example)
        return value

    return check


def switch(key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false", True)
    return value


def text(longest: int, shortest: int = 0) -> Check:
    """A text of so many characters that can be written as UTF-8."""

    def check(key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise _wrong(key, value, "a text", "Hello")
        if not shortest <= len(value) <= longest:
            raise Refusal(f"{key} has {len(value)} characters; it should have {shortest} to {longest}.", key)
        return proper(key, value)

    return check


def proper(key: str, value: str) -> str:
    """A text without lone surrogates, which no tokenizer can encode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(value[error.start]):04X}"
        raise Refusal(f"{key} has the lone surrogate {bad} at character {error.start}, which is no text.", key) from None
    return value


def several(check: Check, most: int, example: Any, least: int = 0) -> Check:
    """A list of such values, least to most of them, as a tuple."""

    def every(key: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _wrong(key, value, "a list", example)
        if not least <= len(value) <= most:
            raise Refusal(f"{key} has {len(value)} entries; it may have {least} to {most}.", key)
        return tuple(check(f"{key}[{place}]", each) for place, each in enumerate(value))

    return every


def ids(most: int, least: int = 0) -> Check:
    """A list of token ids; those beyond the model's vocabulary are found later."""
    one = whole(0, _LARGEST_ID, 1)

    def check(key: str, value: Any) -> tuple[int, ...]:
        plain = isinstance(value, list) and least <= len(value) <= most and all(type(each) is int for each in value)
        if plain and (not value or 0 <= min(value) <= max(value) <= _LARGEST_ID):
            return tuple(value)  # at once, as there may be a million
        return several(one, most, [1, 2, 3], least)(key, value)

    return check


def stops(key: str, value: Any) -> tuple[str, ...]:
    """A text or a list of up to four."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > 4:
        raise _wrong(key, value, "a text or a list of up to four texts", ["\n\n"])
    return tuple(text(1000, 1)(key, each) for each in values)


def bias(key: str, value: Any) -> tuple[tuple[int, float], ...]:
    """An object of token ids, as texts, and numbers from -100 to 100."""
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object of token ids and numbers from -100 to 100", {"50256": -100})
    found: dict[int, float] = {}
    for token, amount in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise Refusal(f'{key} has the key {token[:_SHOWN]!r}, which is no token id. Try {{"50256": -100}}.', key)
        found[int(token)] = number(-100, 100, -100)(f"{key}[{token}]", amount)
    return tuple(sorted(found.items()))


def one_of(*values: str) -> Check:
    """One of some texts."""

    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise _wrong(key, value, " or ".join(map(repr, values)), values[0])
        return value

    return check


def options(**checks: Check) -> Check:
    """An object with some fields, all of which may be left out."""

    def check(key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(key, value, "an object", dict.fromkeys(checks, True))
        for name in value:
            if name not in checks:
                raise Refusal(
                    f"{key} has no field {name[:_SHOWN]!r}. Known: {', '.join(checks)}.", key, code="unknown_parameter"
                )
        return {name: checks[name](f"{key}.{name}", each) for name, each in value.items() if each is not None}

    return check


def _wrong(key: str, value: Any, what: str, example: Any) -> Refusal:
    tried = str(example).lower() if isinstance(example, bool) else repr(example)
    return Refusal(f"{key}: {shown_value(value)} is not {what}. Try {tried}.", re.split(r"[.\[]", key)[0], code="invalid_value")


def shown_value(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    said = repr(value) if not isinstance(value, bool | None) else {True: "true", False: "false", None: "null"}[value]
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}... ({_name(value)})"


def _name(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )
