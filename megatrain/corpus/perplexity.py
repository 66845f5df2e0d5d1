"""Judges documents by their perplexity under an n-gram model of their language (CCNet, arXiv:1911.00359, section 4.3).

    sample_of   a unit's documents of the smallest hashes, scored                a pass of its own
    fit         the samples of all units -> where middle and tail begin          once; written down as thresholds.json
    step        a document -> its score `perplexity`, its part, and whether that part is kept

The sample is that of the smallest hashes of text: the same for any order, number of workers and cut into units, and copies are in it
once. Documents without a model of their language are kept, and counted.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatrain.corpus.document import Document, Step, Tally
from megatrain.corpus.ngram_choices import LanguageModelConfig, PerplexityConfig
from megatrain.corpus.report.bins import bin_of
from megatrain.files import OneLine, brief, opened, whole
from megatrain.ngram.binary import MAGIC
from megatrain.ngram.buckets import Cutoffs, cutoffs_of, perplexities, sound
from megatrain.ngram.model import NgramModel
from megatrain.ngram.reading import load
from megatrain.ngram.units import CHARACTERS, WORDS

SCORE = "perplexity"
PART = "perplexity_part"
"""The mark of a document that says its part: head, middle or tail."""
CODE, BYTES = "code", "bytes"
TOGETHER, TOGETHER_LETTERS = 256, 1 << 20
"""Documents, and their characters, that are scored at once: three times as fast as one by one."""


class ThresholdsError(OneLine, ValueError):
    """A thresholds.json that does not fit; the message says what to do."""


class PerplexityScorer:
    """Scores documents with the model of their language, each read when it is first needed."""

    def __init__(self, settings: PerplexityConfig) -> None:
        """Raises ValueError for two models of one language."""
        self._configs = {model.language: model for model in settings.models}
        if len(self._configs) < len(settings.models):
            names = [model.language for model in settings.models]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"perplexity.models has two models of language {twice}. Leave one of them out.")
        self._models: dict[str, NgramModel] = {}

    def has(self, document: Document) -> bool:
        """Whether there is a model for a document."""
        return language_of(document) in self._configs

    def score(self, documents: Sequence[Document]) -> None:
        """Give each document that lacks it the score `perplexity`, if there is a model. Raises ValueError for a damaged model."""
        by_language: dict[str, list[Document]] = {}
        for document in documents:
            if SCORE not in document.scores and self.has(document):
                by_language.setdefault(language_of(document), []).append(document)
        for language, group in by_language.items():
            values = perplexities(self._model(language), (document.text for document in group))
            for document, value in zip(group, values, strict=True):
                document.scores[SCORE] = sound(value, document.name)

    def scored(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, scored many at a time."""
        waiting: list[Document] = []
        letters = 0
        for document in documents:
            waiting.append(document)
            letters += len(document.text)
            if len(waiting) == TOGETHER or letters >= TOGETHER_LETTERS:
                self.score(waiting)
                yield from waiting
                waiting, letters = [], 0
        self.score(waiting)
        yield from waiting

    def _model(self, language: str) -> NgramModel:
        if language not in self._models:
            config = self._configs[language]
            self._models[language] = load(config.path, config.units)
        return self._models[language]


def language_of(document: Document) -> str:
    """The language whose model judges a document; `code` for code."""
    return CODE if document.kind == CODE else document.language


Sample = dict[str, list[tuple[str, float]]]
"""Language -> hashes of texts (32 hexadecimal digits) with perplexities, the smallest hashes, rising."""


def sample_of(documents: Iterable[Document], settings: PerplexityConfig) -> Sample:
    """The sample of a unit: only documents that may belong to it are scored."""
    scorer, smallest = PerplexityScorer(settings), dict[str, list[str]]()
    candidates = _candidates(documents, scorer, smallest, settings.sample)
    found: dict[str, dict[str, float]] = {}
    for key, document in _with_keys(candidates, scorer):
        found.setdefault(language_of(document), {})[key] = document.scores[SCORE]
    return {language: [(key, found[language][key]) for key in keys] for language, keys in sorted(smallest.items())}


def _candidates(
    documents: Iterable[Document], scorer: PerplexityScorer, smallest: dict[str, list[str]], most: int
) -> Iterator[tuple[str, Document]]:
    """Documents whose hash is among the smallest so far of their language, which are kept up to date in `smallest`."""
    for document in documents:
        if not scorer.has(document):
            continue
        key = xxhash.xxh3_128_hexdigest(document.text.encode())
        keys = smallest.setdefault(language_of(document), [])
        if len(keys) == most and key >= keys[-1]:
            continue
        place = bisect_left(keys, key)
        if place == len(keys) or keys[place] != key:
            keys.insert(place, key)
            del keys[most:]
            yield key, document


def _with_keys(candidates: Iterable[tuple[str, Document]], scorer: PerplexityScorer) -> Iterator[tuple[str, Document]]:
    """The candidates, scored many at a time."""
    keys: list[str] = []

    def documents() -> Iterator[Document]:
        for key, document in candidates:
            keys.append(key)
            yield document

    for number, document in enumerate(scorer.scored(documents())):
        yield keys[number], document


def merged(samples: Iterable[Mapping[str, Sequence[Sequence[Any]]]], most: int) -> Sample:
    """The sample of all units: the smallest hashes of theirs."""
    total: dict[str, dict[str, float]] = {}
    for sample in samples:
        for language, rows in sample.items():
            total.setdefault(language, {}).update((key, value) for key, value in rows)
    return {language: sorted(rows.items())[:most] for language, rows in sorted(total.items())}


@dataclass(frozen=True)
class Threshold:
    """Where middle and tail of a language begin, and what that was found on."""

    middle: float
    tail: float
    documents: int
    """Documents of the sample; without any there are no parts, and all documents of the language are kept."""
    model: str
    """Hash of the model's file (`identity_of`)."""
    units: str

    @property
    def cutoffs(self) -> Cutoffs:
        """The perplexities where middle and tail begin."""
        return Cutoffs(self.middle, self.tail)


Thresholds = dict[str, Threshold]
"""Thresholds by language."""


def fit(samples: Iterable[Mapping[str, Sequence[Sequence[Any]]]], settings: PerplexityConfig) -> Thresholds:
    """The thresholds of each model, from the samples of all units. Raises ValueError for invalid percentiles."""
    found: Thresholds = {}
    sample = merged(samples, settings.sample)
    for model in settings.models:
        rows = sample.get(model.language, [])
        values = np.array([value for _, value in rows], np.float64)
        cutoffs = cutoffs_of(values, settings.percentiles) if rows else Cutoffs(0.0, 0.0)
        found[model.language] = Threshold(cutoffs.middle, cutoffs.tail, len(rows), identity_of(model), model.units)
    return found


def perplexity_step(settings: PerplexityConfig, thresholds: Thresholds) -> Step:
    """The step that scores a document, marks its part, and refuses those that are not kept (`perplexity.tail`).

    Counts documents without a model, and without thresholds (no document of the language was in the sample); these are kept. Documents
    that `PerplexityScorer.scored` has scored many at a time take a third of the time.
    """
    scorer = PerplexityScorer(settings)
    cutoffs = {language: threshold.cutoffs for language, threshold in thresholds.items() if threshold.documents}

    def step(document: Document, tally: Tally) -> Collection[str]:
        language = language_of(document)
        if not scorer.has(document):
            tally.count(f"{SCORE}.no_model/{language or '?'}")
            return ()
        scorer.score([document])
        value = document.scores[SCORE]
        tally.count(f"{SCORE}/{language}/{bin_of(value)}")
        if language not in cutoffs:
            tally.count(f"{SCORE}.no_threshold/{language}")
            return ()
        part = document.marks[PART] = cutoffs[language].bucket(value)
        tally.count(f"{SCORE}.{part}/{language}")
        return () if part in settings.keep else (f"{SCORE}.{part}",)

    return step


def write_thresholds(path: Path, thresholds: Thresholds) -> None:
    """Write thresholds down, the whole file or nothing. Raises OSError."""
    rows = {language: asdict(threshold) for language, threshold in sorted(thresholds.items())}
    with whole(path, text=True) as file:
        file.write(json.dumps({"version": 1, "languages": rows}, indent=1, ensure_ascii=False) + "\n")


def read_thresholds(path: str | Path, settings: PerplexityConfig) -> Thresholds:
    """Thresholds of an earlier preparation. Raises ThresholdsError for a broken file, or one of other models; OSError."""
    with opened(Path(path)) as file:
        data = file.read(1 << 20)
    try:
        values = json.loads(data)
        rows = {language: Threshold(**row) for language, row in values["languages"].items()}
        for threshold in rows.values():
            Cutoffs(float(threshold.middle), float(threshold.tail))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ThresholdsError(
            f"{path}: these are no thresholds of perplexity ({brief(error)}). Leave perplexity.thresholds out, and they are found anew."
        ) from None
    for model in settings.models:
        _require_same(path, rows.get(model.language), model)
    return {model.language: rows[model.language] for model in settings.models}


def _require_same(path: str | Path, threshold: Threshold | None, model: LanguageModelConfig) -> None:
    """Raise ThresholdsError unless thresholds were found with this model."""
    if threshold is None:
        what = f"has no thresholds of language {model.language}"
    elif threshold.units != model.units:
        what = f"was found with units {brief(threshold.units)} for {model.language}, not {model.units}"
    elif threshold.model != identity_of(model):
        what = f"was found with another model of {model.language} than {model.path}"
    else:
        return
    raise ThresholdsError(f"{path} {what}. Leave perplexity.thresholds out, and they are found anew, or give that model.")


def identities(settings: PerplexityConfig) -> list[str]:
    """Hashes of all files that scores and thresholds depend on. Raises OSError."""
    return [*map(identity_of, settings.models), *([] if settings.thresholds is None else [hash_of(settings.thresholds)])]


def identity_of(model: LanguageModelConfig) -> str:
    """A hash of a model, and of the tokenizer whose tokens are its words, if they are. Raises OSError."""
    return hash_of(model.path) + (hash_of(model.units) if model.units not in (WORDS, CHARACTERS, BYTES) else "")


def hash_of(path: str | Path) -> str:
    """A hash of a file, 32 hexadecimal digits. Raises OSError.

    That of a compiled model is of its header alone, which has the checksum of all the rest.
    """
    hashed = xxhash.xxh3_128()
    with opened(Path(path)) as file:
        head = file.read(len(MAGIC) + 4)
        hashed.update(head)
        if head.startswith(MAGIC):
            hashed.update(file.read(int.from_bytes(head[len(MAGIC) :], "little")))
        else:
            while data := file.read(1 << 22):
                hashed.update(data)
    return hashed.hexdigest()
