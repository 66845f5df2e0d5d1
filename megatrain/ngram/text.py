"""Text to word numbers: a sentence a line, words between blanks, each word numbered when it first appears.

    <unk> 0   <s> 1   </s> 2   then the words of the text in order of appearance        "a b\\n\\na\\n" -> 3 4 2 2 3 2

Blanks are NUL, TAB, CR and space. All other bytes are part of a word: no case folding, no Unicode blanks, no repair of broken UTF-8. An
empty line is a sentence. The end of the file ends the last line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatrain.files import HEAD_BYTES, OneLine, not_text, opened
from megatrain.ngram.column import Column
from megatrain.ngram.optional import pyarrow

UNKNOWN, BEGIN, END = 0, 1, 2
SPECIAL = (b"<unk>", b"<s>", b"</s>")
CHUNK_BYTES = 4 << 20
LONGEST = 16 << 20
"""Bytes of a word, or of a line that units are found in: both are in memory whole, with several numbers for each byte."""

_BLANK = np.zeros(256, bool)
_BLANK[[0, 9, 10, 13, 32]] = True
_LINE_FEED = 10


class TextError(OneLine, ValueError):
    """A text that no model can be fitted to; the message says where and what to do."""


@dataclass(frozen=True)
class TextWords:
    """The words and line ends of a piece of text, in order."""

    words: Any
    """The words, as a binary array of pyarrow."""
    line_ends: npt.NDArray[np.bool_]
    """[words + line ends] True for a line end, False for a word."""


def pieces(file: BinaryIO, on_bytes: Callable[[int], None] = lambda _count: None) -> Iterator[TextWords]:
    """The text of a file in pieces of about CHUNK_BYTES, cut at blanks; a last line without a line end gets one."""
    rest, last, read = b"", _LINE_FEED, 0
    while data := file.read(CHUNK_BYTES):
        on_bytes(len(data))
        last = data[-1]
        cut = max(data.rfind(blank) for blank in (b"\0", b"\t", b"\n", b"\r", b" ")) + 1
        if cut:
            yield split(rest + data[:cut])
            rest = b""
        rest += data[cut:]
        read += len(data)
        _require_short("word", rest, file, read)
    if rest or last != _LINE_FEED:
        yield split(rest + b"\n")


def line_blocks(file: BinaryIO, on_bytes: Callable[[int], None] = lambda _count: None) -> Iterator[bytes]:
    """A file in blocks of whole lines; a last line without a line end gets one."""
    rest, read = b"", 0
    while data := file.read(CHUNK_BYTES):
        on_bytes(len(data))
        cut = data.rfind(b"\n") + 1
        if cut:
            yield rest + data[:cut]
            rest = b""
        rest += data[cut:]
        read += len(data)
        _require_short("line", rest, file, read)
    if rest:
        yield rest + b"\n"


def _require_short(what: str, rest: bytes, file: BinaryIO, read: int) -> None:
    """Raise TextError for a word or line that goes on after `read` bytes of the file and is too long already."""
    if len(rest) > LONGEST:
        raise TextError(
            f"{file.name}: the {what} from byte {read - len(rest):,} on has more than {LONGEST:,} bytes. Is this text, a sentence a line?"
        )


def require_text(file: BufferedReader, path: Path) -> None:
    """Raise TextError if the first bytes of an opened file show that it is not text; broken UTF-8 is accepted."""
    if said := not_text(file.peek(HEAD_BYTES)[:HEAD_BYTES]):
        raise TextError(f"{path}: {said}")


def split(data: bytes) -> TextWords:
    """The words and line ends of bytes that end with a blank or a line end."""
    buffer = np.frombuffer(data, np.uint8)
    inside = ~_BLANK[buffer]
    before = np.zeros_like(inside)
    before[1:] = inside[:-1]
    starts = inside & ~before
    stops = np.flatnonzero(~inside & before)
    begins = np.flatnonzero(starts)
    offsets = np.zeros(begins.size + 1, np.int32)
    np.cumsum(stops - begins, out=offsets[1:])
    events = np.flatnonzero(starts | (buffer == _LINE_FEED))
    pa = pyarrow()
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(buffer[inside])]
    return TextWords(pa.Array.from_buffers(pa.binary(), begins.size, buffers), buffer[events] == _LINE_FEED)


class WordTable:
    """Words and their numbers. Takes memory for the words themselves, and 16 bytes for each."""

    def __init__(self) -> None:
        self._pieces: list[Any] = [pyarrow().array(SPECIAL, pyarrow().binary())]
        self._hashes = np.zeros(0, np.int64)
        """Hashes of the words, sorted."""
        self._numbers = np.zeros(0, np.uint32)
        """Word number for each hash."""
        self._twins: dict[bytes, int] = {}
        """Words that share their hash with another word -> number."""
        self._all: Any = None
        self.size = len(SPECIAL)

    @property
    def words(self) -> Any:
        """All words by number: a pyarrow binary array."""
        pa = pyarrow()
        if len(self._pieces) > 1 or self._all is None:
            self._all = pa.concat_arrays([piece.cast(pa.large_binary()) for piece in self._pieces])
            self._pieces = [self._all]
        return self._all

    def numbers(self, words: Any) -> npt.NDArray[np.uint32]:
        """[n] numbers of words; new words get the next numbers."""
        encoded = words.dictionary_encode()
        distinct = encoded.dictionary
        return self._of_distinct(distinct)[encoded.indices.to_numpy(zero_copy_only=False)]

    def finish(self) -> None:
        """Free the memory for finding words; no more words may follow."""
        _ = self.words
        self._hashes, self._numbers, self._twins = self._hashes[:0], self._numbers[:0], {}

    def _of_distinct(self, distinct: Any) -> npt.NDArray[np.uint32]:
        texts = distinct.to_pylist()
        hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
        at = np.searchsorted(self._hashes, hashes)
        at_known = at.clip(max=max(self._hashes.size - 1, 0))
        known = self._hashes[at_known] == hashes if self._hashes.size else np.zeros(hashes.size, bool)
        found = np.zeros(len(texts), np.uint32)
        found[known] = self._numbers[at_known[known]]
        if known.any():
            pa = pyarrow()
            mine, theirs = distinct.filter(pa.array(known)).cast(pa.large_binary()), self.words.take(pa.array(found[known]))
            for place in np.flatnonzero(~pa.compute.equal(mine, theirs).to_numpy(zero_copy_only=False)):
                self._settle_twin(texts, found, int(np.flatnonzero(known)[place]))
        if not known.all():
            self._add(distinct, hashes, known, found)
        return found

    def _settle_twin(self, texts: list[bytes], found: npt.NDArray[np.uint32], place: int) -> None:
        """Number a word that shares its hash with another, which happens by chance in one of 10^12 texts."""
        word = texts[place]
        if word not in self._twins:
            self._twins[word] = self.size
            self._pieces.append(pyarrow().array([word], pyarrow().large_binary()))
            self.size += 1
        found[place] = self._twins[word]

    def _add(self, distinct: Any, hashes: npt.NDArray[np.int64], known: npt.NDArray[np.bool_], found: Any) -> None:
        new = np.flatnonzero(~known)
        found[new] = np.arange(self.size, self.size + new.size, dtype=np.uint32)
        self._pieces.append(distinct.take(pyarrow().array(new)).cast(pyarrow().large_binary()))
        self.size += new.size
        merged = np.concatenate([self._hashes, hashes[new]])
        order = np.argsort(merged, kind="stable")
        self._hashes, self._numbers = merged[order], np.concatenate([self._numbers, found[new]])[order]


@dataclass(frozen=True)
class Corpus:
    """A text as word numbers."""

    ids: Column
    """Word numbers, uint32; each sentence ends in END."""
    vocabulary: WordTable
    counts: npt.NDArray[np.int64]
    """[vocabulary] occurrences of each word."""


def number_text(
    paths: Iterable[Path],
    work: Path,
    on_bytes: Callable[[int], None] = lambda _count: None,
    space: Callable[[bytes], bytes] | None = None,
    skip_symbols: bool = False,
) -> Corpus:
    """Number the words of files, one after another. Raises TextError for the words <s>, </s> and <unk>, which are reserved.

    space: puts blanks between the units of whole lines; None: units are words. skip_symbols: reserved words are blanks instead.
    """
    vocabulary, ids = WordTable(), Column(work / "ids", np.uint32)
    special = pyarrow().array(SPECIAL, pyarrow().binary())
    counts = np.zeros(1 << 16, np.int64)
    for path in paths:
        with opened(path) as file:
            require_text(file, path)
            read = pieces(file, on_bytes) if space is None else (split(space(block)) for block in line_blocks(file, on_bytes))
            for piece in map(_without_special, read) if skip_symbols else read:
                numbers = np.full(piece.line_ends.size, END, np.uint32)
                before = vocabulary.size
                numbers[~piece.line_ends] = vocabulary.numbers(piece.words)
                if vocabulary.size > before:
                    _refuse_special(vocabulary, special, before, path)
                if vocabulary.size > counts.size:
                    counts = np.concatenate([counts, np.zeros(max(counts.size, vocabulary.size - counts.size), np.int64)])
                counts[: vocabulary.size] += np.bincount(numbers, minlength=vocabulary.size)
                ids.append(numbers)
    vocabulary.finish()
    return Corpus(ids, vocabulary, counts[: vocabulary.size].copy())


def _without_special(piece: TextWords) -> TextWords:
    """Words and line ends without the reserved words."""
    pa = pyarrow()
    stays = pa.compute.invert(pa.compute.is_in(piece.words, pa.array(SPECIAL, pa.binary())))
    kept = np.ones(piece.line_ends.size, bool)
    kept[~piece.line_ends] = stays.to_numpy(zero_copy_only=False)
    return TextWords(piece.words.filter(stays), piece.line_ends[kept])


def _refuse_special(vocabulary: WordTable, special: Any, first: int, path: Path) -> None:
    new = vocabulary.words.slice(first)
    is_special = pyarrow().compute.is_in(new, special.cast(pyarrow().large_binary())).to_numpy(zero_copy_only=False)
    if is_special.any():
        word = new[int(is_special.argmax())].as_py().decode()
        raise TextError(
            f"{path}: the text has the word {word}, which a model keeps for itself: it puts <s> and </s> around every line. Give "
            "--skip-symbols, which reads <s>, </s> and <unk> as blanks."
        )
