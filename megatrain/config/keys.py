"""Every key of the schema, with its type, default and documentation."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatrain.config.effects import Effect
from megatrain.config.knob import Deferred, Range
from megatrain.config.schema import Config, CorpusConfig, WeightsConfig


@dataclass(frozen=True)
class Knob:
    """One value of one section of the schema."""

    path: tuple[str, ...]
    """Section, groups within it, name: ("data", "glm", "blank", "mask_ratio")."""
    kind: Any
    """The field's type."""
    default: Any
    doc: str
    effect: Effect | None
    """When the value has an effect; None: always."""
    range: Range
    """Bounds within its type."""
    use: Any
    """A value in range, which errors advise."""
    deferred: Deferred | None
    """Which values of its type and range only a later release takes; None: none."""

    @property
    def section(self) -> str:
        """The section's name."""
        return self.path[0]

    @property
    def name(self) -> str:
        """The name within its section: `name`, or `group.name`."""
        return ".".join(self.path[1:])

    @property
    def key(self) -> str:
        """The whole key: `section.name`."""
        return ".".join(self.path)

    def of(self, config: Config) -> Any:
        """The value of this knob in a config."""
        return operator.attrgetter(self.key)(config)

    def refused(self, config: Config) -> str:
        """The error for a value of the config that is out of range, or not of this release; "" for any other."""
        value = self.of(config)
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            return next(filter(None, (_element(f"{self.key}[{i}]", part) for i, part in enumerate(value))), "")
        return _refused(self.key, value, self.range, self.use) or self._unreleased(value)

    def _unreleased(self, value: Any) -> str:
        """The error for a value that only a later release takes."""
        if self.deferred is None or all(part in self.deferred.released for part in _parts(value)):
            return ""
        use = show(self.deferred.released) if isinstance(value, tuple) else choices(map(show, self.deferred.released))
        return f"{self.key}={show(value)} is not in this release: {self.deferred.why}. Use {self.key}={use}."

    def idle(self, config: Config) -> bool:
        """Whether the config's value differs from the default but has no effect."""
        return self.effect is not None and self.of(config) != self.default and not self.effect.holds(config)

    def ignored(self, config: Config) -> str:
        """The error for a value of the config that would be ignored; "" if it has an effect or is the default."""
        if self.effect is None or not self.idle(config):
            return ""
        here = " and ".join(f"{key}={show(operator.attrgetter(key)(config))}" for key in self.effect.keys)
        return (
            f"{self.key}={show(self.of(config))} has no effect: it has one when {self.effect.words}, and here {here}. "
            f"Change that, or leave {self.key} out (its default is {show(self.default)})."
        )


def knobs(schema: Any = Config) -> Iterator[Knob]:
    """Every knob of a schema (a dataclass whose fields are sections, or keys), in its order."""
    yield from _knobs_of((), schema)


def _knobs_of(path: tuple[str, ...], cls: Any) -> Iterator[Knob]:
    """The knobs of a schema, a section, or a group within one."""
    defaults = cls()
    for item in dataclasses.fields(cls):
        kind, here = fields_of(cls)[item.name], (*path, item.name)
        if dataclasses.is_dataclass(kind):
            yield from _knobs_of(here, kind)
        else:
            yield Knob(here, kind, getattr(defaults, item.name), **item.metadata)


def _parts(value: Any) -> tuple[Any, ...]:
    """The elements of a list, or the value."""
    return value if isinstance(value, tuple) else (value,)


def _refused(key: str, value: Any, within: Range, use: Any) -> str:
    """The error for a value, or an element of it, that is out of range; "" for one in range."""
    rule = next(filter(None, map(within.broken_by, _parts(value))), "")
    shown = repr(value) if isinstance(value, str) else show(value)
    return f"{key}={shown} {rule}. Use for example {show(use)}." if rule else ""


def _element(key: str, element: Any) -> str:
    """The error for the first field of a corpus, or of weights, that is out of range; "" if none is."""
    found = ((item.name, getattr(element, item.name), item.metadata) for item in dataclasses.fields(element))
    parts = ((name, part, about) for name, value, about in found for name, part in _named(name, value))
    errors = (_refused(f"{key}.{name}", part, about["range"], about["use"]) for name, part, about in parts)
    return next(filter(None, errors), "")


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    """A field's name and value, or those of each of a mapping of names."""
    pairs = isinstance(value, tuple) and value and isinstance(value[0], tuple)
    return [(f"{name}.{of}", part) for of, part in value] if pairs else [(name, value)]


def type_name(kind: Any) -> str:
    """A field's type in words: `integer or null`, `one of pre, post`, `list of text`."""
    names: dict[Any, str] = {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "text",
        CorpusConfig: "{path, weight}",
        WeightsConfig: "{from_share, weights}",
    }
    if kind in names or dataclasses.is_dataclass(kind):
        return names[kind] if kind in names else f"{{{', '.join([*_first_fields(kind), '...'])}}}"
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, parts))
    if is_optional(kind):
        null = ["null"] if types.NoneType in parts else []
        return " or ".join([*(type_name(part) for part in parts if part is not types.NoneType), *null])
    if parts[-1] is Ellipsis:
        named = value_of_names(kind)
        return (
            f"mapping of names to {type_name(named)}" if named else f"list of {type_name(parts[0]).replace('one of', 'any of')}"
        )
    return "list [" + ", ".join(type_name(part) for part in parts) + "]"


def _first_fields(cls: Any) -> list[str]:
    """The names of a dataclass's first two fields, which tell it from others."""
    return list(fields_of(cls))[:2]


@functools.cache
def fields_of(cls: Any) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def is_optional(kind: Any) -> bool:
    """Whether a type is a union, such as `int | None`."""
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def value_of_names(kind: Any) -> Any:
    """The type of the values of a mapping of names, which the schema has as pairs, `tuple[tuple[str, V], ...]`; None for other types."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is not tuple or parts[-1] is not Ellipsis or typing.get_origin(parts[0]) is not tuple:
        return None
    first, *rest = typing.get_args(parts[0])
    return rest[0] if first is str and len(rest) == 1 and rest[0] is not Ellipsis else None


def choices(values: Iterable[Any]) -> str:
    """Values as text: `1, 2 or 4`."""
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def show(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {show(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("\n", "\\n")
