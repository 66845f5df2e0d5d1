"""GLM samples: texts with blanks, a pure function of (seed, sample): every epoch masks differently, and a run resumes exactly.

A text is [CLS], the tokens of a document and its eos, and further documents in the same way, `text_length` tokens at most; the rest of
seq_length is room for the sentinels of its blanks. Its objective, and what else GLM's code draws once a batch, is a function of
(seed, samples consumed before the step, micro-batch), the same under every layout.

Every micro-batch has one shape [b, seq_length]. A sample whose blanks do not fit keeps its text with loss weights of 0. Short texts, and
isolated documents, follow one another in a row, each with parts A and B of its own, and do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatrain.config.schema import GlmConfig
from megatrain.data.draws import Draws
from megatrain.data.loader import Batch, Samples
from megatrain.data.samples.infilling import (
    InfillingText,
    Rules,
    Sentinels,
    chosen_sentences,
    continue_text,
    fill_blanks,
    sentences_of,
)
from megatrain.data.samples.spans import Ids, Spans, blanks_of, documents_of, length_moments, place

KINDS = ("blank", "sentence", "document")
"""Objectives, by their number in `Batch.kinds`."""
OF_BATCH, OF_SAMPLE = 11, 12
"""Part of the key of a stream of random numbers: draws for a micro-batch, for a sample."""
SHORTEST = 32
"""Least number of tokens of a short text."""


@dataclass(frozen=True)
class Plan:
    """Settings by which texts become samples."""

    config: GlmConfig
    ids: Sentinels
    seq_length: int
    seed: int
    sentence_ends: npt.NDArray[np.bool_] | None = None
    """[vocabulary] whether a token ends a sentence."""
    isolate: bool = False
    """Whether each document is a text of its own, which does not see others."""
    two_dimensional: bool = True
    closed: bool = True
    """Whether documents of the stores end in eos; else eos is added."""
    answers: bool = False
    """Whether some samples are prompts with answers."""

    @cached_property
    def text_length(self) -> int:
        """Number of tokens of a text, with [CLS]."""
        return text_length(self.config, self.seq_length)

    @property
    def packed(self) -> bool:
        """Whether a row may hold several texts that do not see each other."""
        return self.isolate or self.answers or self.config.short_seq_prob > 0

    @cached_property
    def rules(self) -> Rules:
        """Rules for the positions and the order of blanks."""
        c = self.config
        return Rules(c.shuffle_spans, c.position_dim1 == "original_start", c.position_dim2, False, c.blank.decoder_noise_prob)


def text_length(config: GlmConfig, seq_length: int) -> int:
    """Number of tokens of the longest text whose blanks fit into seq_length with their sentinels, but for one draw in some ten thousand."""
    if config.text_length is not None:
        return config.text_length
    mix = config.objective_mix
    ratio = max([config.blank.mask_ratio * (mix.blank > 0), config.sentence.mask_ratio * (mix.sentence > 0)])
    mean, variance = length_moments(config.blank)

    def room(size: int) -> float:
        spans = ratio * size / mean
        return 2 * max(1.0, math.ceil(spans + 1 + 4 * math.sqrt(spans * variance) / mean))

    return max((n for n in range(1, seq_length - 1) if n + room(n) <= seq_length), default=0)


@dataclass(frozen=True)
class Drawn:
    """The numbers drawn once for a micro-batch."""

    kind: int
    single: bool = False
    short: int = 0
    """Number of tokens of a short text; 0: texts stay whole."""
    span: int = 0
    """Length of the document objective's span in tokens; 0: each sample draws its own."""


class GlmBatches:
    """Makes batches of samples of text: a `Compose`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        mix = plan.config.objective_mix
        self.shares = np.array([mix.blank, mix.sentence, mix.document])

    def __call__(self, samples: Samples, consumed: int, places: npt.NDArray[np.int64]) -> Batch:
        """The batch of samples consumed + places [m, b]."""
        rows: list[list[InfillingText]] = []
        kinds: list[int] = []
        for of_micro_batch in places:
            numbers = [consumed + int(place) for place in of_micro_batch]
            pairs = [samples.pairs(n) for n in numbers]
            texts = [self.text(samples, n) if pair is None else [] for n, pair in zip(numbers, pairs, strict=True)]
            sizes = [sum(len(d) for d in text) for text, pair in zip(texts, pairs, strict=True) if pair is None]
            key = self.plan.seed, OF_BATCH, consumed, int(of_micro_batch[0]) // places.shape[1]
            drawn = self.choose(Draws(*key), sizes or [self.plan.text_length])
            for n, at, text, pair in zip(numbers, of_micro_batch, texts, pairs, strict=True):
                if pair is not None:
                    kinds.append(KINDS.index("document"))
                    rows.append(self.answered(pair))
                    continue
                draws = Draws(self.plan.seed, OF_SAMPLE, n)
                kind = self._kind(draws, int(at), drawn)
                kinds.append(kind)
                rows.append(self.lay_out(draws, text, replace(drawn, kind=kind)))
        return assembled(rows, kinds, places, self.plan)

    def text(self, samples: Samples, n: int) -> list[Ids]:
        """The documents of sample n, each with its [CLS]; at most text_length tokens together."""
        left = self.plan.text_length
        tokens, numbers = samples.sample(n)[: left - 1], samples.document_numbers(n)[:left]
        return self.documents(tokens, numbers)

    def documents(self, tokens: Ids, numbers: Ids) -> list[Ids]:
        """Documents, each with its [CLS], from tokens [n] and the number of each token's document [n + 1], or [n] at the end of a store."""
        ids, left, found = self.plan.ids, self.plan.text_length, []
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        for number, piece in enumerate(np.split(tokens, cuts[cuts < tokens.size])):
            ended = not self.plan.closed and number < cuts.size
            document = np.concatenate([[ids.cls], piece, [ids.eos] if ended else []]).astype(np.int64)[:left]
            left -= document.size
            if document.size > 1:
                found.append(document)
        return found

    def choose(self, draws: Draws, sizes: Sequence[int]) -> Drawn:
        """Draw the numbers of a micro-batch; sizes: number of tokens of each of its texts."""
        config = self.plan.config
        short, single, kind, length = draws.uniform(4)
        cut = 0
        if short < config.short_seq_prob:
            cut = draws.between(SHORTEST, max(SHORTEST, self.plan.text_length - 2))
        if single < config.blank.single_span_prob:
            return Drawn(0, single=True, short=cut)
        chosen = self._drawn(kind)
        if config.document.length_granularity == "sample" or cut or self.plan.isolate:
            return Drawn(chosen, short=cut)
        return Drawn(chosen, span=self._span(length, min(sizes), max(sizes)))

    def _drawn(self, number: float) -> int:
        """The objective for a random number in [0, 1), by the shares."""
        return int(np.searchsorted(np.cumsum(self.shares / self.shares.sum()), number, side="right").clip(max=2))

    def _kind(self, draws: Draws, at: int, drawn: Drawn) -> int:
        """The objective of the sample at place `at` of the global batch."""
        config = self.plan.config
        if config.objective_mix.mode == "weighted":
            present = np.flatnonzero(self.shares)
            return int(present[at % present.size])
        if config.objective_granularity == "sample" and not drawn.single:
            return self._drawn(draws.one())
        return drawn.kind

    def _span(self, number: float, shortest: int, longest: int) -> int:
        """Length of the document objective's span for a random number in [0, 1)."""
        document = self.plan.config.document
        least = max(1, int(document.min_ratio * shortest))
        most = max(least, min(int(document.max_ratio * longest), longest - document.reserve_tokens))
        return least + int(number * (most - least + 1))

    # --- one row ----------------------------------------------------------------------------------------------------------

    def lay_out(self, draws: Draws, documents: Sequence[Ids], drawn: Drawn) -> list[InfillingText]:
        """The texts of a row that fit into it, with their blanks; a text whose blanks cannot be placed stays whole, with loss weights of
        0.
        """
        room, found = self.plan.seq_length, []
        for text in self._texts(documents, drawn.short):
            laid = self._laid(draws, text, drawn)
            if laid is None or len(laid) > room:
                kept = text[:room]
                weights, zeros = np.zeros(kept.size, np.float32), np.zeros(kept.size, np.int64)
                laid = InfillingText(kept, kept, weights, np.arange(kept.size), zeros, kept.size)
            if len(laid):
                found.append(laid)
            room -= len(laid)
        return found

    def answered(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[InfillingText]:
        """Prompts, each followed by [gMASK] and the answer as its blank, as many as fit; a pair that is too long loses its beginning."""
        ids, room, found = self.plan.ids, self.plan.seq_length, []
        rules = replace(self.plan.rules, counts_on=not self.plan.two_dimensional, noise=0.0)
        for prompt, answer in pairs:
            reply = answer if answer.size and answer[-1] == ids.eos else np.append(answer, ids.eos)
            reply = reply[: self.plan.seq_length - 3]
            kept = prompt[max(0, prompt.size + reply.size + 3 - self.plan.seq_length) :]
            text = np.concatenate([[ids.cls], kept, reply])
            if text.size + 2 > room:
                break
            found.append(continue_text(text, text.size - reply.size, ids.gmask, ids, rules))
            room -= text.size + 2
        return found

    def _texts(self, documents: Sequence[Ids], short: int) -> list[Ids]:
        """The texts to lay out separately: all documents together, each by itself, or short pieces of all."""
        if self.plan.isolate and not short:
            return list(documents)
        if not documents:
            return []
        whole = np.concatenate(documents)
        return self._short_texts(whole, short) if short else [whole]

    def _short_texts(self, text: Ids, size: int) -> list[Ids]:
        """Pieces of a text, at most `size` tokens each with a [CLS]; they end at a sentence's end if that keeps more than half."""
        cls, begin, found = self.plan.ids.cls, 1, []
        for _ in range(max(1, (self.plan.text_length - 1) // size)):
            end = min(begin + size - 1, text.size)
            if end < text.size and self.plan.sentence_ends is not None:
                stops = np.flatnonzero(self.plan.sentence_ends[text[begin:end]] | (text[begin:end] == self.plan.ids.eos))
                if stops.size and stops[-1] + 1 > (end - begin) // 2:
                    end = begin + int(stops[-1]) + 1
            if end <= begin:
                break
            found.append(np.append(cls, text[begin:end]))
            begin = end
        return found

    def _laid(self, draws: Draws, text: Ids, drawn: Drawn) -> InfillingText | None:
        """A text with the blanks of its objective; None if they cannot be placed."""
        config, ids, rules = self.plan.config, self.plan.ids, self.plan.rules
        if KINDS[drawn.kind] == "document":
            return self._long_blank(draws, text, drawn.span)
        if KINDS[drawn.kind] == "sentence":
            if self.plan.sentence_ends is None:
                raise ValueError("the sentence objective needs a table of the tokens that end sentences")
            sentences = sentences_of(text, self.plan.sentence_ends, ids.cls, ids.eos)
            spans = chosen_sentences(draws, sentences, int(config.sentence.mask_ratio * text.size))
            mask, rules = ids.smask, replace(rules, noise=0.0)
        else:
            spans = blanks_of(draws, config.blank, text, documents_of(text, ids.cls, ids.eos), single=drawn.single)
            mask = ids.mask
        return None if spans is None or not spans.starts.size else fill_blanks(draws, text, spans, mask, ids, rules)

    def _long_blank(self, draws: Draws, text: Ids, span: int) -> InfillingText | None:
        """A text whose end, or a long span within it, is the blank; None if it is too short."""
        config, ids = self.plan.config, self.plan.ids
        rules = replace(self.plan.rules, counts_on=not self.plan.two_dimensional, noise=0.0)
        most = text.size - config.document.reserve_tokens
        length = min(span or self._span(draws.one(), text.size, text.size), most)
        if length < 1:
            return None
        documents = documents_of(text, ids.cls, ids.eos)
        if len(documents) != 1 or draws.one() < config.document.suffix_prob:
            return continue_text(text, text.size - length, ids.gmask, ids, rules)
        spans: Spans | None = place(draws, config.blank, documents, np.array([length]))
        return None if spans is None else fill_blanks(draws, text, spans, ids.gmask, ids, rules)


def assembled(
    rows: Sequence[Sequence[InfillingText]], kinds: Sequence[int], places: npt.NDArray[np.int64], plan: Plan
) -> Batch:
    """A batch from rows of texts with blanks, padded with zeros on the right."""
    shape = (len(rows), plan.seq_length)
    tokens, targets, positions, block_positions, documents, prefix = (np.zeros(shape, np.int64) for _ in range(6))
    weights = np.zeros(shape, np.float32)
    for row, texts in enumerate(rows):
        begin = 0
        for number, text in enumerate(texts):
            here = row, slice(begin, begin + len(text))
            tokens[here], targets[here], weights[here] = text.tokens, text.targets, text.weights
            positions[here], block_positions[here] = text.positions, text.block_positions
            documents[here], prefix[here] = number, begin + text.sep
            begin += len(text)
        documents[row, begin:], prefix[row, begin:] = len(texts), 0

    def dealt(array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return array.reshape(*places.shape, -1)

    loss_weights = weights.reshape(*places.shape, -1)
    of = np.array(kinds, np.int64).reshape(places.shape)
    if plan.config.loss_norm == "microbatch":
        loss_weights = _normalised(loss_weights, of if plan.config.objective_mix.mode == "weighted" else np.zeros_like(of))
    seps = np.array([texts[0].sep if texts else 0 for texts in rows], np.int64)
    return Batch(
        dealt(tokens),
        dealt(targets),
        loss_weights,
        dealt(positions),
        places,
        documents=dealt(documents) if plan.packed else None,
        block_positions=dealt(block_positions),
        prefix=dealt(prefix) if plan.packed else seps.reshape(places.shape),
        kinds=of,
    )


def _normalised(weights: npt.NDArray[np.float32], groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Weights [m, b, s], scaled in each micro-batch to sum to 1 over each group of sequences [m, b], or to 0."""
    result = weights.copy()
    for group in np.unique(groups):
        mine = (groups == group)[:, :, None]
        sums = (weights * mine).sum((1, 2), keepdims=True, dtype=np.float64)
        result = np.where(mine, weights / np.maximum(sums, 1), result).astype(np.float32)
    return result
