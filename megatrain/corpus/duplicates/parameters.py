"""The section `dedup` of a config: which documents are duplicates, and which are leaks of evaluation sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatrain.config.effects import given, where
from megatrain.config.knob import knob

LEAKS, NEAR = given("dedup.leaks.sets"), where("dedup.near", True)
LINES = where("dedup.lines", "lines", "paragraphs")


@dataclass(frozen=True)
class LeakSet:
    """One evaluation set, whose text no training document may contain."""

    name: str = knob(
        "", "Name of the set; documents with its text are refused by the rule `leaks.NAME`.", not_empty=True, use="gsm8k"
    )
    files: tuple[str, ...] = knob(
        (), "Its files: .jsonl (all text of each row, or `fields`) or any other text (its lines and its paragraphs).", path=True
    )
    fields: tuple[str, ...] = knob((), "Keys of a row of .jsonl that hold text; none: every text of the row.", not_empty=True)


@dataclass(frozen=True)
class LeakConfig:
    """How much of an evaluation set makes a document a leak."""

    sets: tuple[LeakSet, ...] = knob((), "Evaluation sets: a list of {name, files, fields}; none: no document is looked at.")
    words: int = knob(
        13, "Words of a shared passage that make it one (GPT-3, arXiv:2005.14165, appendix C).", LEAKS, at_least=5, at_most=100
    )
    characters: int = knob(
        20,
        "Chinese characters of such a passage, which has no blanks: 13 words of English say what some 20 characters do. In mixed text each "
        "counts its share.",
        LEAKS,
        at_least=5,
        at_most=200,
    )
    shortest: int = knob(
        8,
        "Words of an example that is shorter than a passage and is looked for as a whole; shorter ones are left alone, as honest text "
        "is full of them (GPT-3 has 8 as well).",
        LEAKS,
        at_least=1,
        at_most=100,
    )
    matches: int = knob(1, "Passages of a set that a document must have to be refused.", LEAKS, at_least=1)
    share: float = knob(
        0.0, "Share of its passages that a document must have in a set, besides, to be refused.", LEAKS, at_least=0, at_most=1
    )


@dataclass(frozen=True)
class DedupConfig:
    """Which documents and lines are removed as copies of earlier ones; the earliest stays."""

    exact: Literal["none", "text", "normal"] = knob(
        "text",
        "Documents that are the same: to the letter, or in CCNet's normal form (without case and marks, all digits 0), which is for prose "
        "alone: it takes two tables of numbers, or two programs, for one.",
    )
    near: bool = knob(True, "Remove documents that are nearly the same as an earlier one (MinHash).")
    shingle_words: int = knob(5, "Words of a shingle; a Chinese character is a word.", NEAR, at_least=1, at_most=64)
    bands: int = knob(
        20,
        "Bands of the signature: documents that agree in one are compared. bands * band_rows is at most 120.",
        NEAR,
        at_least=1,
        at_most=120,
    )
    band_rows: int = knob(6, "Hashes of a band.", NEAR, at_least=1, at_most=120)
    agreement: float = knob(
        0.7, "Share of the 120 hashes in which a document agrees with the earlier one to be removed.", NEAR, above=0, at_most=1
    )
    lines: Literal["none", "lines", "paragraphs"] = knob(
        "none",
        "Remove lines, or paragraphs (between empty lines), that an earlier document or line has in normal form (CCNet, arXiv:1911.00359). "
        "It cleans pages of menus and footers, and takes refrains and formulas out of books: so it is not the default.",
    )
    line_letters: int = knob(
        12, "Letters in normal form, blanks included, that a line must have to be removed.", LINES, at_least=1
    )
    parts: int | None = knob(
        None,
        "Parts by hash into which each comparison is divided; null: as many as the memory of a task demands. Results are the same.",
        at_least=1,
        at_most=1 << 16,
        use=16,
    )
    alarm_share: float = knob(
        0.3, "Share of a source's documents, removed, above which the report warns.", at_least=0, at_most=1
    )
    alarm_cluster: int = knob(1000, "Copies of one document above which the report warns.", at_least=1)
    leaks: LeakConfig = LeakConfig()

    def __post_init__(self) -> None:
        bands, rows = self.bands, self.band_rows
        if bands * rows > 120:
            raise ValueError(
                f"dedup.bands={bands} of dedup.band_rows={rows} hashes are {bands * rows}, and a signature has 120. Use "
                f"bands={120 // rows} with band_rows={rows}, or bands={bands} with band_rows={120 // bands}."
            )
