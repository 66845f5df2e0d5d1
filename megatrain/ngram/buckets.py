"""Sorts documents by perplexity into head, middle and tail of a corpus (CCNet, arXiv:1911.00359, section 4.3).

    perplexity of a document = 10 ^ -(sum of the log10 of its lines / tokens), unknown words and sentence ends included
    head < 30th percentile <= middle < 60th percentile <= tail

The head is the text that the model finds most probable: with a model of Wikipedia, text that reads like it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatrain.ngram.model import NgramModel, perplexity

Bucket = Literal["head", "middle", "tail"]
BUCKETS: tuple[Bucket, ...] = ("head", "middle", "tail")
PERCENTILES = (30.0, 60.0)
TOGETHER = 1024
"""Number of documents scored at a time."""


@dataclass(frozen=True)
class Cutoffs:
    """Lowest perplexities of the middle and of the tail."""

    middle: float
    tail: float

    def __post_init__(self) -> None:
        """Raises ValueError unless 0 <= middle <= tail."""
        if not 0 <= self.middle <= self.tail:
            raise ValueError(f"cutoffs {self.middle:g} and {self.tail:g} must rise from 0. Use for example 300 800.")

    def bucket(self, perplexity: float) -> Bucket:
        """The bucket of a document with this perplexity."""
        return "head" if perplexity < self.middle else "middle" if perplexity < self.tail else "tail"


def cutoffs_of(perplexities: npt.NDArray[np.float64], percentiles: tuple[float, float] = PERCENTILES) -> Cutoffs:
    """The cutoffs at two percentiles of a corpus. Raises ValueError for invalid percentiles, or without documents."""
    low, high = percentiles
    if not 0 <= low <= high <= 100:
        raise ValueError(f"percentiles {low:g} and {high:g} must rise from 0 to 100. Use for example 30 60.")
    if not perplexities.size:
        raise ValueError("there is no document to find percentiles of")
    middle, tail = np.percentile(perplexities, [low, high])
    return Cutoffs(float(middle), float(tail))


def perplexities(model: NgramModel, documents: Iterable[str]) -> Iterator[float]:
    """The perplexity of each document; an empty one has that of an empty sentence."""
    waiting = iter(documents)
    while batch := list(islice(waiting, TOGETHER)):
        lines = [document.encode().split(b"\n") for document in batch]
        scores = iter(model.score(line for of in lines for line in of))
        for of in lines:
            mine = list(islice(scores, len(of)))
            yield perplexity(sum(score.log10 for score in mine), sum(score.tokens for score in mine))


def sound(value: float, name: str) -> float:
    """A perplexity, if it is a number. name: of its document. Raises ValueError for NaN and infinity."""
    if not math.isfinite(value):
        raise ValueError(f"{name} has a perplexity of {value}: the model's numbers are damaged. Make it again from its text.")
    return value


def chosen(names: Sequence[str]) -> frozenset[str]:
    """The set of these buckets. Raises ValueError for an unknown name."""
    for name in names:
        if name not in BUCKETS:
            raise ValueError(
                f"--keep {','.join(names)}: {name!r} is no bucket. Use head, middle or tail, such as --keep head,middle."
            )
    return frozenset(names)
