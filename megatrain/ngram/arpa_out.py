"""Writes ARPA files as lmplz does: one n-gram a line, in suffix order of word numbers, log10 to the last digit of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatrain.ngram.estimate import Unigrams
from megatrain.ngram.grams import PositionRange
from megatrain.ngram.optional import pyarrow
from megatrain.ngram.tables import Tables, kept

LINES = 1 << 18
"""Lines written at a time."""


def write_arpa(
    out: BinaryIO,
    tables: Tables,
    words: Unigrams,
    thresholds: tuple[int, ...],
    tell: Callable[[int], None] = lambda _count: None,
) -> list[int]:
    """Write the model; returns the number of n-grams of each order."""
    counts = [int(words.kept.sum())]
    for k in range(2, tables.order + 1):
        files = (tables.files(part).column(k, "raw") for part in tables.parts)
        counts.append(sum(int(kept(column.read(), thresholds[k - 1]).sum()) for column in files))
    out.write(b"\\data\\\n" + b"".join(b"ngram %d=%d\n" % (k, n) for k, n in enumerate(counts, 1)))
    vocabulary = tables.corpus.vocabulary.words
    out.write(b"\n\\1-grams:\n")
    _write_unigrams(out, tables, words, vocabulary)
    for k in range(2, tables.order + 1):
        out.write(b"\n\\%d-grams:\n" % k)
        for part in tables.parts:
            _write_part(out, tables, part, k, thresholds[k - 1], vocabulary)
            first, end = tables.span(k, part)
            tell(end - first)
    out.write(b"\n\\end\\\n")
    return counts


ZERO = -99.0
"""log10 of a probability of 0, as SRILM writes it; lmplz writes -inf, which no reader accepts."""


def log10(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """log10 of non-negative numbers; ZERO for 0."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log10(values), ZERO).astype(np.float32)


def _write_unigrams(out: BinaryIO, tables: Tables, words: Unigrams, vocabulary: Any) -> None:
    numbers = np.flatnonzero(words.kept)
    backoff = tables.whole(1, "gamma").read() if tables.order > 1 else None
    for first in range(0, numbers.size, LINES):
        some = numbers[first : first + LINES]
        text = vocabulary.take(pyarrow().array(some))
        _lines(out, np.minimum(log10(words.probability[some]), 0), [text], None if backoff is None else log10(backoff[some]))


def _write_part(out: BinaryIO, tables: Tables, part: PositionRange, k: int, threshold: int, vocabulary: Any) -> None:
    files, (first, end) = tables.files(part), tables.span(k, part)
    stays = np.flatnonzero(kept(files.column(k, "raw").read(), threshold))
    firsts = {i: files.column(i, "first").read() for i in range(2, k + 1)}
    suffixes = {i: files.column(i, "suffix").read() for i in range(2, k + 1)}
    p = tables.whole(k, "p").read(first, end)
    backoff = tables.whole(k, "gamma").read(first, end) if k < tables.order else None
    for begin in range(0, stays.size, LINES):
        some = stays[begin : begin + LINES]
        at, text = some, []
        for i in range(k, 1, -1):
            text.append(vocabulary.take(pyarrow().array(firsts[i][at])))
            at = suffixes[i][at]
        text.append(vocabulary.take(pyarrow().array(at)))
        _lines(out, np.minimum(log10(p[some]), 0), text, None if backoff is None else log10(backoff[some]))


def _lines(out: BinaryIO, p: npt.NDArray[np.float32], words: list[Any], backoff: npt.NDArray[np.float32] | None) -> None:
    """Write lines. words: for each place in the n-gram an array, with one word a line."""
    pa = pyarrow()
    joined = words[0] if len(words) == 1 else pa.compute.binary_join_element_wise(*words, _scalar(b" "))
    columns = [_numbers(p), joined, *([] if backoff is None else [_numbers(backoff)])]
    lines = pa.compute.binary_join_element_wise(*columns, _scalar(b"\t"))
    ended = pa.compute.binary_join_element_wise(lines, _scalar(b""), _scalar(b"\n"))
    offsets = np.frombuffer(ended.buffers()[1], np.int64)[ended.offset : ended.offset + len(ended) + 1]
    out.write(memoryview(ended.buffers()[2])[int(offsets[0]) : int(offsets[-1])])


def _scalar(text: bytes) -> Any:
    return pyarrow().scalar(text, pyarrow().large_binary())


def _numbers(values: npt.NDArray[np.float32]) -> Any:
    """The shortest decimals that read back as the same float32."""
    pa = pyarrow()
    return pa.array(values + np.float32(0)).cast(pa.large_string()).cast(pa.large_binary())
