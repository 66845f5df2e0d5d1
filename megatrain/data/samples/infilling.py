"""The layout of a text with blanks as the model reads it: part A, the text with one mask for each blank, then part B, the blanks' tokens.

text      x1 x2 x3 x4 x5 x6, blanks x3 and x5 x6, filled in the order x5 x6, x3        (GLM, arXiv:2103.10360, figure 2)

tokens    x1 x2 M  x4 M  |  S  x5 x6 |  S  x3          M mask, S start of piece, E end of piece
targets   .  .  .  .  .  |  x5 x6 E  |  x3 E           targets[i] is predicted by the logits at i: nothing is shifted later
dim 1     0  1  2  3  4  |  4  4  4  |  2  2           in part B the position of the blank's mask
dim 2     0  0  0  0  0  |  1  2  3  |  1  2           in part B the place within the blank
sep = 5 tokens of part A, which all tokens see; part B is causal
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatrain.data.draws import Draws
from megatrain.data.samples.spans import Ids, Spans

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sentinels:
    """Ids of the special tokens."""

    cls: int
    eos: int
    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    noise: int


@dataclass(frozen=True)
class Rules:
    """Rules for positions and for the order of blanks."""

    shuffle: bool = True
    original_start: bool = False
    """Whether dim 1 counts the text without masks, so that a mask has the position of its blank's first token."""
    block_positions: bool = True
    """Whether dim 2 counts within a blank; else it is 1 in all of part B."""
    counts_on: bool = False
    """Whether dim 1 continues in part B after part A: for a [gMASK] of a model with one-dimensional positions (GLM-130B)."""
    noise: float = 0.0
    """Probability that an input token of part B is replaced by the noise token."""


@dataclass(frozen=True)
class InfillingText:
    """A text with blanks as model inputs and targets; arrays [n]."""

    tokens: Ids
    targets: Ids
    weights: Weights
    """Loss weight of each target: 1 where it counts, else 0."""
    positions: Ids
    block_positions: Ids
    sep: int
    """Number of tokens of part A."""

    def __len__(self) -> int:
        return int(self.tokens.size)


def fill_blanks(draws: Draws, text: Ids, spans: Spans, mask: int, ids: Sentinels, rules: Rules) -> InfillingText:
    """A text with the blanks `spans`, each replaced by the token `mask`."""
    starts, lengths = spans.starts, spans.lengths
    count = starts.size
    shown = text.copy()
    shown[starts] = mask
    index = np.arange(text.size)
    hidden = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
    kept = np.ones(text.size, bool)
    kept[hidden] = False
    kept[starts] = True
    part_a = shown[kept]
    mask_at = starts if rules.original_start else starts - (np.cumsum(lengths - 1) - (lengths - 1))
    order = draws.permutation(count) if rules.shuffle else np.arange(count)
    first, size, at = starts[order], lengths[order], mask_at[order]

    pieces = size + 1  # start of piece included
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    source = np.repeat(first, pieces) + within
    inputs = np.where(within == 0, ids.sop, text[source - (within > 0)])
    outputs = np.where(within == np.repeat(size, pieces), ids.eop, text[source.clip(max=text.size - 1)])
    if rules.noise:
        noisy = (draws.uniform(within.size) < rules.noise) & (within > 0)
        inputs = np.where(noisy, ids.noise, inputs)
    sep = part_a.size
    positions = sep + within if rules.counts_on else np.repeat(at, pieces)
    inside = within + 1 if rules.block_positions else np.ones_like(within)
    return InfillingText(
        np.concatenate([part_a, inputs]),
        np.concatenate([part_a, outputs]),
        np.concatenate([np.zeros(sep, np.float32), np.ones(within.size, np.float32)]),
        np.concatenate([index[kept] if rules.original_start else index[:sep], positions]),
        np.concatenate([np.zeros(sep, np.int64), inside]),
        sep,
    )


def continue_text(text: Ids, cut: int, mask: int, ids: Sentinels, rules: Rules) -> InfillingText:
    """A text whose end, from token `cut` on, is the blank. No end of piece: the last target is the text's own last token."""
    length = text.size - cut
    sep = cut + 1
    begun = np.append(text[:cut], mask)
    counts = np.arange(1, length + 1)
    positions = cut + counts if rules.counts_on else np.full(length, cut)
    after = np.zeros(sep, np.int64)
    weights = np.concatenate([np.zeros(sep), text[cut:] != ids.cls]).astype(np.float32)
    return InfillingText(
        np.concatenate([begun, [ids.sop], text[cut:-1]]),
        np.concatenate([begun, text[cut:]]),
        weights,
        np.concatenate([np.arange(sep), positions]),
        np.concatenate([after, counts if rules.block_positions else np.ones_like(counts)]),
        sep,
    )


def sentences_of(text: Ids, ends: npt.NDArray[np.bool_], cls: int, eos: int) -> Spans:
    """The sentences of a text. ends: [vocabulary] whether a token ends one; an eos ends one too, and belongs to none."""
    first = int(text.size > 0 and text[0] == cls)
    is_eos = text == eos
    last = np.flatnonzero(is_eos | ends[text])
    last = last[last >= first]
    starts = np.append(first, last + 1)
    stops = np.append(last + ~is_eos[last], text.size)
    lengths = stops - starts
    return Spans(starts[lengths > 0], lengths[lengths > 0])


def chosen_sentences(draws: Draws, sentences: Spans, target: int) -> Spans | None:
    """Sentences, taken in random order until they have `target` tokens, at least one; None if there are none."""
    if sentences.starts.size == 0:
        return None
    order = draws.permutation(sentences.starts.size)
    count = int(np.searchsorted(np.cumsum(sentences.lengths[order]), max(target, 1))) + 1
    taken = np.sort(order[:count])
    return Spans(sentences.starts[taken], sentences.lengths[taken])
