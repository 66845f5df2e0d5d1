"""Chooses the spans of a text that become blanks: lengths and places (GLM, arXiv:2103.10360, section 2.1, and its code).

    lengths     Poisson, restricted to min_span .. max_span, drawn while their sum is below int(mask_ratio n); shuffled
    documents   a text may have several. All but the longest, in order of length, take spans from the list while these fit
                int(mask_ratio D); the longest takes the rest, if they fit. If not all lengths are placed, there is no placement.
    within one  free = D - sum - gaps. k draws of 0 .. free, sorted, are the tokens before each span that no span or gap takes:

                .  .  [span]  gap  .  [span]  gap  [span]  .        draws 2, 3, 3: spans never overlap, and a gap stays between

Sorted draws do not give every arrangement equally often; `span_layout: uniform` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatrain.config.glm_data import BlankConfig
from megatrain.data.draws import Draws

Ids = npt.NDArray[np.int64]
REDRAWS = 8
"""Number of times that lengths are drawn at most, with on_unplaceable=redraw."""


@dataclass(frozen=True)
class Spans:
    """Spans of a text in its order, without overlaps."""

    starts: Ids
    lengths: Ids


@lru_cache(maxsize=16)
def length_table(rate: float, least: int, most: int) -> npt.NDArray[np.float64]:
    """[most - least + 1] distribution function of a span's length: Poisson(rate) restricted to least .. most."""
    logs = [n * math.log(rate) - math.lgamma(n + 1) for n in range(least, most + 1)]
    weights = np.exp(np.array(logs) - max(logs))
    return np.cumsum(weights / weights.sum())


@lru_cache(maxsize=16)
def length_moments(blank: BlankConfig) -> tuple[float, float]:
    """Mean and variance of a span's length."""
    p = np.diff(length_table(blank.poisson_lambda, blank.min_span, blank.max_span), prepend=0.0)
    values = np.arange(blank.min_span, blank.max_span + 1)
    mean = float((p * values).sum())
    return mean, float((p * values**2).sum()) - mean**2


def draw_lengths(draws: Draws, blank: BlankConfig, count: int) -> Ids:
    """[count] random lengths of spans."""
    table = length_table(blank.poisson_lambda, blank.min_span, blank.max_span)
    return blank.min_span + np.searchsorted(table, draws.uniform(count), side="right").clip(max=table.size - 1)


def lengths_for(draws: Draws, blank: BlankConfig, size: int) -> Ids:
    """Lengths for a text of `size` tokens: drawn until their sum reaches int(mask_ratio size), in random order."""
    target = int(blank.mask_ratio * size)
    if target == 0:
        return np.zeros(0, np.int64)
    chunk = int(1.3 * target / length_moments(blank)[0]) + 8
    lengths = draw_lengths(draws, blank, chunk)
    while int(lengths.sum()) < target:
        lengths = np.concatenate([lengths, draw_lengths(draws, blank, chunk)])
    count = int(np.searchsorted(np.cumsum(lengths), target)) + 1
    lengths = lengths[:count].copy()
    excess = int(lengths.sum()) - target
    if blank.overflow == "clip":
        lengths[-1] -= excess
    elif blank.overflow == "drop" and excess:
        lengths = lengths[:-1]
    return lengths[draws.permutation(lengths.size)]


def place(draws: Draws, blank: BlankConfig, documents: Ids, lengths: Ids) -> Spans | None:
    """Spans of these lengths in documents [d, 2] (first token, end) of a text; None if they do not all fit."""
    if lengths.size == 0:
        return Spans(lengths, lengths)
    if not len(documents):
        return None
    sizes = documents[:, 1] - documents[:, 0]
    order = np.argsort(sizes, kind="stable")
    starts, taken = np.zeros(lengths.size, np.int64), 0
    for number in order[:-1]:
        fits = np.cumsum(lengths[taken:]) <= int(sizes[number] * blank.mask_ratio)
        count = int(fits.argmin()) if not fits.all() else fits.size
        mine = slice(taken, taken + count)
        starts[mine] = _within(draws, blank, documents[number], lengths[mine])
        taken += count
    rest, longest = lengths[taken:], documents[order[-1]]
    if int(rest.sum()) + blank.min_gap * (rest.size - 1) > longest[1] - longest[0]:
        return None
    starts[taken:] = _within(draws, blank, longest, rest)
    by_place = np.argsort(starts)
    return Spans(starts[by_place], lengths[by_place])


def _within(draws: Draws, blank: BlankConfig, document: Ids, lengths: Ids) -> Ids:
    """The start of each span, in the order of `lengths`, within one document that has room for them all."""
    if lengths.size == 0:
        return lengths
    taken = lengths + blank.min_gap
    free = int(document[1] - document[0] - taken.sum()) + blank.min_gap
    if blank.span_layout == "uniform":  # a choice of k among free + k places for each arrangement
        before = np.sort(draws.permutation(free + lengths.size)[: lengths.size]) - np.arange(lengths.size)
    else:
        before = np.sort(draws.below(free + 1, lengths.size))
    return document[0] + before + np.cumsum(taken) - taken


def documents_of(text: Ids, cls: int, eos: int) -> Ids:
    """[d, 2] first token and end of each document: the tokens between eos tokens, without a leading [CLS]; the last document, if no eos
    ends it, without its last token."""
    ends = np.flatnonzero(text == eos)
    closed = ends.size > 0 and ends[-1] == text.size - 1
    stops = ends if closed else np.append(ends, text.size - 1)
    starts = np.append(0, ends[: stops.size - 1] + 1)
    starts = starts + (text[starts.clip(max=text.size - 1)] == cls)
    found = np.stack([starts, stops], 1)
    return found[found[:, 1] > found[:, 0]]


def blanks_of(draws: Draws, blank: BlankConfig, text: Ids, documents: Ids, *, single: bool) -> Spans | None:
    """Random blanks of a text, or with `single` just one; None if they do not fit."""
    for _ in range(REDRAWS if blank.on_unplaceable == "redraw" else 1):
        lengths = draw_lengths(draws, blank, 1) if single else lengths_for(draws, blank, text.size)
        found = place(draws, blank, documents, lengths)
        if found is not None:
            return found
    return None
