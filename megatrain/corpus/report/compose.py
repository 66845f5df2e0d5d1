"""Writes the whole report of a preparation into a folder: REPORT.md, removed.md, sheet.md, sheet.jsonl and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatrain.corpus.report.page import examples_page, page
from megatrain.corpus.report.sheet import sheet_lines, sheet_page
from megatrain.corpus.report.summary import USUAL, AlarmLimits, alarms, summary_of
from megatrain.corpus.report.unit_audit import KEPT, Audit
from megatrain.files import make_folder, whole


def write_report(
    folder: Path,
    audit: Audit,
    stages: Sequence[str],
    *,
    title: str = "Report of a preparation",
    note: str = "",
    found: Sequence[str] = (),
    cutoffs: Mapping[str, tuple[float, float]] | None = None,
    limits: AlarmLimits = USUAL,
) -> list[str]:
    """Write the report of a merged audit and return its alarms; each file is replaced at once. Raises OSError.

    stages: their names in order. note: a paragraph below the title. found: alarms that others raise. cutoffs: the perplexities where
    middle and tail begin, by language. limits: when there is an alarm. The same audit gives the same bytes.
    """
    from megatrain.corpus.report.charts import draw  # noqa: PLC0415  matplotlib, half a second that no worker need spend

    make_folder(folder)
    summary = summary_of(audit.tally.counts, stages, limits)
    pictures = draw(summary, folder, cutoffs)
    kept = audit.sheet.of(KEPT)
    files = {
        "removed.md": examples_page(audit.removed),
        "sheet.md": sheet_page(kept),
        "sheet.jsonl": sheet_lines(kept),
        "REPORT.md": page(summary, audit.tally.places, title=title, note=note, found=found, pictures=pictures, cutoffs=cutoffs),
    }
    for name, text in files.items():
        with whole(folder / name, text=True) as file:
            file.write(text)
    return [*alarms(summary), *found]
