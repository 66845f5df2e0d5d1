"""The first phase: one unit of input, read, cleaned and judged in one pass, a document at a time.

    read -> clean -> language, rules, leaks -> documents.jsonl.zst, fingerprints

Every stage is a list of steps; the verbs `data read`, `data clean` and `data filter` leave out the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from megatrain.corpus.cleaning.cleaner import clean_step
from megatrain.corpus.document import Document, Step
from megatrain.corpus.duplicates.fingerprints import fingerprinting
from megatrain.corpus.duplicates.leaks import leaks_step
from megatrain.corpus.judging import RulesByKind
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.reading.choices import SourceConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import WorkUnit
from megatrain.corpus.report.unit_audit import Audit
from megatrain.corpus.rules.language import language_step
from megatrain.corpus.shards import writing
from megatrain.corpus.similar import FINGERPRINTS

DOCUMENTS = "documents.jsonl.zst"
BREAKS = "breaks"
"""The mark of a document that stays with rules that it breaks: their names."""
FEW, LETTERS = 64, 1 << 17
"""Documents that go through a step at a time, at most, and about how many letters of them."""
Stage = tuple[str, Sequence[Step]]
Last = Literal["read", "clean", "filter"]
"""The last stage that a unit goes through."""


def stages_of(config: PrepareConfig, source: SourceConfig, last: Last) -> list[Stage]:
    """The stages behind reading that documents of a source go through."""
    clean: Stage = ("clean", [clean_step(config.clean)])
    judge: Stage = (
        "filter",
        [language_step(config.language), RulesByKind(source, config.filter), leaks_step(config.dedup.leaks)],
    )
    return [clean, judge][: ("read", "clean", "filter").index(last)]


def map_unit(
    unit: WorkUnit, config: PrepareConfig, last: Last, folder: Path, progress: Callable[[int], None]
) -> Mapping[str, Any]:
    """Write what stays of a unit, and its fingerprints where documents are compared; the audit."""
    source = config.read.source(unit.source)
    audit = Audit(config.output.seed, config.output.examples, config.output.sheet)
    stages = stages_of(config, source, last)
    with ExitStack() as files:
        write = files.enter_context(writing(folder / DOCUMENTS))
        prints = files.enter_context(fingerprinting(folder / FINGERPRINTS, config.dedup))
        for document in staged(
            _told(read_unit(unit, config.read, audit.tally, lambda: progress(0)), progress),
            stages,
            audit,
            annotate=config.filter.mode == "annotate",
        ):
            write(document)
            prints.add(document.text, document.kind)
    return {"audit": audit.as_json()}


def _told(documents: Iterator[Document], progress: Callable[[int], None]) -> Iterator[Document]:
    """Documents, each told when it has gone its way, whether it is kept or not."""
    for document in documents:
        letters = len(document.text)
        yield document
        progress(letters)


def staged(documents: Iterator[Document], stages: Sequence[Stage], audit: Audit, *, annotate: bool) -> Iterator[Document]:
    """The documents that all stages keep, counted into and out of each; annotate: rules are counted, named with
    the document, and refuse nothing. A few short documents go through a step before the next one, whose tables would push its own out of
    the processor's caches.
    """
    for few in _few(documents):
        left = few
        for document in left:
            audit.enter("read", document)
            audit.leave("read", document)
        for name, steps in stages:
            left = list(_kept(left, name, steps, audit, annotate=annotate))
        yield from left


def _few(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of at most FEW, and hardly more than LETTERS letters or one document."""
    few, letters = list[Document](), 0
    for document in documents:
        few.append(document)
        letters += len(document.text)
        if len(few) == FEW or letters >= LETTERS:
            yield few
            few, letters = [], 0
    if few:
        yield few


def _kept(
    documents: Sequence[Document], name: str, steps: Sequence[Step], audit: Audit, *, annotate: bool
) -> Iterator[Document]:
    """The documents that a stage keeps."""
    entered = [document.text for document in documents]
    for document in documents:
        audit.enter(name, document)
    refused: list[list[str]] = [[] for _ in documents]
    for step in steps:
        for document, rules in zip(documents, refused, strict=True):
            rules.extend(step(document, audit.tally))
    for document, text, rules in zip(documents, entered, refused, strict=True):
        if not rules and not document.text.strip():  # a rule of lines has taken the last one
            rules.append(f"{name}.empty")
        keep = not rules or (annotate and name == "filter")
        audit.leave(name, document, rules, keep=keep, entered=text)
        if keep:
            if rules:
                document.marks[BREAKS] = rules
            yield document
