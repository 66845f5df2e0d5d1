"""The `data.glm` section: which text of a sample becomes blanks, and what the model reads in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatrain.config import effects
from megatrain.config.knob import knob


@dataclass(frozen=True)
class ObjectiveMix:
    """Shares of GLM's three objectives: blank short spans, whole sentences, one long span."""

    mode: Literal["sample", "weighted"] = knob(
        "sample",
        "sample: an objective is drawn with the probability of its share; weighted: every batch has all objectives, and the "
        "loss is the sum of share x mean loss of each.",
        effects.BLANKS,
    )
    blank: float = knob(0.5, "Share of the objective that blanks short spans ([MASK]).", effects.BLANKS, at_least=0)
    sentence: float = knob(
        0.3,
        "Share of the objective that blanks whole sentences ([sMASK]); it needs data.tokenizer.",
        effects.BLANKS,
        at_least=0,
    )
    document: float = knob(0.2, "Share of the objective that blanks one long span ([gMASK]).", effects.BLANKS, at_least=0)


@dataclass(frozen=True)
class BlankConfig:
    """How short spans are blanked ([MASK])."""

    mask_ratio: float = knob(
        0.15,
        "Share of the tokens that lie in spans; the last span is kept whole, so a little more.",
        effects.BLANKS,
        above=0,
        below=1,
    )
    poisson_lambda: float = knob(
        3.0,
        "Mean of the Poisson distribution of span lengths, before it is restricted to min_span .. max_span.",
        effects.BLANKS,
        above=0,
        at_most=1 << 16,
    )
    min_span: int = knob(1, "Tokens of the shortest span.", effects.BLANKS, above=0, at_most=1 << 16)
    max_span: int = knob(39, "Tokens of the longest span.", effects.BLANKS, above=0, at_most=1 << 16)
    min_gap: int = knob(1, "Least number of unmasked tokens between neighbouring spans.", effects.BLANKS, at_least=0)
    overflow: Literal["keep", "clip", "drop"] = knob(
        "keep", "Treatment of the span that exceeds mask_ratio: keep it whole, clip it, or drop it.", effects.BLANKS
    )
    on_unplaceable: Literal["drop", "redraw"] = knob(
        "drop",
        "Treatment of a sample whose spans do not all fit. drop: the sample has no loss; redraw: lengths are drawn again, up "
        "to 8 times.",
        effects.BLANKS,
    )
    span_layout: Literal["sorted_draws", "uniform"] = knob(
        "sorted_draws",
        "Distribution of the spans' places: sorted independent draws, as in GLM's code, or uniform over all arrangements.",
        effects.BLANKS,
    )
    single_span_prob: float = knob(
        0.0, "Probability that a sample has exactly one span.", effects.BLANKS, at_least=0, at_most=1
    )
    decoder_noise_prob: float = knob(
        0.0,
        "Probability that an input token of part B is replaced by the noise token; its target stays.",
        effects.NOISY,
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class DocumentConfig:
    """How one long span is blanked ([gMASK])."""

    min_ratio: float = knob(
        0.5, "Least share of the text that is generated (GLM's released runs: 0.25).", effects.SPANS, at_least=0, at_most=1
    )
    max_ratio: float = knob(1.0, "Largest share of the text that is generated.", effects.SPANS, above=0, at_most=1)
    reserve_tokens: int = knob(2, "Least number of tokens of the text that stay unmasked.", effects.SPANS, at_least=0)
    suffix_prob: float = knob(
        0.5,
        "Probability that the span is the end of the text; it always is where a sample has several documents.",
        effects.SPANS,
        at_least=0,
        at_most=1,
    )
    length_granularity: Literal["batch", "sample"] = knob(
        "batch", "Draw one length for a whole micro-batch, or one for each sample.", effects.SPANS
    )


@dataclass(frozen=True)
class SentenceConfig:
    """How whole sentences are blanked ([sMASK])."""

    mask_ratio: float = knob(
        0.15, "Least share of the tokens that lie in masked sentences.", effects.SENTENCES, above=0, below=1
    )
    end_chars: str = knob(
        ".?!;:\u3002\uff1f\uff01\uff1b\u2026\n",
        "Characters that end a sentence: a token whose text has one of them is a sentence's last.",
        effects.ENDS,
        not_empty=True,
    )


@dataclass(frozen=True)
class SentinelConfig:
    """Ids of the special tokens; null: the tokenizer's, or an id after its vocabulary if it has none."""

    cls: int | None = knob(
        None,
        "Id of [CLS], which begins a text; null: the tokenizer's, or a new id after its vocabulary.",
        effects.BLANKS,
        at_least=0,
    )
    eos: int | None = knob(
        None, "Id of the token that ends a document; null: the tokenizer's, or new.", effects.BLANKS, at_least=0
    )
    mask: int | None = knob(
        None, "Id of [MASK], which stands for a span; null: the tokenizer's, or new.", effects.BLANKS, at_least=0
    )
    gmask: int | None = knob(
        None,
        "Id of [gMASK], which stands for the end of a text; null: the tokenizer's, or new.",
        effects.TASK_MASKS,
        at_least=0,
    )
    smask: int | None = knob(
        None, "Id of [sMASK], which stands for a sentence; null: the tokenizer's, or new.", effects.TASK_MASKS, at_least=0
    )
    sop: int | None = knob(
        None,
        "Id of <|startofpiece|>, which begins the text of a blank; null: the tokenizer's, or new.",
        effects.BLANKS,
        at_least=0,
    )
    eop: int | None = knob(
        None, "Id of <|endofpiece|>, which ends the text of a blank; null: the tokenizer's, or new.", effects.BLANKS, at_least=0
    )
    noise: int | None = knob(
        None, "Id of [dBLOCK], the noise token of decoder_noise_prob; null: the tokenizer's, or new.", effects.NOISE, at_least=0
    )


@dataclass(frozen=True)
class GlmConfig:
    """How blanks are made and laid out."""

    objective_mix: ObjectiveMix = field(default_factory=ObjectiveMix)
    objective_granularity: Literal["batch", "sample"] = knob(
        "batch", "Draw the objective for a whole micro-batch, or for each sample.", effects.DRAWN
    )
    blank: BlankConfig = field(default_factory=BlankConfig)
    document: DocumentConfig = field(default_factory=DocumentConfig)
    sentence: SentenceConfig = field(default_factory=SentenceConfig)
    tokens: SentinelConfig = field(default_factory=SentinelConfig)
    text_length: int | None = knob(
        None,
        "Tokens of text in a sample, [CLS] included; null leaves room in seq_length for the special tokens of nearly every "
        "draw.",
        effects.BLANKS,
        above=0,
    )
    shuffle_spans: bool = knob(
        True, "Put the blanks of part B in random order; false: in the order of the text.", effects.BLANKS
    )
    task_masks: bool = knob(True, "Use [gMASK] and [sMASK] beside [MASK]; false: [MASK] stands for all three.", effects.BLANKS)
    position_dim1: Literal["corrupted", "original_start"] = knob(
        "corrupted",
        "First position: corrupted counts the text with its blanks; original_start counts the original text, so that part A "
        "shows how long a blank is.",
        effects.BLANKS,
    )
    position_dim2: bool = knob(
        True, "Second position: counts within a blank; false: it is 1 in all of part B.", effects.SECOND_POSITIONS
    )
    short_seq_prob: float = knob(
        0.0,
        "Probability that the samples of a micro-batch are cut into short texts that do not see each other.",
        effects.BLANKS,
        at_least=0,
        at_most=1,
    )
    loss_norm: Literal["global_tokens", "microbatch"] = knob(
        "global_tokens",
        "global_tokens: the loss is a mean over the tokens of the global batch; microbatch: a mean of the means of "
        "micro-batches (GLM's code).",
        effects.BLANKS,
    )


# --- data, optimizer, run, checkpoints and logs -------------------------------------------------------------------------------
