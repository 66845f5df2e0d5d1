"""One document on its way from a file to tokens, and what is counted on the way.

A step changes a document in place and says which rules refuse it. It depends on the document, its settings and a seed, never on order,
process or time: so the same bytes come out for any number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PLACES = 20
"""Places of a problem that are kept; all are counted."""


@dataclass(slots=True)
class Document:
    """One text with its origin and what is known of it."""

    text: str
    """The text, without lone surrogates."""
    source: str
    """Name of its source in the config."""
    file: str
    at: int
    """Where it begins in its file: byte of the line of a .jsonl (unpacked), row of a parquet file, number of a WARC record; else 0."""
    kind: str = "text"
    """"text" or "code"."""
    language: str = ""
    """Code of ISO 639-1, such as "en"; "": unknown."""
    scores: dict[str, float] = field(default_factory=dict)
    """Signals and probabilities by name: "gopher.mean_length", "language.probability"."""
    marks: dict[str, Any] = field(default_factory=dict)
    """Other fields of its row that are kept."""

    @property
    def name(self) -> str:
        """Its place as text, the same in every run: `file:at`."""
        return f"{self.file}:{self.at}"


class Sighting(NamedTuple):
    """Where a problem was met, and what was said of it."""

    file: str
    where: str
    """`line 7`, `byte 4096`; "" for the whole file."""
    said: str


class Tally:
    """Counts of one unit of work, and the first places of each problem; the tally of all units is their sum in order."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[Sighting]] = {}

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] += number

    def problem(self, name: str, file: str, where: str, said: str) -> None:
        """Count a problem, and keep its place while there are few."""
        self.counts[name] += 1
        kept = self.places.setdefault(name, [])
        if len(kept) < PLACES:
            kept.append(Sighting(file, where, said))

    def add(self, other: Tally) -> None:
        """Add what another unit counted; units are added in their order, so that the places kept are always the same."""
        self.counts.update(other.counts)
        for name, places in other.places.items():
            kept = self.places.setdefault(name, [])
            kept += places[: PLACES - len(kept)]

    def as_json(self) -> dict[str, Any]:
        """The tally as plain values, sorted by name."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "places": {name: self.places[name] for name in sorted(self.places)},
        }

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Tally:
        """The tally that `as_json` gave."""
        tally = cls()
        tally.counts.update(values["counts"])
        tally.places = {name: [Sighting(*place) for place in places] for name, places in values["places"].items()}
        return tally


Step = Callable[[Document, Tally], Collection[str]]
"""Changes a document in place; the names of the rules that refuse it, none where it is kept."""
