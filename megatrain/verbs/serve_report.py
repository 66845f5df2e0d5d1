"""`megatrain serve-report`: the use of a model, from a log of the server, beside the set that it was evaluated on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatrain.serving.drift import Drift, drifts, read_evaluation, read_log
from megatrain.serving.drift_picture import draw_drifts


def main(log: Path, against: Path, feedback: Path | None, png: Path | None, as_json: bool) -> int:
    """`megatrain serve-report`: print a table and draw a picture. Returns 0. Raises DriftError, OSError."""
    beside = log.with_name("feedback.jsonl")
    thumbs = feedback if feedback is not None else beside if beside.is_file() else None
    found = drifts(read_log(log, thumbs), read_evaluation(against))
    picture = log.with_suffix(".png") if png is None else png
    draw_drifts(found, picture)
    if as_json:
        sys.stdout.write(json.dumps([_shape(drift) for drift in found]) + "\n")
        return 0
    sys.stdout.write(f"{table(found)}\n{picture}\n")
    return 0


def table(found: Sequence[Drift]) -> str:
    """The measures as lines of text."""
    rows = [("measure", "in use", "evaluated", "PSI", "by chance", "")]
    for drift in found:
        index = ("", "") if drift.psi is None else (f"{drift.psi:.3f}", f"{drift.by_chance:.3f}")
        rows.append((drift.measure.name, middle(drift.used), middle(drift.evaluated), *index, drift.verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def middle(values: Sequence[Any]) -> str:
    """The median of numbers, or the most frequent category with its share, and how many there are."""
    if not values:
        return "none"
    if isinstance(values[0], str):
        name, count = Counter(values).most_common(1)[0]
        return f"{name} {count / len(values):.0%} of {len(values):,}"
    return f"{median(values):.4g} of {len(values):,}"


def _shape(drift: Drift) -> dict[str, Any]:
    numbers = {"psi": drift.psi, "by_chance": drift.by_chance, "verdict": drift.verdict}
    return {
        "measure": drift.measure.name,
        "used": len(drift.used),
        "evaluated": len(drift.evaluated),
        "edges": list(drift.edges),
        "shares": [list(share) for share in drift.shares],
        **numbers,
    }
