"""YAML text as a plain tree that keeps the place of each part, so that every error can name file and line.

Reads only what a config needs: one document of mappings with plain keys, lists and scalars. Tags, anchors and aliases are refused before
any object is built (no object construction, no alias bombs). Duplicate keys are errors, and so are the surprises of YAML 1.1: `010` is not
8, `1:30` is not 90; a date stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from megatrain.files import HEAD_BYTES, OneLine, not_text, opened_plain

LARGEST_FILE = 1 << 18
"""Bytes. A config has a few thousand; the limit keeps a checkpoint or corpus given by mistake from being read."""

DEEPEST = 16
"""Levels of nesting; the schema needs four."""

Path = tuple[str | int, ...]
"""Keys and list indices from the root: ("data", "train", 0, "path")."""


class ConfigError(OneLine, ValueError):
    """A config that cannot be used. The message says what is wrong, where, and which value would work."""


@dataclass
class Tree:
    """A plain tree of mappings, lists and scalars, and the place in the source of its parts."""

    root: Any = None
    places: dict[Path, str] = field(default_factory=dict)
    """`file:line`, `command line` ... of every key and list element; empty for a tree made in Python."""
    schema: Any = None
    """The dataclass of sections that it shall be; None: that of a run."""

    def place(self, path: Path) -> str | None:
        """The place where `path` was written, or else of the nearest part of the tree around it."""
        return next((self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places), None)


def dotted(path: Path) -> str:
    """A path as messages show it: data.train[0].path."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def read_file(path: str | FilePath, advice: str = "Write at least one section, for example `data: {train: PREFIX}`") -> Tree:
    """The tree of a YAML file. Raises ConfigError for anything that is not one whole, readable, non-empty text file of YAML.

    advice: what to write into a file that is empty.
    """
    name = str(path)
    try:
        with opened_plain(path) as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file (relative paths start at {FilePath.cwd()}).") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a directory. Give a YAML file in it.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        raise ConfigError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{name} has more than {LARGEST_FILE} bytes: this is not a config. Give a YAML file.")
    if said := not_text(data[:HEAD_BYTES]):
        raise ConfigError(f"{name}: {said}.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not text: byte {error.start} is not UTF-8. Give a YAML file in UTF-8.") from None
    if "\0" in text:
        raise ConfigError(f"{name} is a binary file (it has NUL bytes). Give a YAML file.")
    tree = read_text(text, name, lambda mark: f"{name}:{mark.line + 1}")
    if tree.root is None:
        raise ConfigError(f"{name} is empty. {advice}.")
    return tree


def read_text(text: str, name: str, locate: Callable[[yaml.Mark], str], root: Path = ()) -> Tree:
    """The tree of YAML text; every path begins with `root`. Raises ConfigError.

    `locate` turns a mark into text for messages; `name` stands in messages where no mark is known.
    """
    try:
        _refuse_yaml_machinery(text, locate)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ConfigError(f"{locate(mark) if mark else name}: this is not YAML: {what}.") from None
    tree = Tree()
    if node is not None:
        tree.root = _plain(node, root, tree, locate)
    return tree


def saved_values(text: str, name: str) -> dict[str, Any]:
    """The sections in YAML that a program has written, such as the config in a checkpoint; {} for an empty text. Raises ConfigError.

    It may come from anywhere, and is read no less strictly than a config of the user's. name: its place, for messages.
    """
    if len(text) > 4 * LARGEST_FILE:  # written out in full, with comments
        raise ConfigError(f"{name} has {len(text):,} letters: this is not a config.")
    found = read_text(text, name, lambda mark: f"{name}, line {mark.line + 1}").root
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{name} is no sections of keys.")
    return found or {}


def _refuse_yaml_machinery(text: str, locate: Callable[[yaml.Mark], str]) -> None:
    """Refuse tags, anchors, aliases and deep nesting, from the tokens alone, in time linear in the text."""
    kinds = {yaml.TagToken: "a YAML tag (!)", yaml.AnchorToken: "a YAML anchor (&)", yaml.AliasToken: "a YAML alias (*)"}
    opens = (yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
    closes = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if type(token) in kinds:
            place = locate(token.start_mark)
            raise ConfigError(
                f"{place}: {kinds[type(token)]} is not accepted in a config. Write the value out; put text in quotes."
            )
        depth += isinstance(token, opens) - isinstance(token, closes)
        if depth > DEEPEST:
            raise ConfigError(
                f"{locate(token.start_mark)}: nested more than {DEEPEST} levels deep. A config is sections of keys."
            )


def _plain(node: yaml.Node, path: Path, tree: Tree, locate: Callable[[yaml.Mark], str]) -> Any:
    """The plain value of a node; records the places of all its parts."""
    if path not in tree.places:
        tree.places[path] = locate(node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, tree, locate)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), tree, locate) for i, item in enumerate(node.value)]
    return _scalar(node.tag.rpartition(":")[2], node.value, locate(node.start_mark))


def _mapping(node: yaml.MappingNode, path: Path, tree: Tree, locate: Callable[[yaml.Mark], str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = locate(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{here}: a list or mapping cannot be a key. Write `key: value`.")
        key = key_node.value
        at = (*path, key)
        if key in values:
            raise ConfigError(f"{here}: {dotted(at)} is given twice, first at {tree.places[at]}. Keep one of them.")
        tree.places[at] = here
        values[key] = _plain(value_node, at, tree, locate)
    return values


def _scalar(kind: str, text: str, place: str) -> Any:
    """The value of a scalar that YAML 1.1 resolved to `kind`: numbers in decimal, null, true and false; all else is text."""
    if kind == "null":
        return None
    if kind == "bool":
        return yaml.SafeLoader.bool_values[text.lower()]
    if kind == "int":
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]{0,30})", text):
            raise ConfigError(
                f"{place}: {text[:40]} is not a plain decimal number. Write it in decimal, or in quotes if it is text."
            )
        return int(text.replace("_", ""))
    if kind == "float":
        if ":" in text:
            raise ConfigError(
                f"{place}: {text[:40]} is not a plain decimal number. Write it in decimal, or in quotes if it is text."
            )
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
