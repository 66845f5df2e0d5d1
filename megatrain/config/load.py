"""YAML and the command line become a `Config`: every key is known, every value has its type, every origin is kept.

    loaded = load("gpt.yaml", ["optim.lr=1e-3"])     # loaded.config, loaded.origins["optim.lr"] == "command line"

The file has one mapping for each section of `schema.Config`; an override `section.key=value` replaces one value, read as YAML.
No value is converted to another type, except an integer to a float and text like `1e-4` (no number in YAML 1.1) to a float. A
corpus list may be a plain string (a list of one), and its elements strings or {path, weight}. Relative paths stay relative to
the working directory; ~ at the beginning of a path becomes the home directory, but not in `dump`, which writes what was given.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import yaml

from megatrain.config.keys import fields_of, is_optional, knobs, show, type_name, value_of_names
from megatrain.config.presets import FAMILIES, PRESETS
from megatrain.config.schema import Config, CorpusConfig, Document, WeightsConfig
from megatrain.config.source import ConfigError, Path, Tree, dotted, read_file, read_text

__all__ = ["ConfigError", "Loaded", "dump", "from_dict", "load", "load_tree"]

Shapes = Callable[[str], Mapping[str, Any]]
"""Function: value of model.init_from -> the keys of `model` read there."""

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Loaded:
    """A config and the origin of each of its values."""

    config: Config
    origins: dict[str, str]
    """For every `section.key`: `file:line`, `command line` or `default`; empty for a config that was no file."""
    given: Config
    """The config with ~ in its paths as they were written."""

    @property
    def text(self) -> str:
        """The config as it was given, as YAML with origins."""
        return dump(self.given, self.origins)


def load(path: str | FilePath, overrides: Iterable[str] = (), shapes: Shapes | None = None) -> Loaded:
    """The config of a YAML file, changed by `section.key=value` overrides. Raises ConfigError.

    shapes: reads the keys of `model` at model.init_from, which needs rooms that config must not import.
    """
    tree = read_file(path)
    _normalize_sections(tree)
    _apply_overrides(tree, overrides)
    given = _filled(tree, shapes)
    return Loaded(at_home(given), {knob.key: tree.places.get(knob.path, DEFAULT) for knob in knobs()}, given)


def load_tree(tree: Config | Document, shapes: Shapes | None = None) -> Loaded:
    """The config of a tree {section: {key: value}}, or of a Config made in Python, checked like a file. Raises ConfigError."""
    if isinstance(tree, Config):
        tree = dataclasses.asdict(tree)
    source = Tree(tree)
    _normalize_sections(source)
    given = _filled(source, shapes)
    return Loaded(at_home(given), {}, given)


def load_sections(schema: Any, path: str | FilePath, overrides: Iterable[str] = ()) -> Any:
    """The config of another `schema`, a dataclass of sections made by `knob`, read as strictly as that of a run. Raises ConfigError."""
    tree = read_file(path)
    tree.schema = schema
    _normalize_sections(tree)
    _apply_overrides(tree, overrides)
    return _valid(tree, at_home(_build(tree)))


def load_keys(schema: Any, path: str | FilePath, example: str, refused: Mapping[str, str]) -> tuple[Any, Tree]:
    """An instance of `schema`, a dataclass of keys made by `knob`, of a file that has no sections, and the tree with their places.

    example: a line of such a file, which the errors advise; refused: keys that others' files have -> why not, and what to do instead.
    Raises ConfigError.
    """
    tree = read_file(path, f"Write its keys, for example `{example}`")
    tree.schema = schema
    if not isinstance(tree.root, Mapping):
        found = _describe(tree.root)
        raise ConfigError(f"{path}: the file is {found}, not a mapping. Its top level has keys, for example `{example}`.")
    for name in tree.root:
        if name in refused:
            _fail(tree, (name,), f"is not taken here: {refused[name]}.")
    return _valid(tree, at_home(_dataclass(tree, (), schema, tree.root))), tree


def _valid(tree: Tree, config: Any) -> Any:
    """A config of the tree's schema whose values are all in range and have an effect. Raises ConfigError."""
    for knob in knobs(_schema(tree)):
        if problem := knob.refused(config) or knob.ignored(config):
            place = tree.place(knob.path)
            raise ConfigError(f"{place + ': ' if place else ''}{problem}")
    return config


def from_dict(tree: Config | Document, shapes: Shapes | None = None) -> Config:
    """The config of `load_tree`."""
    return load_tree(tree, shapes).config


def at_home(config: Any) -> Any:
    """A config with home directories for ~ and ~user at the beginning of its paths."""
    return _at_home(config)


def _at_home(node: Any) -> Any:
    """A section, a group within one, or a corpus, with home directories for ~ in its paths."""
    changed = {}
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            changed[item.name] = _at_home(value)
        elif isinstance(value, tuple):
            path = item.metadata["range"].path
            changed[item.name] = tuple(
                _at_home(part) if dataclasses.is_dataclass(part) else _home(part) if path else part for part in value
            )
        elif isinstance(value, str) and item.metadata["range"].path:
            changed[item.name] = _home(value)
    return dataclasses.replace(node, **changed)


def _home(path: str) -> str:
    """A path with the home directory for ~ or ~user at its beginning."""
    return os.path.expanduser(path)  # noqa: PTH111  (a Path would make another text of `./a`)


def restored(tree: Document) -> Config:
    """The config of a tree that `dump` wrote, perhaps in an older release. Raises ConfigError.

    The tree has every key of that release; a key that was added since gets its default, not the value of the preset that the tree names.
    """
    source = Tree(tree)
    _normalize_sections(source)
    return at_home(_build(source))


def load_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A config with some values replaced by `section.key=value`. Raises ConfigError."""
    tree = Tree(dataclasses.asdict(config))
    _normalize_sections(tree)
    _apply_overrides(tree, overrides)
    changed = _build(tree)
    for knob in knobs():
        if tree.places.get(knob.path) == COMMAND_LINE and (problem := knob.ignored(changed)):
            raise ConfigError(f"{COMMAND_LINE}: {problem}")
    return at_home(changed)


def dump(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """YAML of every value of `config`, each with its origin as a comment; `load` gives an equal config.

    A value without an origin is marked `default` if it equals the default, else `python`.
    """
    lines = ["# The whole configuration; each comment says where the value comes from."]
    group: tuple[str, ...] = ()
    for knob in knobs():
        within = knob.path[:-1]
        lines += [f"{'  ' * n}{within[n]}:" for n in range(len(within)) if within[: n + 1] != group[: n + 1]]
        group, value = within, knob.of(config)
        origin = (origins or {}).get(knob.key, DEFAULT if value == knob.default else "python")
        # A file name may hold a line break, which would end the comment.
        shown = origin if origin.isprintable() else ascii(origin)
        lines.append(f"{'  ' * len(within)}{knob.path[-1]}: {_render(value)}  # {shown}")
    return "\n".join(lines) + "\n"


# --- sections and overrides ---------------------------------------------------------------------------------------------------


def _normalize_sections(tree: Tree) -> None:
    """Make the root a mapping of known sections to mappings; null (a section whose keys are commented out) becomes empty."""
    sections = fields_of(_schema(tree))
    if not isinstance(tree.root, Mapping):
        place = tree.place(()) or "config"
        found = _describe(tree.root)
        raise ConfigError(
            f"{place}: the config is {found}, not a mapping. Its top level has the sections {', '.join(sections)}."
        )
    root = {}
    for section, values in tree.root.items():
        if section not in sections:
            _fail(tree, (section,), f"is an unknown section. {_suggest_section(_schema(tree), str(section))}")
        if values is not None and not isinstance(values, Mapping):
            _fail(tree, (section,), f"is {_describe(values)}, not a mapping. Write its keys indented below `{section}:`.")
        root[section] = dict(values or {})
    tree.root = root


def _apply_overrides(tree: Tree, overrides: Iterable[str]) -> None:
    """Put each `section.key=value` into the tree. Raises ConfigError for one that is malformed or given twice."""
    seen: dict[Path, str] = {}
    for text in overrides:
        path, value = _read_override(_schema(tree), text)
        if path in seen:
            raise ConfigError(
                f"{COMMAND_LINE}: {dotted(path)} is given twice, as {seen[path]!r} and {text!r}. Keep one of them."
            )
        seen[path] = text
        _replace(tree, path, value)


def _read_override(schema: Any, text: str) -> tuple[tuple[str, ...], Tree]:
    """`section.key=value`, or `section.group.key=value`, as the path (section, ..., key) and the tree of the value."""
    key, equals, value = text.partition("=")
    section, _, name = key.strip().partition(".")
    here = f"{COMMAND_LINE}: {text!r}"
    if not equals:
        raise ConfigError(f"{here} has no `=`. Write section.key=value, for example optim.lr=1e-3.")
    if section not in fields_of(schema):
        raise ConfigError(f"{here}: {section!r} is an unknown section. {_suggest_section(schema, section)}")
    *groups, last = name.split(".")
    inner = fields_of(schema)[section]
    for group in groups:
        inner = fields_of(inner).get(group) if inner is not None else None
        inner = inner if dataclasses.is_dataclass(inner) else None
    if not name or inner is None:
        what = "goes deeper than a key" if name else "is a whole section"
        example = f"{section}.{name.partition('.')[0] or 'key'}=value"
        raise ConfigError(f"{here}: {key} {what}. Set one key at a time, as {example}.")
    path = (section, *groups, last)
    return path, read_text(value, here, lambda mark: here, root=path)


def _replace(tree: Tree, path: tuple[str, ...], new: Tree) -> None:
    """Replace what `tree` has at `path` (section, ..., key) by the value of `new`, whose paths begin with `path`."""
    tree.places = {at: place for at, place in tree.places.items() if at[: len(path)] != path} | new.places
    tree.places[path] = COMMAND_LINE
    *groups, name = path
    target = tree.root
    for number, group in enumerate(groups):
        if not isinstance(target.setdefault(group, {}), dict):
            _fail(
                tree,
                tuple(groups[: number + 1]),
                f"is {_describe(target[group])}, not a mapping, so {dotted(path)} cannot be set",
            )
        target = target[group]
    target[name] = new.root


def _filled(tree: Tree, shapes: Shapes | None) -> Config:
    """The config of a tree, completed by the keys of its preset, of model.init_from and of its family.

    A completed key that has no effect beside the given keys is left at its default: it is not the user's mistake, and the saved config then
    loads again as it is.
    """
    given = set(tree.root.setdefault("model", {}))
    _apply_preset(tree)
    _apply_shapes(tree, shapes)
    _apply_family(tree)
    config = _build(tree)
    while idle := [
        knob.path
        for knob in knobs()
        if knob.section == "model" and knob.name in set(tree.root["model"]) - given and knob.idle(config)
    ]:
        for section, name in idle:
            del tree.root[section][name]
            del tree.places[section, name]
        config = _build(tree)
    return config


def _apply_preset(tree: Tree) -> None:
    """Add the keys of model.preset that the config does not give. Raises ConfigError for an unknown preset."""
    name = tree.root["model"].get("preset")
    if not isinstance(name, str):
        return
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        did_you_mean = f" Did you mean {near[0]}?" if near else ""
        _fail(tree, ("model", "preset"), f"is {name!r}; expected one of {', '.join(PRESETS)}.{did_you_mean}")
    chosen = tree.places.get(("model", "preset")) == COMMAND_LINE
    if chosen and PRESETS[name].keys() <= tree.root["model"].keys():
        _fail(
            tree,
            ("model", "preset"),
            f"{name} has no effect: the file gives each of its keys itself, as the config.yaml of a run does. Leave it out, or take the "
            "keys of `model` out of the file.",
        )
    _fill_model(tree, PRESETS[name], f"preset {name}")


def _apply_shapes(tree: Tree, shapes: Shapes | None) -> None:
    """Add the keys read at model.init_from that neither the config nor its preset gives."""
    path = tree.root["model"].get("init_from")
    if shapes is not None and isinstance(path, str):
        _fill_model(tree, shapes(_home(path)), f"init_from {path}")


def _apply_family(tree: Tree) -> None:
    """Add the keys of model.family that nothing else gives."""
    family = tree.root["model"].get("family")
    if isinstance(family, str):
        _fill_model(tree, FAMILIES.get(family, {}), f"family {family}")


def _fill_model(tree: Tree, keys: Mapping[str, Any], origin: str) -> None:
    """Add `keys` to the model section, except those that it has."""
    model = tree.root["model"]
    for key, value in keys.items():
        if key not in model:
            model[key] = value
            tree.places["model", key] = origin


# --- values -------------------------------------------------------------------------------------------------------------------


def _schema(tree: Tree) -> Any:
    """The dataclass of sections that a tree shall be."""
    return tree.schema or Config


def _build(tree: Tree) -> Any:
    """The config of a tree that passed `_normalize_sections`."""
    schema = _schema(tree)
    sections = {
        section: _dataclass(tree, (section,), cls, tree.root.get(section, {})) for section, cls in fields_of(schema).items()
    }
    return schema(**sections)


def _dataclass(tree: Tree, path: Path, cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance of `cls` from a mapping of its fields. Raises ConfigError for an unknown key."""
    kinds = fields_of(cls)
    for name in values:
        if name not in kinds:
            _fail(tree, (*path, name), f"is an unknown key. {_suggest_key(_schema(tree), path, str(name), list(kinds))}")
    return cls(**{name: _convert(tree, (*path, name), kinds[name], value) for name, value in values.items()})


def _convert(tree: Tree, path: Path, kind: Any, value: Any) -> Any:
    """`value` as the type of its field. Raises ConfigError if it is of another type."""
    expected = kind
    if is_optional(kind):
        kind, *others = typing.get_args(kind)
        if type(value) in others:  # null, or another member of the union
            return value
    if dataclasses.is_dataclass(kind):
        return _corpus(tree, path, value) if kind is CorpusConfig else _group(tree, path, kind, value)
    if typing.get_origin(kind) is Literal:
        return _literal(tree, path, typing.get_args(kind), value)
    if typing.get_origin(kind) is tuple:
        return _tuple(tree, path, kind, value, expected)
    if kind is float:
        return _float(tree, path, value, expected)
    if type(value) is not kind:  # exactly: a bool is an int to isinstance
        _fail_type(tree, path, value, expected, _hint(kind, value))
    return value


def _group(tree: Tree, path: Path, kind: Any, value: Any) -> Any:
    """A group of keys within a section; null (all of them commented out) is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        where = f"as {type_name(kind)}" if isinstance(path[-1], int) else f"indented below `{path[-1]}:`"
        _fail(tree, path, f"is {_describe(value)}, not a mapping. Write its keys {where}.")
    return _dataclass(tree, path, kind, value or {})


def _float(tree: Tree, path: Path, value: Any, expected: Any) -> float:
    exponent = isinstance(value, str) and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+", value)
    if type(value) not in (int, float) and not exponent:
        _fail_type(tree, path, value, expected, _hint(float, value))
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        shown = str(value)
        _fail(
            tree,
            path,
            f"is {shown if len(shown) <= 60 else shown[:57] + '...'}; expected a finite number.{_example(tree, path)}",
        )
    return number


def _literal(tree: Tree, path: Path, allowed: tuple[Any, ...], value: Any) -> Any:
    if any(type(value) is type(choice) and value == choice for choice in allowed):
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in allowed], n=1)
    did_you_mean = f" Did you mean {near[0]}?" if near and isinstance(value, str) and near[0] != value else ""
    _fail(tree, path, f"is {_describe(value)}; expected one of {', '.join(map(str, allowed))}.{did_you_mean}")


def _tuple(tree: Tree, path: Path, kind: Any, value: Any, expected: Any) -> tuple[Any, ...]:
    items = typing.get_args(kind)
    if items[0] is CorpusConfig and isinstance(value, str):
        value = [value]
    if items[0] is CorpusConfig and isinstance(value, Mapping):
        if path == ("data", "valid") and "path" not in value:
            return _named_sets(tree, path, kind, value)
        _fail(tree, path, "is a mapping; expected a list of {path, weight}, as [{path: PREFIX, weight: 1.0}].")
    if (named := value_of_names(kind)) and isinstance(value, Mapping):
        return tuple(
            (_convert(tree, path, str, name), _convert(tree, (*path, name), named, part)) for name, part in value.items()
        )
    if not isinstance(value, (list, tuple)):
        element = items[-1] is Ellipsis and (type(value) is items[0] or value in typing.get_args(items[0]))
        _fail_type(tree, path, value, expected, f" Write [{value}]." if element else "")
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        _fail(tree, path, f"has {len(value)} values, expected {len(items)}: {type_name(expected)}.{_example(tree, path)}")
    return tuple(_convert(tree, (*path, i), item, part) for i, (item, part) in enumerate(zip(items, value, strict=True)))


def _named_sets(tree: Tree, path: Path, kind: Any, value: Mapping[str, Any]) -> tuple[Any, ...]:
    """Validation sets {name: corpora} as one list; each corpus carries the name of its set."""
    corpora: list[CorpusConfig] = []
    for name, members in value.items():
        if not name:
            _fail(tree, path, "names a validation set with empty text. Use for example {web: PREFIX, code: PREFIX}.")
        corpora += [dataclasses.replace(corpus, set=name) for corpus in _tuple(tree, (*path, name), kind, members, kind)]
    return tuple(corpora)


def _corpus(tree: Tree, path: Path, value: Any) -> CorpusConfig:
    if isinstance(value, str):
        return CorpusConfig(path=value)
    if not isinstance(value, Mapping):
        _fail(tree, path, f"is {_describe(value)}; expected a path or {{path, weight}}.")
    if "path" not in value:
        _fail(tree, path, "has no path. Write {path: PREFIX, weight: 1.0}.")
    corpus: CorpusConfig = _dataclass(tree, path, CorpusConfig, value)
    return corpus


# --- messages -----------------------------------------------------------------------------------------------------------------


def _fail(tree: Tree, path: Path, message: str) -> typing.NoReturn:
    """Raise ConfigError with place, full path and message."""
    place = tree.place(path)
    raise ConfigError(f"{place + ': ' if place else ''}{dotted(path)} {message}")


def _fail_type(tree: Tree, path: Path, value: Any, expected: Any, hint: str) -> typing.NoReturn:
    """Raise ConfigError for a value that is not of the type `expected`, with `hint` or else the knob's example."""
    _fail(tree, path, f"is {_describe(value)}; expected {type_name(expected)}.{hint or _example(tree, path)}")


def _example(tree: Tree, path: Path) -> str:
    """A value of the knob at a path, or of that element of it, as advice; "" where all that is known is null or an empty list."""
    *keys, last = path
    use = next((knob.use for knob in knobs(_schema(tree)) if knob.path in (path, tuple(keys))), None)
    if isinstance(last, int):
        use = use[last] if isinstance(use, tuple) and last < len(use) else None
    return "" if use in (None, ()) else f" Use for example {show(use)}."


def _describe(value: Any) -> str:
    """A value as short text for messages: `the text '8'`."""
    if value is None:
        return "null"
    words = {bool: "the truth value", int: "the integer", float: "the number", str: "the text"}
    if type(value) not in words:
        return (
            "a mapping"
            if isinstance(value, Mapping)
            else "a list"
            if isinstance(value, (list, tuple))
            else f"a Python {type(value).__name__}"
        )
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{words[type(value)]} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _hint(kind: Any, value: Any) -> str:
    """How to write `value` so that it is of type `kind`; "" where that cannot be guessed."""
    if kind is str and isinstance(value, (bool, int, float)):
        return " Put text in quotes."
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f" Write {int(value)}."
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", value):
        return f" Write {value} without quotes."
    return ""


def _suggest_section(schema: Any, name: str) -> str:
    """Advice for an unknown section: one with a similar name, or the section of a key with that name, or all sections."""
    sections = list(fields_of(schema))
    if near := difflib.get_close_matches(name, sections, n=1):
        return f"Did you mean {near[0]}? Sections: {', '.join(sections)}."
    if owner := [knob.section for knob in knobs(schema) if knob.name == name]:
        return f"The key {name} belongs under `{owner[0]}:`, as {owner[0]}.{name}."
    return f"Sections: {', '.join(sections)}."


def _suggest_key(schema: Any, path: Path, name: str, known: list[str]) -> str:
    """Advice for an unknown key: a key of that name in another section, or one of the same section with a similar name, or all its keys."""
    if len(path) == 1:
        for knob in knobs(schema):
            if knob.name == name:
                return f"Did you mean {knob.key}?"
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"Did you mean {dotted((*path, near[0]))}?"
    return f"Known keys{' of ' * bool(path)}{dotted(path)}: {', '.join(known)}."


# --- rendering ----------------------------------------------------------------------------------------------------------------


def _render(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, CorpusConfig | WeightsConfig):
        given = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        default = {
            item.name: item.default for item in dataclasses.fields(value) if item.name not in ("path", "weight", "weights")
        }
        parts = {name: dict(part) if name == "weights" else part for name, part in given.items()}
        return _render({name: part for name, part in parts.items() if part != default.get(name, ...)})
    if dataclasses.is_dataclass(value):
        keys = (f"{item.name}: {_render(getattr(value, item.name))}" for item in dataclasses.fields(value))
        return f"{{{', '.join(keys)}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_render(name)}: {_render(part)}' for name, part in value.items())}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_render, value))}]"
    plain = not isinstance(value, str) or _reads_as_itself(value)
    text = yaml.safe_dump(value, default_style=None if plain else '"', width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _reads_as_itself(text: str) -> bool:
    """Whether YAML reads `text` without quotes as that same text, within brackets too."""
    looks_plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) is not None
    return looks_plain and yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
