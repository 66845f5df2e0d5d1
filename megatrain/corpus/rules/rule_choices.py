"""Settings of the language test and of the rules, sections of a corpus config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatrain.config.knob import knob


@dataclass(frozen=True)
class LanguageConfig:
    """How the language of documents is told."""

    detect: Literal["undeclared", "all"] = knob(
        "undeclared",
        "`undeclared`: of documents whose source has the language `auto`; `all`: of all, and `language.other` is 1 where it is not the "
        "source's.",
    )
    letters: int = knob(
        1000,
        "Letters of a document that are looked at: a third each of its beginning, middle and end.",
        at_least=30,
        at_most=1_000_000,
    )
    keep: tuple[str, ...] = knob((), "Codes of the languages that stay, such as `[en, zh]`; empty: all.", not_empty=True)


@dataclass(frozen=True)
class FilterConfig:
    """How documents are judged by the rules of their source (docs/rules.md)."""

    mode: Literal["filter", "annotate"] = knob(
        "filter",
        "`filter`: documents that break a rule go. `annotate`: all stay as they are, with the signals of the rules as scores, and the "
        "names of those that they break as the mark `breaks`.",
    )
    words: Literal["auto", "blanks", "marks", "han", "spacy", "jieba"] = knob(
        "auto",
        "Words: between blanks; each mark by itself too (`marks`); each Chinese character by itself too (`han`); "
        "nearly what spaCy finds in English (`spacy`); or what the package jieba finds, of the extra chinese. `auto`: what each rule's "
        "source says.",
    )
