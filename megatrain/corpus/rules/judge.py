"""Judges documents by rules: finds the signals that they ask for, keeps them as scores, and names the rules that a document breaks.

Rules of lines have their turn where the first of their set is asked for; rules of sets that are named later see the lines that are left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

from megatrain.corpus.document import Document, Step, Tally
from megatrain.corpus.rules import chinese, fineweb, gopher, source_code
from megatrain.corpus.rules.line_signals import LineEditor
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.rulebook import MEETS, TextRule, chosen
from megatrain.corpus.rules.view import Segmenter, View, Words
from megatrain.extras import need

Measure = Callable[[View, Words], dict[str, float]]
MEASURES: Mapping[str, Measure] = {
    "quality": gopher.quality,
    "lines": gopher.lines,
    "stop_words_en": partial(gopher.stop_words, "en"),
    "stop_words_zh": partial(gopher.stop_words, "zh"),
    "parts": gopher.parts,
    "grams": gopher.grams,
    "fineweb": fineweb.fineweb,
    "mc4": fineweb.mc4,
    "map_neo": chinese.map_neo,
    "letters": chinese.letters,
    "web_text": chinese.web_text,
    "roots": chinese.roots,
    "code": source_code.code,
}
Found = dict[tuple[str, Words], Mapping[str, float]]
"""Signals by measure and table of words."""


class Turn(NamedTuple):
    """A rule, as far as each document asks for it."""

    name: str
    score: str
    signal: str
    """Name of the signal, among those of its measure."""
    meets: Callable[[float, float], bool] | None
    """Whether a signal meets a threshold; None for rules of lines."""
    threshold: float

    def holds(self, value: float) -> bool:
        """Whether a signal meets the rule."""
        return self.meets is None or self.meets(value, self.threshold)


Group = tuple[tuple[str, Words], Sequence[Turn]]
"""Rules of one measure and table of words that follow each other."""


def _groups(rules: Sequence[TextRule]) -> list[Group]:
    """The rules of a set in their order."""
    found: list[tuple[tuple[str, Words], list[Turn]]] = []
    for rule in rules:
        measure, _, signal = rule.signal.partition(".")
        if not found or found[-1][0] != (measure, rule.words):
            found.append(((measure, rule.words), []))
        meets = MEETS[rule.bound] if rule.acts == "document" else None
        found[-1][1].append(Turn(rule.name, rule.score, signal, meets, rule.threshold))
    return [*found]


@cache
def _segmenter() -> Segmenter:
    """jieba with its own dictionary, which is read anew: jieba would keep a copy where anybody can write, and believe it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what setuptools will drop
        jieba = need("jieba", "the table of words jieba", "chinese")
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    segmenter: Segmenter = tokenizer.lcut
    return segmenter


class Referee:
    """Judges one document after another; of none anything stays. edits: whether lines that break rules go, or are only told."""

    def __init__(self, rules: Sequence[TextRule], edits: bool = True) -> None:
        self._edits = edits
        self._repeats = Repeats()
        self._segmenter = _segmenter() if any(rule.words == "jieba" for rule in rules) else None
        self._sets: dict[str, list[TextRule]] = {}
        for rule in rules:
            self._sets.setdefault(rule.of, []).append(rule)
        self._groups = {name: _groups(those) for name, those in self._sets.items()}
        self._editors = {
            name: LineEditor(those)
            for name, those in self._sets.items()
            if any(rule.signal.startswith(("line.", "left.")) for rule in those)
        }

    def __call__(self, document: Document, tally: Tally) -> Collection[str]:
        """Keep the signals of the rules with the document; the names of those that it breaks."""
        broken: list[str] = []
        view, found = View(document.text, self._repeats, self._segmenter), Found()
        text = document.text
        for name, rules in self._sets.items():
            if name in self._editors:
                edited = self._editors[name](text, view)
                for rule, lines in edited.removed.items():
                    tally.count(f"lines.{rule}", lines)
                if edited.text != text:
                    text = edited.text
                    view, found = view.of(text), Found()
                found |= {(kind, rule.words): edited.signals for kind in ("line", "left") for rule in rules}
            broken += self._broken(self._groups[name], document, view, found)
        if self._edits:
            document.text = text
        return broken

    def _broken(self, groups: Sequence[Group], document: Document, view: View, found: Found) -> Iterator[str]:
        """Keep the signals of the rules of a set; the names of those that the document breaks."""
        scores = document.scores
        for key, turns in groups:
            if key[0] == "scores":
                yield from (turn.name for turn in turns if turn.signal in scores and not turn.holds(scores[turn.signal]))
                continue
            known = found.get(key)
            if known is None:
                known = found[key] = MEASURES[key[0]](view, key[1])
            for name, score, signal, meets, threshold in turns:
                value = scores[score] = known[signal]
                if meets is not None and not meets(value, threshold):
                    yield name


def rules_step(
    names: Sequence[str], thresholds: Mapping[str, float | str | bool], words: Words | None = None, edits: bool = True
) -> Step:
    """A step that judges documents by rules. Raises ValueError as `chosen`.

    words: the table of words for all of them; None: that of each rule's source
    edits: whether lines that break rules of lines are taken out of the text; either way rules that come later do not see them
    """
    return Referee(chosen(names, thresholds, words), edits)
