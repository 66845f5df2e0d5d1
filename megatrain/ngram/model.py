"""Scores text with an n-gram model: the probability of every word of many sentences at once.

The n-grams of order k are found by (slot of their last k - 1 words, first word). The longest n-gram that ends at a word is found from
the word backwards, one lookup an order, for all words of a text together:

    log p(w_i | ...) = log p of the longest n-gram that ends at i + log back-off weights of the longer contexts that end at i - 1

as usual for back-off models (SRILM; KenLM, Heafield 2011). A context that is not stored has a weight of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatrain.ngram.optional import pyarrow
from megatrain.ngram.table import MISSING, Slots, Table
from megatrain.ngram.text import BEGIN, END, UNKNOWN, TextWords, split

Numbers = npt.NDArray[np.uint32]
BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class Score:
    """The score of one line."""

    log10: float
    """log10 of the line's probability."""
    tokens: int
    """Number of words, and the end of the sentence if it counts."""
    oov: int
    """Number of words that the model does not know."""
    log10_oov: float = 0.0
    """The part of log10 that comes from unknown words."""

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return perplexity(self.log10, self.tokens)


def perplexity(log10: float, tokens: float) -> float:
    """10 ^ (-log10 / tokens), at most 10^300; 1 without tokens."""
    return float(10.0 ** min(-log10 / tokens, 300.0)) if tokens else 1.0


@dataclass(frozen=True)
class Order:
    """The n-grams of one order: values by word number for order 1, by slot of the table above."""

    table: Table | None
    log10: npt.NDArray[np.float32]
    backoff: npt.NDArray[np.float32]
    """log10 of the back-off weights; empty for the highest order."""


class Lookup(Protocol):
    """The vocabulary as a function: words -> numbers."""

    def numbers(self, words: Any) -> Numbers:
        """The number of each word of a pyarrow binary array; UNKNOWN for a word that the model lacks."""


@dataclass(frozen=True)
class NgramModel:
    """A model for scoring: n-grams of each order, and the vocabulary."""

    orders: Sequence[Order]
    words: Lookup
    space: Callable[[bytes], bytes] = bytes
    """Puts blanks between the units of whole lines (units.py)."""

    @property
    def order(self) -> int:
        """The highest order."""
        return len(self.orders)

    def score(self, lines: Iterable[str | bytes], *, bos: bool = True, eos: bool = True) -> Iterator[Score]:
        """Each line's score. bos, eos: whether lines begin and end a sentence; else they are pieces of text."""
        batch: list[bytes] = []
        size = 0
        for line in lines:
            data = line.encode() if isinstance(line, str) else line
            if b"\n" in data.rstrip(b"\n"):
                raise ValueError("a line to be scored has a line break within it: give its lines one by one")
            batch.append(data.rstrip(b"\n"))
            size += len(data) + 1
            if size >= BATCH_BYTES:
                yield from self.score_words(split(self.space(b"\n".join(batch) + b"\n")), bos=bos, eos=eos)
                batch, size = [], 0
        if batch:
            yield from self.score_words(split(self.space(b"\n".join(batch) + b"\n")), bos=bos, eos=eos)

    def score_words(self, text: TextWords, *, bos: bool = True, eos: bool = True) -> list[Score]:
        """The score of each line of a text that ends with a line end."""
        totals = self.totals(text, bos=bos, eos=eos)
        return [Score(*row) for row in zip(*(column.tolist() for column in totals), strict=True)]

    def totals(self, text: TextWords, *, bos: bool = True, eos: bool = True) -> tuple[npt.NDArray[Any], ...]:
        """For each line: log10, number of tokens, number of unknown words, log10 of these."""
        numbers = np.full(text.line_ends.size, END, np.uint32)
        numbers[~text.line_ends] = self.words.numbers(text.words)
        line: npt.NDArray[np.int64] = np.cumsum(text.line_ends) - text.line_ends
        each = self.log10(numbers, text.line_ends, bos=bos)
        counted = ~text.line_ends | eos
        lines = int(text.line_ends.sum())
        unknown = (numbers == UNKNOWN) & ~text.line_ends
        return (
            np.bincount(line[counted], each[counted], lines),
            np.bincount(line[counted], minlength=lines),
            np.bincount(line[unknown], minlength=lines),
            np.bincount(line[unknown], each[unknown], lines),
        )

    def log10(self, numbers: Numbers, ends: npt.NDArray[np.bool_], *, bos: bool = True) -> npt.NDArray[np.float64]:
        """log10 of the probability of each word [n] given those before it in its sentence; `ends`: which words end a sentence."""
        first = np.concatenate([[True], ends[:-1]])
        place = np.arange(numbers.size) - np.maximum.accumulate(np.where(first, np.arange(numbers.size), 0))
        nodes: list[Slots] = [numbers]
        result = self.orders[0].log10[numbers].astype(np.float64)
        length = np.ones(numbers.size, np.int64)
        for k in range(2, self.order + 1):
            order = self.orders[k - 1]
            before = _earlier(numbers, place, k - 1, bos)
            possible = np.flatnonzero((nodes[-1] != MISSING) & (before != MISSING))
            found = np.full(numbers.size, MISSING)
            if order.table is not None:
                keys = nodes[-1][possible].astype(np.uint64) << np.uint64(32) | before[possible]
                found[possible] = order.table.find(keys)
            here = np.flatnonzero(found != MISSING)
            result[here] = order.log10[found[here]]
            length[here] = k
            nodes.append(found)
        # Back-off weights of contexts that end one word earlier and are as long as the n-gram found, or longer.
        begin = self._begin_nodes()
        for k in range(1, self.order):
            context = np.concatenate([[MISSING], nodes[k - 1][:-1]]).astype(np.uint32)
            context[first] = begin[k - 1] if bos else MISSING
            weighs = np.flatnonzero((length <= k) & (context != MISSING))
            result[weighs] += self.orders[k - 1].backoff[context[weighs]]
        return result

    def _begin_nodes(self) -> list[np.uint32]:
        """For each order: the n-gram that ends at the start of a sentence, which is <s> for order 1 and MISSING above."""
        return [np.uint32(BEGIN), *[MISSING] * (self.order - 1)]


def _earlier(numbers: Numbers, place: npt.NDArray[np.int64], back: int, bos: bool) -> Numbers:
    """[n] the word `back` places before each word in its sentence; BEGIN just before the first, MISSING before that."""
    shifted = np.full(numbers.size, MISSING)
    shifted[back:] = numbers[: numbers.size - back] if back < numbers.size else numbers[:0]
    return np.where(place >= back, shifted, np.where((place == back - 1) & bos, np.uint32(BEGIN), MISSING)).astype(np.uint32)


class HeldWords:
    """The vocabulary of a model read into memory."""

    def __init__(self, words: Any) -> None:
        self.words = words.cast(pyarrow().large_binary())

    def numbers(self, words: Any) -> Numbers:
        """The number of each word, by arrow's own hash table."""
        pa = pyarrow()
        encoded = words.dictionary_encode()
        found = pa.compute.index_in(encoded.dictionary.cast(pa.large_binary()), self.words)
        distinct = found.fill_null(UNKNOWN).to_numpy(zero_copy_only=False).astype(np.uint32)
        return distinct[encoded.indices.to_numpy(zero_copy_only=False)]
