"""Refuses documents that have passages of evaluation sets (GPT-3, arXiv:2005.14165, appendix C): else a model is asked what it has read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.corpus.document import Document, Step, Tally
from megatrain.corpus.duplicates.minhash import Hash64
from megatrain.corpus.duplicates.parameters import LeakConfig, LeakSet
from megatrain.corpus.duplicates.passages import Lengths, Passages, Worded
from megatrain.data.prepare.unpack import PackedDamageError, UnpackError, UnpackLimits, unpacked
from megatrain.files import OneLine, brief, doing, not_utf8, opened_plain
from megatrain.untrusted import parse_json

MOST_BYTES = 1 << 30
"""Most bytes of a file of an evaluation set."""
LEAKS = "leaks."
"""Beginning of the names of the rules."""
_LINES = (".jsonl", ".ndjson", ".json")
_PACKED = {".gz": "gz", ".zst": "zst"}


class LeakError(OneLine, ValueError):
    """An evaluation set that cannot be used; the message names the file and what to do."""


def leaks_step(settings: LeakConfig) -> Step:
    """A step that refuses documents with passages of evaluation sets, and scores them with their number.

    It needs some 20 bytes for each word of the sets. Raises OSError; LeakError for a set that has no text or cannot be read.
    """
    lengths = Lengths.of(settings.words, settings.characters, settings.shortest)
    names = [one.name for one in settings.sets]
    if len(set(names)) < len(names):
        raise LeakError(f"two of dedup.leaks.sets have one name, among {', '.join(names)}: give each a name of its own")
    long: list[tuple[Hash64, int, int, int]] = []
    short: list[tuple[Hash64, int, int, int]] = []
    for number, one in enumerate(settings.sets):
        found = 0
        for text in examples(one):
            example = Worded.of(text, lengths)
            if example.length >= lengths.passage:
                long.append((example.passages(lengths.passage), number, 0, 0))
                found += len(long[-1][0])
            elif example.length >= lengths.shortest and example.says_something:
                short.append((example.beginning(lengths.shortest), number, len(example.hashes), example.whole))
                found += 1
        if not found:
            raise LeakError(
                f"the set {one.name} of dedup.leaks.sets has no text of {settings.shortest} words and more, half of them "
                f"different ones with a letter, in {', '.join(one.files)}: nothing could be found. Look at its files and "
                "fields, or take dedup.leaks.shortest=4"
            )
    return _Leaks(settings, lengths, Passages.made(long), Passages.made(short))


class _Leaks:
    """The step."""

    def __init__(self, settings: LeakConfig, lengths: Lengths, long: Passages, short: Passages) -> None:
        self._settings, self._lengths, self._long, self._short = settings, lengths, long, short
        self._rules = [f"{LEAKS}{one.name}" for one in settings.sets]

    def __call__(self, document: Document, tally: Tally) -> Collection[str]:
        matches = np.zeros(len(self._rules), np.int64)
        if not self._rules:
            return ()
        text = Worded.of(document.text, self._lengths)
        passages = self._long.add_matches(text, self._lengths.passage, matches)
        if len(self._short.keys):
            self._short.add_matches(text, self._lengths.shortest, matches)
        least = max(self._settings.matches, self._settings.share * max(passages, 1))
        for rule, found in zip(self._rules, matches.tolist(), strict=True):
            if found:
                document.scores[rule] = float(found)
        return [rule for rule, found in zip(self._rules, matches.tolist(), strict=True) if found >= least]


def examples(one: LeakSet) -> Iterator[str]:
    """The texts of an evaluation set. Raises OSError and LeakError."""
    if not one.files:
        raise LeakError(f"the set {one.name} of dedup.leaks.sets has no files. Give them: files: [eval/{one.name}.jsonl]")
    for name in one.files:
        path = Path(name)
        form = path.with_suffix("") if path.suffix in _PACKED else path
        text = _contents(path)
        if form.suffix in _LINES:
            yield from _texts(_rows(text, path, form.suffix == ".json"), one, path)
        else:
            yield from text.split("\n\n")
            yield from text.split("\n")


def _contents(path: Path) -> str:
    """The text of a file, unpacked. Raises OSError and LeakError."""
    with doing("reading", path), opened_plain(path) as file:
        try:
            packed = _PACKED.get(path.suffix)
            data = b"".join(unpacked(file, packed, UnpackLimits(made=MOST_BYTES))) if packed else file.read(MOST_BYTES + 1)
        except (UnpackError, PackedDamageError) as error:
            raise LeakError(f"{path}: {error}") from None
    if len(data) > MOST_BYTES:
        raise LeakError(
            f"{path} has more than {MOST_BYTES:,} bytes, more than an evaluation set has. Split it into several files"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LeakError(not_utf8(data[:4096], str(path), error, f"byte {error.start:,} of the file")) from None


def _rows(text: str, path: Path, may_be_one: bool) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place. may_be_one: whether the file may be one value, an object or an array of rows."""
    one = _one(text) if may_be_one else None
    if one is not None:
        rows = one if isinstance(one, list) else [one]
        yield from ((f"{path}, element {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _one(text: str) -> Any:
    """The value of a whole text; None if it is not one."""
    try:
        return parse_json(text, MOST_BYTES, unique=False)
    except ValueError:
        return None


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text, unique=False)
    except ValueError as error:
        raise LeakError(
            f"{where}: not JSON ({brief(error)}). A .jsonl has one object a line; name a file of plain text .txt"
        ) from None


def _texts(rows: Iterator[tuple[str, Any]], one: LeakSet, path: Path) -> Iterator[str]:
    """The texts of rows. Raises LeakError for fields that none has."""
    found = set[str]()
    for where, row in rows:
        if not one.fields:
            yield from _strings(row)
            continue
        if not isinstance(row, dict):
            raise LeakError(
                f"{where}: a JSON {type(row).__name__}, not an object, so it has no fields: take {one.name}.fields away"
            )
        for key in one.fields:
            if key in row:
                found.add(key)
                yield from _strings(row[key])
    if missing := [key for key in one.fields if key not in found]:
        raise LeakError(f"{path}: no row has the field {missing[0]!r} of the set {one.name} of dedup.leaks.sets")


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, with halves of surrogate pairs replaced."""
    if isinstance(value, str):
        yield value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
