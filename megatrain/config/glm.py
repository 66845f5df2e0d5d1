"""The knobs of GLM's objectives (`data.glm`): how spans of a text become blanks, and how a sample is laid out (docs/glm.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatrain.config import effects
from megatrain.config.knob import knob


@dataclass(frozen=True)
class ObjectiveMix:
    """Shares of the three objectives: short spans, sentences, one long span."""

    mode: Literal["sample", "weighted"] = knob(
        "sample",
        "sample: each is drawn with its share; weighted: every batch has all, and the loss is the sum of share x its mean.",
        effects.BLANKS,
    )
    blank: float = knob(0.5, "Share of short spans ([MASK]).", effects.BLANKS)
    sentence: float = knob(0.3, "Share of whole sentences ([sMASK]); it needs data.tokenizer.", effects.BLANKS)
    document: float = knob(0.2, "Share of one long span ([gMASK]).", effects.BLANKS)


@dataclass(frozen=True)
class BlankConfig:
    """Short spans."""

    mask_ratio: float = knob(
        0.15, "Share of the tokens in spans; the last span is kept whole, so a little more.", effects.BLANKS
    )
    poisson_lambda: float = knob(3.0, "Lengths are Poisson-distributed, restricted to min_span .. max_span.", effects.BLANKS)
    min_span: int = knob(1, "Tokens of the shortest span.", effects.BLANKS)
    max_span: int = knob(39, "Tokens of the longest span.", effects.BLANKS)
    min_gap: int = knob(1, "Least number of unmasked tokens between neighbouring spans.", effects.BLANKS)
    overflow: Literal["keep", "clip", "drop"] = knob(
        "keep", "The span that exceeds mask_ratio: keep it whole, clip it, or drop it.", effects.BLANKS
    )
    on_unplaceable: Literal["drop", "redraw"] = knob(
        "drop",
        "Where not all spans fit: drop: the sample has no loss; redraw: draw lengths again, up to 8 times.",
        effects.BLANKS,
    )
    span_layout: Literal["sorted_draws", "uniform"] = knob(
        "sorted_draws",
        "Places of spans: sorted independent draws, as in GLM's code, or each arrangement equally often.",
        effects.BLANKS,
    )
    single_span_prob: float = knob(0.0, "Probability that a sample has exactly one span.", effects.BLANKS)
    decoder_noise_prob: float = knob(
        0.0, "Probability that an input token of part B is replaced by the noise token; its target stays.", effects.NOISY
    )


@dataclass(frozen=True)
class DocumentConfig:
    """One long span."""

    min_ratio: float = knob(0.5, "Share of the text that is generated, at least (GLM's released runs: 0.25).", effects.SPANS)
    max_ratio: float = knob(1.0, "Share of the text that is generated, at most.", effects.SPANS)
    reserve_tokens: int = knob(2, "Least number of tokens of the text that stay unmasked.", effects.SPANS)
    suffix_prob: float = knob(
        0.5, "Probability that the span is the end of the text; always so where a sample has several documents.", effects.SPANS
    )
    length_granularity: Literal["batch", "sample"] = knob(
        "batch", "Draw one length for a micro-batch, or one for each sample.", effects.SPANS
    )


@dataclass(frozen=True)
class SentenceConfig:
    """Whole sentences."""

    mask_ratio: float = knob(0.15, "Share of the tokens in masked sentences, at least.", effects.SENTENCES)
    end_chars: str = knob(".?!;:\u3002\uff1f\uff01\uff1b\u2026\n", "A token with one of these ends a sentence.", effects.ENDS)


@dataclass(frozen=True)
class SentinelConfig:
    """Ids of the special tokens; null: the tokenizer's, or an id after its vocabulary if it has none."""

    cls: int | None = knob(None, "Begins a text: [CLS].", effects.BLANKS)
    eos: int | None = knob(None, "Ends a document; null means the tokenizer's.", effects.BLANKS)
    mask: int | None = knob(None, "Stands for a span: [MASK].", effects.BLANKS)
    gmask: int | None = knob(None, "Stands for the end of a text: [gMASK].", effects.TASK_MASKS)
    smask: int | None = knob(None, "Stands for a sentence: [sMASK].", effects.TASK_MASKS)
    sop: int | None = knob(None, "Begins the text of a blank: <|startofpiece|>.", effects.BLANKS)
    eop: int | None = knob(None, "Ends the text of a blank: <|endofpiece|>.", effects.BLANKS)
    noise: int | None = knob(None, "decoder_noise_prob: [dBLOCK].", effects.NOISE)


@dataclass(frozen=True)
class GlmConfig:
    """How blanks are made and laid out."""

    objective_mix: ObjectiveMix = field(default_factory=ObjectiveMix)
    objective_granularity: Literal["batch", "sample"] = knob(
        "batch", "The objective is drawn for a micro-batch, or for each sample.", effects.DRAWN
    )
    blank: BlankConfig = field(default_factory=BlankConfig)
    document: DocumentConfig = field(default_factory=DocumentConfig)
    sentence: SentenceConfig = field(default_factory=SentenceConfig)
    tokens: SentinelConfig = field(default_factory=SentinelConfig)
    text_length: int | None = knob(
        None,
        "Tokens of text in a sample, with [CLS]; null leaves room in seq_length for the sentinels of nearly every draw.",
        effects.BLANKS,
    )
    shuffle_spans: bool = knob(True, "Part B has the blanks in random order; false: in the order of the text.", effects.BLANKS)
    task_masks: bool = knob(
        True, "[gMASK] and [sMASK] are tokens of their own; false: [MASK] stands for all three.", effects.BLANKS
    )
    position_dim1: Literal["corrupted", "original_start"] = knob(
        "corrupted",
        "Positions count the text with its blanks, or the original one (part A then sees how long a blank is).",
        effects.BLANKS,
    )
    position_dim2: bool = knob(
        True, "The second position counts within a blank; false: it is 1 in all of part B.", effects.SECOND_POSITIONS
    )
    short_seq_prob: float = knob(
        0.0,
        "Probability that the samples of a micro-batch are cut into short texts that do not see each other.",
        effects.BLANKS,
    )
    loss_norm: Literal["global_tokens", "microbatch"] = knob(
        "global_tokens",
        "The loss is a mean over the tokens of the global batch, or a mean of the means of micro-batches (GLM's code).",
        effects.BLANKS,
    )
