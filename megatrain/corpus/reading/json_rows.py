"""Documents of files with a row of JSON a line. A row that is broken costs itself alone; what can be mended is, and is counted.

orjson reads nearly every row; one that it refuses is looked at again by what says why and reads more: bytes that are no text, halves of
surrogate pairs, NULs, a byte-order mark within the file (of files put together), NaN and raw tabs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatrain.corpus.document import Document
from megatrain.corpus.reading.encoded import decoded, decoded_chunks, has_halves, said_of, without_halves
from megatrain.corpus.reading.file_reading import FileReading
from megatrain.data.prepare.lines import lines_of
from megatrain.data.prepare.read import MOST_VALUES_BYTES, is_mostly_text, one_a_line
from megatrain.extras import need
from megatrain.files import brief

Where = Callable[[], str]
_NOTHING = object()
DEEPEST = 100
"""Lists and objects within each other that a field may have: what writes documents takes 250."""


def row_documents(reading: FileReading) -> Iterator[Document]:
    """The documents of a part of a file of rows, in order. Raises ReadError with on_error=stop, and ChangedError."""
    encoding, chunks = decoded_chunks(reading)
    rows = _Rows(reading, encoding)
    for number, at, line in lines_of(chunks, reading.settings.longest):
        if at == 0 and reading.part.start:
            continue  # the end of a line that belongs to the part before
        if reading.ended == "broken":
            break  # the file ends within a line
        begin = reading.before + at

        def where(number: int = number, begin: int = begin) -> str:
            return reading.line(number, begin)

        if line is None:
            most = reading.settings.longest
            reading.refuse(
                "read.too_long", where, f"the line has more than {most:,} bytes. If it is meant, raise read.longest."
            )
        elif (row := rows.row(line, where)) is not None and (text := rows.text(row, where)) is not None:
            yield reading.document(text, begin, rows.marks(row))


class _Rows:
    """Reads rows of one file."""

    def __init__(self, reading: FileReading, encoding: str) -> None:
        self._reading, self._encoding = reading, encoding
        self._key = reading.source.key
        self._keys = (self._key, *reading.source.keep)
        self._quoted = [json.dumps(key, ensure_ascii=False).encode(encoding, "replace") for key in self._keys]
        self._escaped = [re.compile(_escaped(key, encoding)) for key in self._keys]
        self._loads = need("orjson", "reading .jsonl", "data").loads

    def row(self, line: bytes, where: Where) -> dict[str, Any] | None:
        """The object of a line, None for one that cannot be read, which is counted."""
        reading = self._reading
        if len(line) > MOST_VALUES_BYTES and not is_mostly_text(line):
            said = f"more than {MOST_VALUES_BYTES:,} bytes of the line are no text but other values."
            reading.refuse("read.many_values", where, said)
            return None
        try:
            row = self._loads(line if self._encoding == "utf-8" else line.decode(self._encoding))
        except ValueError:
            if (row := self._mended(line, where)) is _NOTHING:
                return None
        if not isinstance(row, dict):
            said = f"a JSON {type(row).__name__}, not an object. {one_a_line(line, self._key)}"
            reading.refuse("read.no_object", where, said)
            return None
        return row if self._is_usable(row, line, where) else None

    def _is_usable(self, row: dict[str, Any], line: bytes, where: Where) -> bool:
        """Whether the keys of interest are there once and not too deep; counts what is not."""
        reading = self._reading
        if deep := next((key for key in self._keys if _is_deep(row.get(key))), None):
            said = f"the value of {deep!r} has more than {DEEPEST} lists and objects within each other."
            reading.refuse("read.deep_value", where, said)
            return False
        try:
            twice = self._twice(line) if self._may_be_twice(line) else None
        except RecursionError:  # orjson reads what is deeper
            said = "more lists and objects within each other than can be looked through for a key that is there twice."
            reading.refuse("read.deep_value", where, said)
            return False
        if twice is not None:
            reading.refuse("read.duplicate_key", where, f"the key {twice!r} is there twice. Which of them counts?")
            return False
        return True

    def _may_be_twice(self, line: bytes) -> bool:
        """Whether the name of a key of interest is in a line twice, as it is or with escapes (\\u0074ext)."""
        return any(line.count(key) > 1 for key in self._quoted) or (
            b"\\" in line and any(len(key.findall(line)) > 1 for key in self._escaped)
        )

    def text(self, row: dict[str, Any], where: Where) -> str | None:
        """The text of a row, None where there is none, which is counted."""
        reading, key = self._reading, self._key
        text = row.get(key)
        if isinstance(text, str):
            if nuls := text.count("\0"):
                if not reading.may_mend("read.nul", where, f"{nuls:,} NULs."):
                    return None
                text = text.replace("\0", "")
            if text:
                return text
            reading.count("read.empty")
        elif key in row:
            reading.refuse("read.no_string", where, f"the value of {key!r} is {type(text).__name__}, not a string.")
        else:
            listed = brief(", ".join(map(repr, list(row)[:8])) or "none")
            said = f"there is no key {key!r}; the row has {listed}. Say in `key:` of {reading.source.name} which is the text."
            reading.refuse("read.no_key", where, said)
        return None

    def _mended(self, line: bytes, where: Where) -> Any:
        """The value of a line that orjson does not read; _NOTHING for one that cannot be read, which is counted."""
        reading = self._reading
        text, broken = decoded(line, self._encoding)
        if broken is not None and not reading.may_mend("read.invalid_text", where, said_of(broken, self._encoding)):
            return _NOTHING
        text = text.removeprefix("\ufeff")
        if nuls := text.count("\0"):
            if not reading.may_mend("read.nul", where, f"{nuls:,} NULs in the line."):
                return _NOTHING
            text = text.replace("\0", "")
        if not text.strip():
            return _NOTHING
        try:
            row = json.loads(text, strict=False, parse_int=_number)
        except (ValueError, RecursionError) as error:
            reading.refuse("read.no_json", where, f"not JSON ({brief(error)}). {one_a_line(line, self._key)}")
            return _NOTHING
        kept = {key: row[key] for key in self._keys if key in row} if isinstance(row, dict) else {}
        if not any(map(_is_deep, kept.values())) and has_halves(kept):
            said = "half of a surrogate pair (\\ud800..\\udfff), which is not a character."
            if not reading.may_mend("read.lone_surrogate", where, said):
                return _NOTHING
            row.update(without_halves(kept))
        return row

    def _twice(self, line: bytes) -> str | None:
        """A key of interest that the object of a line has twice. Raises RecursionError."""
        keys: list[str] = []

        def hook(pairs: list[tuple[str, Any]]) -> None:
            keys[:] = [key for key, _ in pairs]  # the outermost object comes last

        text = decoded(line, self._encoding)[0].removeprefix("\ufeff").replace("\0", "")
        json.loads(text, strict=False, parse_int=_number, object_pairs_hook=hook)
        return next((key for key in self._keys if keys.count(key) > 1), None)

    def marks(self, row: dict[str, Any]) -> dict[str, Any]:
        """The further fields that go with the document."""
        return {key: row[key] for key in self._keys[1:] if key in row}


def _escaped(key: str, encoding: str) -> bytes:
    """A regular expression for a key between quotes, any letter of which may be escaped."""
    letters = []
    for letter in key:
        units = letter.encode("utf-16-be", "surrogatepass")
        numbers = b"".join(rb"\\u(?i:%04x)" % int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2))
        plain = re.escape(json.dumps(letter, ensure_ascii=False)[1:-1].encode(encoding, "replace"))
        letters.append(b"(?:%s|%s%s)" % (plain, numbers, rb"|\\/" if letter == "/" else b""))
    return b'"' + b"".join(letters) + b'"'


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are within each other more than DEEPEST times."""
    if not isinstance(value, (dict, list)):
        return False
    layer = [value]
    for _ in range(DEEPEST):
        layer = [
            part
            for outer in layer
            if isinstance(outer, (dict, list))
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return any(isinstance(part, (dict, list)) for part in layer)


def _number(digits: str) -> int | float:
    """An integer of JSON; a long one as orjson has it, since Python refuses those of over 4,300 digits."""
    return int(digits) if len(digits) < 20 else float(digits)
