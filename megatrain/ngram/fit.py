"""`megatrain ngram fit`: fits a model to text and writes an ARPA file, in phases:

text.py       words to numbers                                  one pass over the text
grams.py      every distinct n-gram, part by part               a sort for each order, in several processes
tables.py     parts as one table; the context of each n-gram
discounts.py  from counts of counts
estimate.py   probabilities and back-off weights, order by order
arpa_out.py   lines of the ARPA file
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

from megatrain.data.bar import bar
from megatrain.files import doing, make_folder, whole
from megatrain.ngram.arpa_out import write_arpa
from megatrain.ngram.discounts import Discounts, estimate
from megatrain.ngram.estimate import interpolate, unigrams
from megatrain.ngram.grams import PartCounts, count_part, parts_of
from megatrain.ngram.optional import give_back
from megatrain.ngram.tables import Tables, pruning
from megatrain.ngram.text import TextError, number_text
from megatrain.ngram.units import WORDS, spacing

HIGHEST_ORDER = 10
BASE_BYTES, WORD_BYTES, POSITION_BYTES = 200 << 20, 64, 76
"""Approximate memory of the processes: without any text, for each word of the vocabulary, and for each position of a part."""
MOST_PARTS = 1 << 15


class WorkerError(RuntimeError):
    """A worker process died."""


@dataclass(frozen=True)
class Settings:
    """Settings of a model."""

    order: int = 5
    prune: tuple[int, ...] = ()
    """For each order: n-grams that occur this often or less are pruned; the last value repeats. Empty: none are pruned."""
    fallback: tuple[float, float, float] | None = None
    """Discounts for an order whose counts give none; None: that is an error."""
    interpolate_unigrams: bool = True
    vocab_pad: int = 0
    """The uniform distribution is spread over at least this many words."""
    memory: int = 1 << 30
    """Bytes of memory for all processes together."""
    workers: int = 1
    units: str = WORDS
    """Kind of units: words, characters, or a tokenizer (units.py)."""
    skip_symbols: bool = False
    """Whether to read the words <s>, </s> and <unk> in the text as blanks."""


@dataclass(frozen=True)
class Fitted:
    """Figures of a fitted model."""

    tokens: int
    """Number of words in the text, sentence ends included."""
    types: int
    counts: list[int]
    """n-grams written, for each order."""
    discounts: list[Discounts]


def fit(inputs: Sequence[Path], output: Path, settings: Settings, temporary: Path | None = None) -> Fitted:
    """Fit a model to text files and write it, the whole file or nothing. Raises TextError, DiscountError, ValueError or OSError."""
    if not 1 <= settings.order <= HIGHEST_ORDER:
        raise ValueError(f"--order {settings.order} must lie in 1 .. {HIGHEST_ORDER}. Use for example --order 5.")
    if settings.vocab_pad and not settings.interpolate_unigrams:
        raise ValueError(
            f"--vocab-pad {settings.vocab_pad} spreads the uniform distribution, which --interpolate-unigrams 0 leaves out. Leave one out."
        )
    if settings.skip_symbols and settings.units != WORDS:
        raise ValueError(
            f"--skip-symbols is about words, and --units {settings.units} divides them: take the marks out of the text, or leave it out."
        )
    thresholds = pruning(settings.prune, settings.order)
    make_folder(output.parent)
    work = Path(tempfile.mkdtemp(prefix="ngram-", dir=temporary or output.parent))
    try:
        return _fit(inputs, output, settings, thresholds, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fit(inputs: Sequence[Path], output: Path, settings: Settings, thresholds: tuple[int, ...], work: Path) -> Fitted:
    size = 0
    for path in inputs:
        with doing("reading", path):
            size += path.stat().st_size
    with bar("words", size) as tell:
        space = None if settings.units == WORDS else spacing(settings.units)
        corpus = number_text(inputs, work, tell, space, settings.skip_symbols)
    if not len(corpus.ids):
        raise TextError(f"{', '.join(map(str, inputs))}: there is no text. Give a file with a sentence a line.")
    give_back()
    spare = max(settings.memory - BASE_BYTES - WORD_BYTES * corpus.vocabulary.size, settings.memory // 4)
    held = max(spare // 100, 1 << 14)
    size = max(spare // (settings.workers * (POSITION_BYTES + 12 * settings.order)), len(corpus.ids) // MOST_PARTS, 1 << 12)
    parts = parts_of(corpus.counts, size, corpus.ids if settings.order > 1 else None)
    with bar("n-grams", len(corpus.ids)) as tell:
        counts: list[PartCounts] = []
        for of_part in _counted(parts, corpus.ids, settings, work):
            counts.append(of_part)
            tell(int(of_part.unigram_raw.sum()))
    give_back()
    tables = Tables(corpus, settings.order, parts, counts, work)
    found = [estimate(k, tables.counts_of_counts(k), settings.fallback) for k in range(1, settings.order + 1)]
    words = unigrams(tables, found[0], thresholds[0], interpolate=settings.interpolate_unigrams, vocab_pad=settings.vocab_pad)
    with bar("probabilities", sum(2 * tables.size(k) for k in range(2, settings.order + 1))) as tell:
        for k in range(2, settings.order + 1):
            tables.find_prefixes(k, 4 * held)
            give_back()
            interpolate(tables, k, words if k == 2 else None, found[k - 1], thresholds[k - 1], held, tell)
    give_back()
    with (
        bar("writing", sum(tables.size(k) for k in range(2, settings.order + 1))) as tell,
        _opened(output) as out,
    ):
        written = write_arpa(out, tables, words, thresholds, tell)
    return Fitted(len(corpus.ids), corpus.vocabulary.size, written, found)


def _counted(parts: Sequence[Any], ids: Any, settings: Settings, work: Path) -> Iterator[PartCounts]:
    """The counts of each part, in order."""
    count = partial(count_part, ids, order=settings.order, folder=work)
    if settings.workers == 1 or len(parts) == 1:
        yield from map(count, parts)
        return
    try:
        with ProcessPoolExecutor(settings.workers, get_context("spawn")) as pool:
            yield from pool.map(count, parts)
    except BrokenProcessPool:
        raise WorkerError(
            "a process that counts n-grams was ended from outside, perhaps for want of memory. Give less --memory, or --workers 1."
        ) from None


@contextmanager
def _opened(output: Path) -> Iterator[BinaryIO]:
    """The output file, whole or nothing, compressed if its name ends in .gz."""
    with whole(output) as file:
        if output.suffix == ".gz":
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=4, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield file
