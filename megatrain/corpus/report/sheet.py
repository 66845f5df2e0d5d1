"""Writes the sheet of kept documents: to read with one's own eyes (sheet.md) and to label (sheet.jsonl).

Each line of sheet.jsonl has an empty `label` to fill in; a copy for each rater, and `megatrain data agree` says how far they agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatrain.corpus.report.examples import Example
from megatrain.files import printable


def sheet_page(rows: Sequence[Example]) -> str:
    """sheet.md as text: a heading a document, its text in a block of its own."""
    parts = ["# Documents that are kept, chosen by a hash of seed and document"]
    for number, row in enumerate(rows, 1):
        shown = "" if len(row.text) == row.letters else f", of which {len(row.text):,} are shown"
        text = "\n".join(f"    {printable(line)}" for line in row.text.split("\n"))
        parts += [f"## {number}", f"    {printable(row.source)}: {row.file}:{row.at}, {row.letters:,} characters{shown}", text]
    return "\n\n".join(parts) + "\n"


def sheet_lines(rows: Sequence[Example]) -> str:
    """sheet.jsonl as text: item, label (empty), source, file, at, letters, text."""
    return "".join(json.dumps(_line(row), ensure_ascii=False) + "\n" for row in rows)


def _line(row: Example) -> dict[str, object]:
    place = {"source": row.source, "file": row.file, "at": row.at}
    return {"item": f"{row.file}:{row.at}", "label": "", **place, "letters": row.letters, "text": row.text}
