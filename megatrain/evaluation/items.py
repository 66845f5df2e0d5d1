"""The items of a task: a .jsonl file with an object a line, of which any error names file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from megatrain.files import HEAD_BYTES, OneLine, not_text
from megatrain.untrusted import parse_json, read_plain

LARGEST_ITEMS = 1 << 30
"""Bytes of a file of items."""
_MOST_BRACKETS = 1 << 16


class TaskError(OneLine, ValueError):
    """A task, or an item of it, that cannot be asked; the message names file and line and says what to change."""


@dataclass(frozen=True)
class Item:
    """One item of a task."""

    file: str
    line: int
    """In its file, counted from 1."""
    fields: Mapping[str, Any]

    @cached_property
    def identity(self) -> str:
        """A hash of the fields, whatever their order."""
        text = json.dumps(self.fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def refuse(self, said: str) -> NoReturn:
        """Raise TaskError about this item."""
        raise TaskError(f"{self.file}:{self.line}: {said}")


def read_items(path: Path, limit: int | None = None) -> tuple[Item, ...]:
    """The items of a .jsonl file, or the first `limit`. Raises TaskError."""
    name = str(path)
    try:
        data = read_plain(path, LARGEST_ITEMS)
    except FileNotFoundError:
        raise TaskError(f"{name}: no such file of items. Paths in a task's file start at that file's folder.") from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if said := not_text(data[:HEAD_BYTES]):
        raise TaskError(f"{name}: {said}.")
    items: list[Item] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if limit is not None and len(items) == limit:
            break
        if line.strip():
            items.append(Item(name, number, _object(line, f"{name}:{number}")))
    if not items:
        raise TaskError(f'{name} has no items. Write a JSON object a line, for example {{"question": "...", "answer": "..."}}.')
    return tuple(items)


def _object(line: bytes, place: str) -> dict[str, Any]:
    """The object on a line."""
    try:
        found = parse_json(line.decode(), _MOST_BRACKETS)
    except UnicodeDecodeError as error:
        raise TaskError(f"{place}: byte {error.start} of the line is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise TaskError(f"{place}: the line is not JSON: {error.msg} at character {error.pos + 1}.") from None
    except ValueError as error:
        raise TaskError(f"{place}: the line cannot be read: {error}.") from None
    if b"\\ud" in line.lower():  # most such are halves of a whole character
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise TaskError(f"{place}: the line has half of a character (a lone surrogate), which is no text.") from None
    if not isinstance(found, dict):
        raise TaskError(f'{place}: the line is no object. Write {{"question": "...", "answer": "..."}}, one a line.')
    return found
