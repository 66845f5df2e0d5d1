"""Judges documents by rules: finds the signals that they ask for, keeps them as scores, and names the rules that a document breaks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from megatrain.corpus.document import Document, Step, Tally
from megatrain.corpus.rules import gopher
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.rulebook import TextRule, chosen
from megatrain.corpus.rules.view import View, Words

Measure = Callable[[View, Words], dict[str, float]]
MEASURES: Mapping[str, Measure] = {
    "quality": gopher.quality,
    "lines": gopher.lines,
    "stop_words_en": partial(gopher.stop_words, "en"),
    "stop_words_zh": partial(gopher.stop_words, "zh"),
    "parts": gopher.parts,
    "grams": gopher.grams,
}


class Referee:
    """Judges one document after another; of none anything stays."""

    def __init__(self, rules: Sequence[TextRule]) -> None:
        self._rules = rules
        self._counter = Repeats()

    def __call__(self, document: Document, tally: Tally) -> Collection[str]:
        """Store the signals of the rules; the names of those that the document breaks."""
        view = View(document.text, self._counter)
        found: dict[tuple[str, Words], dict[str, float]] = {}
        broken = []
        for rule in self._rules:
            measure, _, signal = rule.signal.partition(".")
            at = (measure, rule.words)
            if at not in found:
                found[at] = MEASURES[measure](view, rule.words)
            value = document.scores[rule.score] = found[at][signal]
            if not rule.holds(value):
                broken.append(rule.name)
        return broken


def rules_step(names: Sequence[str], thresholds: Mapping[str, float | str | bool], words: Words | None = None) -> Step:
    """A step that judges documents by rules. words: what counts as a word; None: what each rule's source says. Raises as `chosen`."""
    return Referee(chosen(names, thresholds, words))
