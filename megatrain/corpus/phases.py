"""The phases of a preparation, from files to stores, each a set of chores that need nothing of each other.

    documents    a chore for each unit of input: read, clean, judge
    places, compared, decided, lines            which documents are copies (similar.py)
    sampled, thresholds                         where perplexities part head, middle and tail, where there are models
    kept         a chore for each unit: what stays, in two splits
    vocabulary   one chore, where a tokenizer is to be trained
    encoded      a chore for each unit: its token stores
    tokens       a chore for each source and split: the stores of its units as one
    report       one chore: the report, and all that users look for under its name

A phase is asked for when those before it are done, by each worker for itself: it depends on the config and the input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatrain.corpus import final, keeping, mapping, stores
from megatrain.corpus.document import Step
from megatrain.corpus.final import Results
from megatrain.corpus.foresight import Ids
from megatrain.corpus.perplexity import identities, perplexity_step, read_thresholds
from megatrain.corpus.prepare_config import PrepareConfig, RunConfig
from megatrain.corpus.reading.units import WorkUnit, cut_units
from megatrain.corpus.revision import files_in, revision
from megatrain.corpus.similar import Similar
from megatrain.corpus.work.chores import Chore, Phase, Published, Work, key_of

Verb = Literal["read", "clean", "filter", "dedup", "prepare"]
LAST: Mapping[Verb, mapping.Last] = {
    "read": "read",
    "clean": "clean",
    "filter": "filter",
    "dedup": "filter",
    "prepare": "filter",
}
"""The last stage of the first phase, by verb."""
WORK = "work"
"""Folder of the work under way, below that of the output."""


class OtherInputError(RuntimeError):
    """Workers have prepared something else than this process was asked for."""


class Preparation:
    """One preparation: what is to be done, by whichever workers."""

    def __init__(self, config: PrepareConfig, verb: Verb, ids: Ids) -> None:
        """verb: the last stage. ids: what decides on those of the tokenizer that is named (foresight.py). Raises ReadError for input that
        cannot be read.
        """
        self._config, self._verb = config, verb
        self._units = list(cut_units(config.read, outside=config.output.dir))
        self._names = [f"unit_{number:06d}" for number in range(len(self._units))]
        self._sources = list(dict.fromkeys(unit.source for unit in self._units))
        self.published = Published(Path(config.output.dir) / WORK)
        decides = replace(config, run=RunConfig(), output=replace(config.output, keep_work=True))
        self._input = [unit.identity for unit in self._units]
        judging = (config.clean, config.language, config.filter, config.dedup)
        self._judging = [(asdict(part), files_in(part)) for part in judging]
        """Sections that the first phase depends on, with hashes of the files that they name."""
        self._models = identities(config.perplexity)
        self._ids = ids
        named = [files for _, files in self._judging]
        self.key = key_of(revision(), verb, asdict(decides), named, self._models, self._ids, self._input)
        """A hash of all that decides on what is made."""
        self._results: Results | None = None

    def phases(self) -> Iterator[Phase]:
        """The phases, in order."""
        documents = self._documents()
        yield documents
        self._results = None
        results = Results(self._config, [unit.source for unit in self._units], documents, [documents])
        if self._verb in ("dedup", "prepare"):
            similar = Similar(self._config.dedup, documents, self.published)
            yield from similar.phases()
            results.similar = similar
            yield from self._kept(documents, similar, results)
        if self._verb == "prepare":
            yield from self._tokens(results)
        key = key_of(*(phase.key for phase in (*results.audited, results.vocabulary) if phase is not None))
        results.report = Phase("report", key, [Chore("all", 1, partial(final.report, results, self.published))])
        yield results.report
        self._results = results

    def made(self) -> Results:
        """The results of all phases. Raises OtherInputError where they are not done."""
        if self._results is None:
            raise OtherInputError(
                "all workers have ended well, and what this command began with is not done: files of the input, or files that the config "
                "names, were changed meanwhile, and the workers have prepared what they found. Run the same command again."
            )
        return self._results

    def _documents(self) -> Phase:
        config, last = self._config, LAST[self._verb]
        shown = (config.output.seed, config.output.examples, config.output.sheet)
        key = key_of(revision(), last, asdict(config.read), self._judging, shown, self._input)
        return self._each("documents", key, [partial(mapping.map_unit, unit, config, last) for unit in self._units])

    def _kept(self, documents: Phase, similar: Similar, results: Results) -> Iterator[Phase]:
        """The phases that judge perplexities, where there are models, and the one that writes what stays."""
        config, settings = self._config, self._config.perplexity
        parts = [
            (partial(self.published.file, documents, name, mapping.DOCUMENTS), partial(similar.removed, number))
            for number, name in enumerate(self._names)
        ]
        judge: Callable[[], Step | None] = _no_judge
        key = similar.key
        if settings.models:
            key = key_of(key, asdict(settings), self._models)
            works = [partial(keeping.sample_unit, *part, config) for part in parts] if settings.thresholds is None else []
            sampled = self._each("sampled", key, works)
            yield sampled
            samples = partial(self._facts, sampled, "sample")
            results.thresholds = Phase(
                "thresholds", key, [Chore("all", 1, partial(keeping.find_thresholds, samples, settings))]
            )
            yield results.thresholds
            judge = partial(self._judge, results.thresholds)
        key = key_of(key, config.tokenize.held_out, asdict(config.augment), files_in(config.augment))
        results.documents = self._each("kept", key, [partial(keeping.keep_unit, *part, judge, config) for part in parts])
        results.audited.append(results.documents)
        yield results.documents

    def _judge(self, thresholds: Phase) -> Step:
        settings = self._config.perplexity
        path = self.published.file(thresholds, "all", keeping.THRESHOLDS)
        return perplexity_step(settings, read_thresholds(path, settings))

    def _each(self, title: str, key: str, works: Sequence[Work]) -> Phase:
        """A phase of a chore for each unit, or of none."""
        units = zip(self._names, self._units, works, strict=False)
        return Phase(title, key, [Chore(name, unit.size, work, steady=True, about=_about(unit)) for name, unit, work in units])

    def _facts(self, phase: Phase, name: str) -> Iterator[Any]:
        """One of the facts of each chore of a phase."""
        return (self.published.facts(phase, chore.name)[name] for chore in phase.chores)

    def _tokens(self, results: Results) -> Iterator[Phase]:
        """The phases that make token stores, where a tokenizer is named or to be trained."""
        settings, kept = self._config.tokenize, results.documents
        if settings.vocab_size is not None:
            if not any(facts["train"] for facts in self._facts(kept, "documents")):
                return  # nothing to learn from; the report says what has refused it
            learn = partial(stores.learn, partial(self._shards, kept), settings.vocab_size, settings.sample)
            vocabulary = Phase("vocabulary", key_of(kept.key, settings.vocab_size, settings.sample), [Chore("all", 1, learn)])
            yield vocabulary
            tokenizer: Callable[[], Path | str] = partial(self._trained, vocabulary)
            results.vocabulary = vocabulary
        elif settings.tokenizer is not None:
            tokenizer = partial(str, settings.tokenizer)
        else:
            return
        key, works = key_of(kept.key, asdict(settings), self._ids), []
        for name in self._names:
            shards = {split: partial(self.published.file, kept, name, file) for split, file in keeping.FILES.items()}
            works.append(partial(stores.encode, shards, tokenizer, settings))
        encoded = self._each("encoded", key, works)
        yield encoded
        chores = []
        for number, source in enumerate(self._sources):
            for split in keeping.FILES:
                work = partial(stores.store, source, partial(self._encoded, encoded, split, source), self._config.output)
                chores.append(Chore(f"source_{number:04d}_{split}", 1, work))
        results.tokens = Phase("tokens", key, chores)
        results.audited.append(results.tokens)
        yield results.tokens

    def _trained(self, vocabulary: Phase) -> Path:
        """The tokenizer under its name in the output folder, which stores remember."""
        path = Path(self._config.output.dir) / stores.TOKENIZER
        final.link(self.published.file(vocabulary, "all", stores.TOKENIZER), path)
        return path

    def _encoded(self, encoded: Phase, split: keeping.Split, source: str) -> list[tuple[Path | None, Mapping[str, int]]]:
        """The stores of a split of the units of a source: prefixes, None for none, and how much is in them."""
        found: list[tuple[Path | None, Mapping[str, int]]] = []
        for name, unit in zip(self._names, self._units, strict=True):
            if unit.source == source:
                files = [file for file in self.published.names(encoded, name) if file.partition(".")[0] == split]
                paths = [self.published.file(encoded, name, file) for file in files]
                found.append((paths[0].with_name(split) if paths else None, self.published.facts(encoded, name)[split]))
        return found

    def _shards(self, kept: Phase) -> list[Path]:
        """The shards of what is trained on, of all units."""
        return [self.published.file(kept, name, keeping.FILES["train"]) for name in self._names]


def _about(unit: WorkUnit) -> str:
    """The input of a unit, in words."""
    first, more = unit.parts[0], f" and {len(unit.parts) - 1:,} more" if len(unit.parts) > 1 else ""
    return f"{first.file}{f' from {first.start:,} to {first.stop:,}' if not more else ''}{more}"


def _no_judge() -> None:
    """No perplexities are judged."""
