"""`--dry-run`: what each rule would remove, counted on a sample of the input; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatrain.corpus.conduct import load_config
from megatrain.corpus.document import Document
from megatrain.corpus.final import STAGES
from megatrain.corpus.mapping import Last, staged, stages_of
from megatrain.corpus.phases import LAST, Verb
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.reading.documents import read_unit
from megatrain.corpus.reading.units import WorkUnit, cut_units
from megatrain.corpus.report.page import page
from megatrain.corpus.report.summary import summary_of
from megatrain.corpus.report.unit_audit import Audit
from megatrain.data.bar import bar

SAMPLE_LETTERS = 1 << 24
"""Characters that are looked at, of all sources together."""
PLACES = 8
"""Units of a source, evenly spread, whose beginnings are looked at."""


def preview(verb: Verb, path: str, overrides: Sequence[str]) -> str:
    """The report of a sample, the beginnings of units spread over each source. Copies are not looked for, nor perplexities."""
    config = load_config(path, overrides, verb)
    units = _spread(list(cut_units(config.read, outside=config.output.dir)))
    share = SAMPLE_LETTERS // max(1, len(units))
    audit = Audit(config.output.seed, config.output.examples, sheet=0)
    with bar("sample", len(units)) as advance:
        for unit in units:
            _look(unit, config, LAST[verb], share, audit)
            advance(1)
    judged = "copies are not looked for" + (", perplexities are not judged" if config.perplexity.models else "")
    note = (
        f"A dry run over the beginnings of units of work ({len(units)}), some {share:,} characters of each; {judged}, and nothing is "
        "written."
    )
    summary = summary_of(audit.tally.counts, STAGES)
    return page(summary, audit.tally.places, title="What the rules would remove", note=note, linked=False)


def _spread(units: list[WorkUnit]) -> list[WorkUnit]:
    """At most PLACES units of each source, evenly spread."""
    chosen: list[WorkUnit] = []
    for source in dict.fromkeys(unit.source for unit in units):
        of = [unit for unit in units if unit.source == source]
        number = min(PLACES, len(of))
        chosen += [of[i * len(of) // number] for i in range(number)]
    return chosen


def _look(unit: WorkUnit, config: PrepareConfig, last: Last, letters: int, audit: Audit) -> None:
    """Count the beginning of a unit."""
    stages = stages_of(config, config.read.source(unit.source), last)
    for _ in staged(_first(read_unit(unit, config.read, audit.tally), letters), stages, audit, annotate=False):
        pass


def _first(documents: Iterator[Document], letters: int) -> Iterator[Document]:
    """Documents until they have so many characters."""
    for document in documents:
        yield document
        letters -= len(document.text)
        if letters <= 0:
            return
