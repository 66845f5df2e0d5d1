"""A file that is being read: its bytes, unpacked; what is broken in it; and whether it is still the file that was cut into units.

A problem costs a document or what is left of a file. With on_error=skip it is counted, and with on_error=stop an error. A file that changes
while it is read is an error in any case: what came of it is neither the old nor the new one, so its unit has to be done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from megatrain.corpus.document import PLACES, Document, Tally
from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.units import FilePart, compression_of
from megatrain.data.prepare.read import CHUNK_BYTES, ReadError
from megatrain.data.prepare.unpack import MOST_WINDOW, PackedDamageError, UnpackError, UnpackLimits, unpacked
from megatrain.files import opened_plain

T = TypeVar("T")
FARTHEST = 1 << 30
"""Bytes before a part that are read to tell the line of a problem in it; beyond, its byte is told."""


class ChangedError(ReadError):
    """A file was written to while it was read."""


class FileReading:
    """A part of a file that is being read, and where its problems go."""

    def __init__(
        self, source: SourceConfig, part: FilePart, settings: ReadConfig, tally: Tally, moves: Callable[[], None] = lambda: None
    ) -> None:
        """moves: is called now and then while the part is read, also where it gives no documents for long."""
        self.source, self.part, self.settings, self._tally, self._moves = source, part, settings, tally, moves
        self.before = max(part.start - 1, 0)
        """First byte that is read: the one before a range tells whether a line begins there."""
        self.ended: Literal["", "whole", "broken"] = ""
        """How `chunks` have ended, "" while there may be more; after "broken", what came last may be half of something."""

    # --- problems ---

    def note(self, name: str, where: str | Callable[[], str], said: str) -> None:
        """Count a problem that has been mended. where: `line 7`, or what finds it, which is asked where it will be shown."""
        self._moves()
        if callable(where):
            where = where() if len(self._tally.places.get(name, ())) < PLACES else ""
        self._tally.problem(name, self.part.file, where, said)

    def refuse(self, name: str, where: str | Callable[[], str], said: str) -> None:
        """Count a problem that costs a document. Raises ReadError with on_error=stop."""
        if self.settings.on_error == "stop":
            place = where() if callable(where) else where
            raise ReadError(
                f"{self.part.file}{', ' if place else ''}{place}: {said} With read.on_error=skip it is left out and counted."
            )
        self.note(name, where, said)

    def may_mend(self, name: str, where: str | Callable[[], str], said: str) -> bool:
        """Whether text that is broken may be mended; counts it as that, or else as a document that cannot be read. Raises ReadError."""
        mend = self.settings.broken_text == "replace"
        (self.note if mend else self.refuse)(name, where, said)
        return mend

    def count(self, name: str, number: int = 1) -> None:
        """Count what is no problem."""
        self._tally.count(name, number)

    def line(self, number: int, at: int) -> str:
        """A line's place in words. number: line ends between the first byte read and the line; at: its first byte."""
        if self.before > FARTHEST:
            return f"the line from byte {at}"
        return f"line {self._lines_before + number + 1}"

    @cached_property
    def _lines_before(self) -> int:
        """Line ends before the first byte that is read: counted once, and only where there is a problem to tell of."""
        found, left = 0, self.before
        with opened_plain(self.part.file) as file:
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                found += chunk.count(b"\n")
                left -= len(chunk)
        return found

    # --- documents ---

    def document(self, text: str, at: int, marks: dict[str, Any] | None = None) -> Document:
        """A document of this file."""
        language = "" if self.source.language == "auto" else self.source.language
        return Document(text, self.source.name, self.part.file, at, self.source.kind, language, marks=marks or {})

    # --- bytes ---

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the part, unpacked, in chunks, as `guarded` reads them."""
        for chunk in self.guarded(self._unpacked):
            self._moves()
            yield chunk

    def guarded(self, read: Callable[[BinaryIO], Iterator[T]]) -> Iterator[T]:
        """Read the open file; `ended` says afterwards how that ended.

        What breaks costs what is left of the file. Raises ReadError with on_error=stop, and ChangedError.
        """
        self.ended = ""
        try:
            with opened_plain(self.part.file) as file:
                if not self._is_same(os.fstat(file.fileno())):
                    self.refuse("read.changed", "", "the file was written to after the run began, and is left out.")
                    self.ended = "broken"
                    return
                if not self.part.size:
                    self.note("read.empty_file", "", "the file is empty.")
                    self.ended = "whole"
                    return
                yield from read(file)
                if not self._is_same(os.fstat(file.fileno())):
                    raise self._changed()
            self.ended = "whole"
        except PackedDamageError as error:
            kept = "it is left out" if self.part.form in ("text", "html") else "what comes before is kept"
            self._break("read.damaged", f"the file was cut short or is damaged ({error}); {kept}.")
        except UnpackError as error:
            self._break("read.bomb", f"the file {error}, or raise read.unpacked_ratio or read.unpacked_mib.")
        except OSError as error:
            self._break("read.unreadable", f"the file cannot be read: {error.strerror or error}.")

    def _changed(self) -> ChangedError:
        """The error for a file that is not what it was."""
        return ChangedError(
            f"{self.part.file} was written to while it was read. Run the same command again when it is complete."
        )

    def _is_same(self, found: os.stat_result) -> bool:
        """Whether a file has the size and time that it had when it was cut."""
        return (found.st_size, found.st_mtime_ns) == (self.part.size, self.part.time)

    def _break(self, name: str, said: str) -> None:
        self.ended = "broken"
        if Path(self.part.file).exists() and not self._is_same(Path(self.part.file).stat()):
            raise self._changed()
        self.refuse(name, "", said)

    def _unpacked(self, file: BinaryIO) -> Iterator[bytes]:
        """The bytes of an open file: of a compressed one all, of a range of lines those of the lines that begin in it."""
        if kind := compression_of(self.part.file):
            ratio, most = self.settings.unpacked_ratio, self.settings.unpacked_mib << 20
            yield from unpacked(file, kind[1:].lower(), UnpackLimits(ratio, most, MOST_WINDOW))
            return
        start, stop = self.part.start, self.part.stop
        file.seek(self.before)
        at, begun, last = self.before, start == 0, b""
        while at < stop and (chunk := file.read(min(CHUNK_BYTES, stop - at))):
            begun = begun or b"\n" in chunk
            at, last = at + len(chunk), chunk[-1:]
            yield chunk
        if stop == self.part.size or not begun or last == b"\n":
            return
        while chunk := file.read(CHUNK_BYTES):  # the rest of the line that has begun
            end = chunk.find(b"\n")
            yield chunk if end < 0 else chunk[:end]
            if end >= 0:
                return
