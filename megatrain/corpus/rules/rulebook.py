"""The rules as data: what each looks at, its threshold and who says so. docs/rules.md is made from this table.

    gopher.words.least     signal quality.words of the words between blanks, at least 50
    gopher.letters         signal quality.letters, at least 0.8; a signal with one bound has a rule of its own name

A rule is asked for by its name or by any beginning of it that ends before a point: `gopher.words` is both bounds, `gopher` the whole set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from megatrain.corpus.rules.view import Words

Bound = Literal["least", "most", "above", "below"]
"""How a signal must lie to its threshold: not below it, not above it, above it, below it."""


@dataclass(frozen=True)
class TextRule:
    """One condition that a document, or a line of it, must meet.

    name     by which it is asked for and reported
    score    by which its signal is stored with a document
    signal   the measure that finds it and its name there, with a point between
    """

    name: str
    score: str
    signal: str
    words: Words
    bound: Bound
    threshold: float
    says: str
    source: str
    acts: Literal["document", "line"] = "document"

    def holds(self, value: float) -> bool:
        """Whether a signal meets the rule."""
        if self.bound in ("least", "above"):
            return value >= self.threshold if self.bound == "least" else value > self.threshold
        return value <= self.threshold if self.bound == "most" else value < self.threshold


Bounds = Mapping[Bound, float]
Row = tuple[str, str, Bounds, str]
"""A signal of a source: its name there, the signal, its bounds, and what it is."""


def _most(threshold: float) -> Bounds:
    return {"most": threshold}


def _rules(prefix: str, words: Words, source: str, rows: Iterable[Row]) -> Iterable[TextRule]:
    """The rules of a source; of a signal with two bounds, a rule for each."""
    for name, signal, bounds, says in rows:
        score = f"{prefix}.{name}"
        for bound, threshold in bounds.items():
            full = score if len(bounds) == 1 else f"{score}.{bound}"
            yield TextRule(full, score, signal, words, bound, threshold, says, source)


GOPHER, TABLE_A1 = "Gopher, arXiv:2112.11446, A.1.1", "Gopher, arXiv:2112.11446, table A1"
QUALITY: tuple[Row, ...] = (
    ("words", "quality.words", {"least": 50, "most": 100_000}, "words, without those of marks alone"),
    ("mean_length", "quality.mean_length", {"least": 3, "most": 10}, "letters a word"),
    ("hashes", "quality.hashes", {"most": 0.1}, "`#` a word"),
    ("ellipses", "quality.ellipses", {"most": 0.1}, "ellipses (`...`, `…`) a word"),
    ("bullets", "lines.bullets", {"most": 0.9}, "share of lines that begin with `•` or `-`"),
    ("cut_lines", "lines.cut", {"most": 0.3}, "share of lines that end in an ellipsis"),
    ("letters", "quality.letters", {"least": 0.8}, "share of words with a letter"),
    ("stop_words", "stop_words_en.words", {"least": 2}, "different ones of the, be, to, of, and, that, have, with"),
)
TOP = "share of letters in the most frequent {} words in a row"
AGAIN = "share of letters in {} words in a row that were there before"
REPETITION: tuple[Row, ...] = (
    ("lines", "parts.lines", {"most": 0.3}, "share of lines that were there before"),
    ("line_letters", "parts.line_letters", {"most": 0.2}, "share of letters in lines that were there before"),
    ("paragraphs", "parts.paragraphs", {"most": 0.3}, "share of paragraphs that were there before"),
    ("paragraph_letters", "parts.paragraph_letters", {"most": 0.2}, "share of letters in paragraphs that were there before"),
    *((f"top_{n}", f"grams.top_{n}", _most(most), TOP.format(n)) for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))),
    *((f"again_{n}", f"grams.again_{n}", _most((20 - n) / 100), AGAIN.format(n)) for n in range(5, 11)),
)


def _table() -> dict[str, TextRule]:
    """Every rule by its name, in the order in which they are told."""
    return {
        rule.name: rule
        for rules in (_rules("gopher", "blanks", GOPHER, QUALITY), _rules("gopher", "blanks", TABLE_A1, REPETITION))
        for rule in rules
    }


RULES: Mapping[str, TextRule] = _table()


def chosen(names: Iterable[str], thresholds: Mapping[str, float | str | bool], words: Words | None = None) -> list[TextRule]:
    """The rules of some names or beginnings of names, with their own thresholds and word table or the given ones.

    thresholds: a number by rule, or "off" (which YAML reads as false) by rule or beginning of names.
    Raises ValueError: nothing has that name; a number for more than one rule; anything else.
    """
    found = {name: RULES[name] for asked in names for name in _named(asked)}
    for asked, value in thresholds.items():
        those = _named(asked)
        if value is False or value == "off":
            for name in those:
                found.pop(name, None)
        elif isinstance(value, (str, bool)):
            raise ValueError(f"the threshold of the rule {asked} is {value!r}: must be a number, or off")
        elif len(those) > 1:
            raise ValueError(
                f"{asked} names {len(those)} rules, which one number cannot serve: say {asked}: off, or name one: {those[0]}"
            )
        elif those[0] in found:
            found[those[0]] = replace(found[those[0]], threshold=float(value))
        else:
            raise ValueError(f"there is a threshold for the rule {those[0]}, which is not asked for: add it to the rules")
    return [rule if words is None else replace(rule, words=words) for rule in found.values()]


def _named(asked: str) -> list[str]:
    """The names of the rules that a name or a beginning stands for."""
    those = [name for name in RULES if name == asked or name.startswith(f"{asked}.")]
    if those:
        return those
    known = sorted({*RULES, *(name[:at] for name in RULES for at, letter in enumerate(name) if letter == ".")})
    near = get_close_matches(asked, known, 1, 0)
    raise ValueError(f"there is no rule {asked!r}; the nearest is {near[0]} (docs/rules.md has all)")
