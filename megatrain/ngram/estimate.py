"""Probabilities and back-off weights of interpolated modified Kneser-Ney (Chen and Goodman 1999; Heafield et al. 2013).

    u(w|x)     = (adjusted(x w) - D) / sum of adjusted(x .)
    gamma(x)   = (sum of D over kept x ., plus adjusted counts of pruned ones) / sum of adjusted(x .)
    p(w|x)     = u(w|x) + gamma(x) p(w | x without its first word)       p(w) = u(w) + gamma() / V

V is the number of kept words, <unk> and </s> included, <s> not. Pruning removes n-grams; counts, discounts and denominators stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatrain.ngram.discounts import Discounts
from megatrain.ngram.tables import Tables, kept
from megatrain.ngram.text import BEGIN, END, UNKNOWN

CHUNK = 1 << 20
"""Number of n-grams processed at a time."""


@dataclass(frozen=True)
class Unigrams:
    """Probabilities of all words, and which of them pruning keeps."""

    probability: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]


def unigrams(tables: Tables, discounts: Discounts, threshold: int, *, interpolate: bool = True, vocab_pad: int = 0) -> Unigrams:
    """Probabilities of all words. threshold: words that occur this often or less are pruned. vocab_pad: least V."""
    adjusted = tables.adjusted
    stays = tables.raw > threshold
    stays[[UNKNOWN, BEGIN, END]] = True
    total = float(adjusted.sum())
    discount = discounts.of(adjusted.astype(np.uint32))
    gamma = float(np.where(stays, discount, adjusted).sum()) / total
    probability = np.where(stays, adjusted - discount, 0.0) / total
    words = max(vocab_pad, int(stays.sum()) - 1)
    probability = probability + gamma / words if interpolate else probability
    probability[UNKNOWN] = gamma / words if interpolate else gamma
    probability[BEGIN] = 1.0
    return Unigrams(probability, stays)


def interpolate(
    tables: Tables,
    order: int,
    lower: Unigrams | None,
    discounts: Discounts,
    threshold: int,
    held: int,
    tell: Callable[[int], None] = lambda _count: None,
) -> None:
    """Write `p` of every n-gram of an order (2 or more), and `gamma` of every context, an n-gram of the order below.

    lower: probabilities of words, for order 2. held: number of contexts that may be in memory at a time.
    """
    contexts = tables.size(order - 1)
    size = tables.size(order)
    mass, scale = tables.whole(order, "u"), tables.whole(order, "scale")
    for low in range(0, contexts, held):
        high = min(low + held, contexts)
        total, left = np.zeros(high - low), np.zeros(high - low)
        for first, end, prefix, adjusted, stays in _chunks(tables, order, threshold):
            here = (prefix >= low) & (prefix < high)
            at = (prefix[here] - np.uint32(low)).astype(np.int64)
            np.add.at(total, at, adjusted[here])
            np.add.at(left, at, np.where(stays, discounts.of(adjusted), adjusted)[here])
            tell(end - first)
        gamma = np.divide(left, total, out=np.ones_like(left), where=total > 0)
        tables.whole(order - 1, "gamma").append(gamma)
        for first, end, prefix, adjusted, stays in _chunks(tables, order, threshold):
            here = (prefix >= low) & (prefix < high)
            at = (prefix[here] - np.uint32(low)).astype(np.int64)
            values = np.where(stays, adjusted - discounts.of(adjusted), 0.0)[here] / total[at]
            if low == 0 and high == contexts:
                mass.append(values)
                scale.append(gamma[at])
            else:
                mass.change(first, end, here, values)
                scale.change(first, end, here, gamma[at])
            tell(end - first)
    if size == 0:
        return
    for part in tables.parts:
        first, end = tables.span(order, part)
        suffix = tables.files(part).column(order, "suffix").read()
        below = (
            lower.probability[suffix]
            if lower is not None
            else tables.whole(order - 1, "p").read(*tables.span(order - 1, part))[suffix]
        )
        tables.whole(order, "p").append(mass.read(first, end) + scale.read(first, end) * below)


Chunk = tuple[int, int, npt.NDArray[np.uint32], npt.NDArray[np.uint32], npt.NDArray[np.bool_]]


def _chunks(tables: Tables, order: int, threshold: int) -> Iterator[Chunk]:
    """(first, end, prefix, adjusted count, whether pruning keeps it) of n-grams first .. end - 1, chunk by chunk."""
    prefixes = tables.whole(order, "prefix")
    for part in tables.parts:
        base, stop = tables.span(order, part)
        files = tables.files(part)
        for first in range(base, stop, CHUNK):
            end = min(first + CHUNK, stop)
            mine = first - base, end - base
            stays = kept(files.column(order, "raw").read(*mine), threshold)
            yield first, end, prefixes.read(first, end), files.column(order, "adjusted").read(*mine), stays
