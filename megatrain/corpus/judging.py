"""Which rules a document goes through: those of its source, or, where that says `auto`, those of its kind and language."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatrain.corpus.document import Document, Step, Tally
from megatrain.corpus.reading.choices import SourceConfig
from megatrain.corpus.rules.judge import rules_step
from megatrain.corpus.rules.rule_choices import FilterConfig
from megatrain.corpus.rules.rulebook import named

AUTO = "auto"
SETS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("text", "en"): ("gopher", "c4", "fineweb"),
    ("text", "zh"): ("fineweb2_zh",),
    ("code", ""): ("code",),
}
"""Sets of rules by kind and language, "" standing for any; others have none (docs/rules.md)."""

OFF: Mapping[str, bool] = {"c4.line_end": False}
"""Rules that `auto` leaves off, as FineWeb does, unless a source names them or gives a threshold: it takes wrapped text apart."""


class RulesByKind:
    """Judges documents of one source."""

    def __init__(self, source: SourceConfig, settings: FilterConfig) -> None:
        """Raises ValueError for a rule or threshold that there is none of."""
        self._source, self._settings = source, settings
        self._steps: dict[tuple[str, str], Step] = {}
        for rule, _ in source.thresholds:
            named(rule)
        if source.rules != (AUTO,) or source.language != AUTO:
            self._step(source.kind, "" if source.language == AUTO else source.language)

    def __call__(self, document: Document, tally: Tally) -> Collection[str]:
        """The rules that refuse a document; its signals are kept with it."""
        return self._step(document.kind, document.language)(document, tally)

    def _step(self, kind: str, language: str) -> Step:
        auto = AUTO in self._source.rules
        key = (kind, language) if auto else ("", "")
        if key not in self._steps:
            usual = SETS.get(key, SETS.get((kind, ""), ())) if auto else ()
            own = tuple(name for name in self._source.rules if name != AUTO)
            off = {rule: value for rule, value in OFF.items() if auto and not _those_of(own, {rule: value})}
            words = None if self._settings.words == "auto" else self._settings.words
            names, thresholds = (*usual, *own), {**off, **dict(self._source.thresholds)}
            if auto and language != self._source.language:
                thresholds = _those_of(names, thresholds)
            self._steps[key] = rules_step(names, thresholds, words, edits=self._settings.mode == "filter")
        return self._steps[key]


def _those_of(names: Collection[str], thresholds: Mapping[str, float | bool]) -> dict[str, float | bool]:
    """The thresholds of the rules of some sets: a source of several languages has some for each."""
    return {
        rule: value for rule, value in thresholds.items() if any(rule == name or rule.startswith(f"{name}.") for name in names)
    }
