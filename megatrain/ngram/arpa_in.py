"""Reads ARPA files of any dialect (lmplz, SRILM, IRSTLM; also compressed by gzip, xz, bzip2 or Zstandard) into arrays.

    \\data\\          ngram 1=6 ...
    \\1-grams:       log10 p, word, log10 back-off (if missing: 0); separated by blanks or tabs
    ...
    \\end\\
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data.prepare.unpack import PackedDamageError, UnpackError, unpacked
from megatrain.files import HEAD_BYTES, OneLine, compression, not_text, opened_plain
from megatrain.ngram.optional import pyarrow
from megatrain.ngram.table import twins
from megatrain.ngram.text import SPECIAL, split

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 1 << 20
"""Bytes."""
HIGHEST_ORDER = 32
UNKNOWN_LOG10 = -100.0
"""log10 probability of an unknown word if the model gives none, as in KenLM."""
FURTHEST_DATA = 1000
"""The header must begin within this many lines; some tools write remarks before it."""
_LINE_FEED = 10
_COUNT = re.compile(rb"ngram\s+(\d{1,3})\s*=\s*(\d{1,18})")


class ArpaError(OneLine, ValueError):
    """A file that is not a whole ARPA file; the message says where."""


@dataclass
class Section:
    """The n-grams of one order."""

    words: npt.NDArray[np.uint32]
    """Word numbers [n, order]."""
    log10: npt.NDArray[np.float32]
    backoff: npt.NDArray[np.float32]
    line: int = 0
    """Line of the file that the first n-gram is on; the others follow, one on each line."""


@dataclass
class Arpa:
    """The contents of a file. Word numbers 0, 1, 2 are <unk>, <s>, </s>, whether the file has them or not."""

    words: Any
    """Words by number, a pyarrow large_binary array."""
    sections: list[Section]
    path: Path

    def twice(self, order: int, first: int, second: int) -> ArpaError:
        """The error if the n-grams of an order at two places are the same."""
        section = self.sections[order - 1]
        gram = b" ".join(self.words[int(number)].as_py() for number in section.words[first]).decode(errors="replace")
        return ArpaError(
            f"{self.path}:{section.line + second}: the {order}-gram `{gram}` is there twice, first in line {section.line + first}. "
            "A model gives each n-gram one probability: remove the wrong line, and count one less in the header."
        )


def read_arpa(path: Path) -> Arpa:
    """Read a file; its first bytes, not its name, say how it is compressed. Raises ArpaError or OSError."""
    with opened_plain(path) as file:
        head = file.peek(8)
        kind = next((kind for mark, kind in _COMPRESSED.items() if head.startswith(mark)), None)
        try:
            return _Reader(path, file if kind is None else _Chunks(unpacked(file, kind))).read()
        except PackedDamageError as error:
            raise ArpaError(f"{path} is cut short or damaged: {error}") from None
        except UnpackError as error:
            raise ArpaError(f"{path} {error}") from None


class _Chunks:
    """Reads from an iterator of bytes as from a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, size: int) -> bytes:
        """At least `size` bytes, fewer at the end."""
        found: list[bytes] = []
        while size > 0 and (chunk := next(self._chunks, b"")):
            found.append(chunk)
            size -= len(chunk)
        return b"".join(found)


_COMPRESSED = {b"\x1f\x8b": "gz", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst"}
"""First bytes of a compressed file -> its kind."""


class _Reader:
    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.line = 0
        self._rest, self._at = b"", 0  # what has been read, and where the next line begins in it

    def read(self) -> Arpa:
        counts = self._header()
        sections: list[Section] = []
        words: Any = None
        for order, count in enumerate(counts, 1):
            if order > 1:
                self._expect(b"\\%d-grams:" % order)
            line = self.line + 1
            texts, log10, backoff = self._section(order, count)
            if order == 1:
                words, section = self._unigrams(texts, log10, backoff, line)
            else:
                numbers = pyarrow().compute.index_in(texts.cast(pyarrow().large_binary()), words)
                if numbers.null_count:
                    lost = texts.filter(numbers.is_null())[0].as_py()
                    at = line + pyarrow().compute.index(numbers.is_null(), True).as_py() // order
                    raise ArpaError(f"{self.path}:{at}: a {order}-gram has the word {lost!r}, which is not among the 1-grams")
                section = Section(numbers.to_numpy().astype(np.uint32).reshape(-1, order), log10, backoff, line)
            sections.append(section)
        self._expect(b"\\end\\")
        return Arpa(words, sections, self.path)

    def _next(self) -> bytes:
        """The next line without its end. Raises ArpaError at the end of the file."""
        while (end := self._rest.find(b"\n", self._at)) < 0:
            if not self._more() and self._at == len(self._rest):
                raise ArpaError(f"{self.path} ends after line {self.line}, before \\end\\: it is cut short")
        line, self._at = self._rest[self._at : end], end + 1
        self.line += 1
        return line.strip()

    def _more(self) -> bool:
        """Read on; the last line gets an end if it has none. Returns whether there was more. Raises ArpaError for too long a line."""
        self._rest, self._at = self._rest[self._at :], 0
        if len(self._rest) > LONGEST_LINE:
            raise ArpaError(
                f"{self.path}:{self.line + 1}: a line of more than {LONGEST_LINE:,} bytes, beginning with {self._rest[:60]!r}, is no n-gram"
            )
        data = self.file.read(BLOCK_BYTES)
        self._rest += data or (b"\n" if self._rest else b"")
        return bool(data)

    def _header(self) -> list[int]:
        self._rest = self.file.read(BLOCK_BYTES)
        if inner := compression(self._rest):
            raise ArpaError(f"{self.path} is compressed by {inner[0]}, which is not read here. Unpack it: {inner[1]}")
        if said := not_text(self._rest[:HEAD_BYTES]):
            raise ArpaError(f"{self.path}: {said}")
        self._rest = self._rest.removeprefix(codecs.BOM_UTF8)
        head = self._rest.split(b"\n", FURTHEST_DATA)[:FURTHEST_DATA]
        if b"\\data\\" not in [line.strip() for line in head]:
            first = next((line.strip() for line in head if line.strip()), b"")
            begins = f"it begins with {first[:60]!r}" if first else "it is empty"
            raise ArpaError(
                f"{self.path}: there is no \\data\\ in the first {FURTHEST_DATA} lines: this is no ARPA file ({begins}). "
                "Give one, or a model that `megatrain ngram compile` made."
            )
        while self._next() != b"\\data\\":
            pass
        counts: list[int] = []
        while (line := self._next()) != b"\\1-grams:":
            found = _COUNT.fullmatch(line)
            if found and int(found[1]) == len(counts) + 1 <= HIGHEST_ORDER:
                counts.append(int(found[2]))
            elif line:
                raise ArpaError(
                    f"{self.path}:{self.line}: {line[:60]!r} where a count such as `ngram {len(counts) + 1}=10` was expected"
                )
        if not counts:
            raise ArpaError(f"{self.path}:{self.line}: there are no counts before the 1-grams")
        return counts

    def _expect(self, wanted: bytes) -> None:
        while not (line := self._next()):
            pass
        if line != wanted:
            raise ArpaError(
                f"{self.path}:{self.line}: {line[:60]!r} where {wanted.decode()} was expected: the header gives another number of n-grams"
            )

    def _section(self, order: int, count: int) -> tuple[Any, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(words of all lines, one after another; log10 probabilities; log10 back-offs) of one section."""
        pa = pyarrow()
        texts, logs, weights = [], [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        while count:
            ends = np.flatnonzero(np.frombuffer(self._rest, np.uint8, offset=self._at) == _LINE_FEED)[:count]
            if not ends.size:
                if not self._more() and not self._rest:
                    raise ArpaError(f"{self.path} ends within its {order}-grams, of which {count} are missing: it is cut short")
                continue
            stop = self._at + int(ends[-1]) + 1
            block, self._at = self._rest[self._at : stop], stop
            words, log10, backoff = self._lines(block, order, ends.size)
            texts.append(words)
            logs.append(log10)
            weights.append(backoff)
            self.line += ends.size
            count -= ends.size
        return pa.concat_arrays(texts or [pa.array([], pa.binary())]), np.concatenate(logs), np.concatenate(weights)

    def _lines(self, block: bytes, order: int, lines: int) -> tuple[Any, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        text = split(block)
        stops = np.flatnonzero(text.line_ends)
        fields = np.diff(stops, prepend=-1) - 1
        first = np.cumsum(fields) - fields
        wrong = (fields != order + 1) & (fields != order + 2)
        if wrong.any():
            at = int(wrong.argmax())
            line = block.split(b"\n", at + 1)[at].strip()
            if not line or line.startswith(b"\\"):
                raise ArpaError(
                    f"{self.path}:{self.line + at + 1}: {line[:60]!r} where a {order}-gram was expected: the header gives more of them "
                    "than there are, or a line is empty that is not their last"
                )
            raise ArpaError(
                f"{self.path}:{self.line + at + 1}: {line[:60]!r} is no {order}-gram: {order + 1} or {order + 2} fields were expected"
            )
        each = np.arange(self.line + 1, self.line + 1 + lines)
        log10 = self._floats(text.words, first, each)
        backoff = np.zeros(lines, np.float32)
        has = fields == order + 2
        backoff[has] = self._floats(text.words, (first + order + 1)[has], each[has])
        if (log10 > 0).any():
            at = int((log10 > 0).argmax())
            raise ArpaError(f"{self.path}:{self.line + at + 1}: log10 of a probability is {log10[at]:g}, above 0")
        places = (first[:, None] + np.arange(1, order + 1)).ravel()
        return text.words.take(pyarrow().array(places)), log10, backoff

    def _floats(self, words: Any, at: npt.NDArray[np.int64], lines: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The numbers in the fields `at`; lines: the line of each, for errors."""
        pa = pyarrow()
        texts = words.take(pa.array(at))
        try:
            values: npt.NDArray[np.float32] = texts.cast(pa.string()).cast(pa.float32()).to_numpy()
        except pa.ArrowInvalid:
            values = np.array([_number(text) for text in texts.to_pylist()], np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            bad = int(finite.argmin())
            raise ArpaError(
                f"{self.path}:{lines[bad]}: {texts[bad].as_py()[:60]!r} is no number that a model can have; a probability of 0 is "
                "written as -99"
            )
        return values

    def _unigrams(
        self, texts: Any, log10: npt.NDArray[np.float32], backoff: npt.NDArray[np.float32], line: int
    ) -> tuple[Any, Section]:
        """Words by number, the three special words first, and the section of 1-grams in that order."""
        pa = pyarrow()
        special = pa.array(SPECIAL, pa.binary())
        unknown = pa.array([b"<UNK>"], pa.binary())
        texts = pa.compute.if_else(pa.compute.is_in(texts, unknown), pa.scalar(b"<unk>", pa.binary()), texts)
        if pa.compute.count_distinct(texts).as_py() != len(texts):
            places = texts.dictionary_encode().indices.to_numpy()
            first, second = twins(places)
            word = texts[second].as_py().decode(errors="replace")
            raise ArpaError(
                f"{self.path}:{line + second}: the word `{word}` is there twice among the 1-grams, first in line {line + first}"
            )
        others = texts.filter(pa.compute.invert(pa.compute.is_in(texts, special)))
        words = pa.concat_arrays([special, others]).cast(pa.large_binary())
        numbers = pa.compute.index_in(texts.cast(pa.large_binary()), words).to_numpy(zero_copy_only=False)
        logs, weights = np.full(len(words), UNKNOWN_LOG10, np.float32), np.zeros(len(words), np.float32)
        logs[numbers], weights[numbers] = log10, backoff
        return words, Section(np.arange(len(words), dtype=np.uint32)[:, None], logs, weights, line)


def _number(text: bytes) -> float:
    """The number in a text; NaN if it is none, as `1_0` is none outside of Python."""
    try:
        return float(text) if b"_" not in text else float("nan")
    except ValueError:
        return float("nan")
