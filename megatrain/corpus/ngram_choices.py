"""The n-gram models that documents are judged by: what a config says under `perplexity:`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatrain.config.effects import given
from megatrain.config.knob import knob

MODELS = given("perplexity.models")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The model of one language."""

    language: str = knob(
        "",
        "Language of the documents that it judges, as ISO 639-1 has it; `code`: documents of that kind.",
        not_empty=True,
        use="en",
    )
    path: str = knob("", "The model, compiled or as an ARPA file (docs/ngram.md).", path=True, use="wiki_en.bin")
    units: str = knob(
        "words",
        "What it was fitted to: `words` between blanks, `characters`, `bytes`, or the path of a tokenizer.json.",
        not_empty=True,
    )


@dataclass(frozen=True)
class PerplexityConfig:
    """Documents by how usual their text is to a model of their language, as CCNet sorts them."""

    models: tuple[LanguageModelConfig, ...] = knob(
        (),
        "A model for each language: a list of mappings with the keys below. Documents of other languages are kept, and counted.",
    )
    keep: tuple[Literal["head", "middle", "tail"], ...] = knob(
        ("head", "middle"), "The parts that are kept, by perplexity: head is the most usual text.", MODELS
    )
    percentiles: tuple[float, float] = knob(
        (30.0, 60.0),
        "Percentiles of each language's sample where the middle and the tail begin.",
        MODELS,
        at_least=0,
        at_most=100,
    )
    sample: int = knob(
        10_000,
        "Documents of each language that the percentiles are found on: those with the smallest hashes of their text, whatever their order. "
        "10,000 place the 30th percentile within half a percent.",
        MODELS,
        at_least=1,
        at_most=1_000_000,
    )
    thresholds: str | None = knob(
        None,
        "A thresholds.json of an earlier preparation, with the same models, whose perplexities are taken; null: found on a sample.",
        MODELS,
        path=True,
        use="prepared/thresholds.json",
    )
