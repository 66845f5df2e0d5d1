"""The config of a preparation: its sections, and the knobs that belong to no single room."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatrain.config.effects import Effect, given
from megatrain.config.knob import knob
from megatrain.corpus.cleaning.choices import AugmentConfig, CleanConfig
from megatrain.corpus.duplicates.parameters import DedupConfig
from megatrain.corpus.ngram_choices import PerplexityConfig
from megatrain.corpus.reading.choices import ReadConfig
from megatrain.corpus.rules.rule_choices import FilterConfig, LanguageConfig

TOKENS = Effect(
    "tokenize.tokenizer or tokenize.vocab_size is given",
    ("tokenize.tokenizer", "tokenize.vocab_size"),
    lambda config: config.tokenize.tokenizer is not None or config.tokenize.vocab_size is not None,
)


@dataclass(frozen=True)
class TokenizeConfig:
    """How the documents that are kept become token stores: one for each source."""

    tokenizer: str | None = knob(
        None,
        "`bytes`, or a tokenizer's file (docs/data.md); null: documents are left as text, unless vocab_size is given.",
        path=True,
        use="tokenizer.json",
    )
    vocab_size: int | None = knob(
        None,
        "Entries of a byte-level BPE to train on the documents that are kept, in place of `tokenizer`.",
        at_least=257,
        use=32_000,
    )
    sample: int = knob(
        1 << 26,
        "Bytes of text that such a BPE is trained on, of all sources alike, chosen by a fixed seed and held in memory. A worker trains "
        "alone: 64 MiB take it some 20 s.",
        given("tokenize.vocab_size"),
        at_least=1,
    )
    eod: int | str | None = knob(
        None,
        "Token that ends a document: its name or id; null: as files beside the tokenizer say, or one with a known name (docs/data.md).",
        TOKENS,
        at_least=0,
        not_empty=True,
        use="</s>",
    )
    bos: int | str | None = knob(
        None,
        "Token that begins a document: its name or id, or `none`; null: what the tokenizer puts first, if anything.",
        TOKENS,
        at_least=0,
        not_empty=True,
        use="none",
    )
    append_eod: bool = knob(True, "End each document with the tokenizer's end-of-document token.", TOKENS)
    held_out: float = knob(
        0.005, "Share of documents that goes to stores of its own, for validation; chosen by hash.", at_least=0, below=1
    )
    engine: Literal["auto", "gigatoken", "tokenizers"] = knob(
        "auto", "The library that encodes; `auto`: gigatoken where it is installed and gives the ids of `tokenizers`.", TOKENS
    )
    threads: int = knob(1, "Threads of a worker that encode.", TOKENS, above=0, at_most=1024)


@dataclass(frozen=True)
class OutputConfig:
    """Where the results of a preparation go, and what is shown of them."""

    dir: str = knob("prepared", "Folder of the stores, the documents, the report, and of the work under way.", path=True)
    seed: int = knob(
        1234, "Seed of everything that is drawn: examples, held-out documents, augmentation.", at_least=0, at_most=(1 << 31) - 1
    )
    examples: int = knob(20, "Documents shown of each rule that removed some.", at_least=0, at_most=1000)
    sheet: int = knob(100, "Kept documents on the sheet to read.", at_least=0, at_most=10_000)
    keep_work: bool = knob(
        True,
        "Keep the folder `work` when all is done: about as much as the documents once more, and another config does again only what it "
        "changes. false: it is removed, and the results stay.",
    )


@dataclass(frozen=True)
class RunConfig:
    """Who does the work; none of it changes a byte of the result."""

    on: Literal["local", "slurm", "ray"] = knob(
        "local",
        "Where workers run: processes of this machine, tasks of the SLURM job that this runs in, or tasks of a Ray cluster (extra `ray`).",
    )
    workers: int | None = knob(None, "Workers; null: one for each core, or task of the SLURM job.", above=0, at_most=1 << 16)
    stuck_seconds: float = knob(900.0, "Seconds after which a worker whose unit does not move ends itself.", above=0)


@dataclass(frozen=True)
class PrepareConfig:
    """A preparation."""

    read: ReadConfig = field(default_factory=ReadConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    run: RunConfig = field(default_factory=RunConfig)
