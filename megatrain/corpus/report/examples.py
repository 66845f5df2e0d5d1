"""Examples of documents, by name of a rule: the same ones for any order of the documents and any number of workers.

A document's rank under a name is a hash of (seed, name, source, file, place). The examples of a name are the documents of the smallest
ranks, so those of two workers merge by keeping the smallest of both (a bottom-k sample), and another seed shows others.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import xxhash

from megatrain.files import printable

MOST = 20
"""Examples of each name."""
LETTERS = 400
"""Characters of an example's text."""


class Placed(Protocol):
    """A document, as far as an example shows it."""

    text: str
    source: str
    file: str
    at: int


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """One document: where it lies and how it begins. Ordered by rank, then by place."""

    rank: str
    """16 hexadecimal digits."""
    source: str
    file: str
    at: int
    """Where it begins in its file (Document.at)."""
    said: str
    """A detail, such as a measured value; may be empty."""
    letters: int
    """Characters of the whole text."""
    text: str
    """How it begins: at most as many characters as the collection keeps."""

    @property
    def place(self) -> tuple[str, str, int]:
        """The document: its source, file and place."""
        return (self.source, self.file, self.at)


def rank_of(seed: int, name: str, document: Placed) -> str:
    """The rank of a document under a name: 16 hexadecimal digits, equally spread."""
    key = f"{seed}\0{name}\0{document.source}\0{document.file}\0{document.at}"
    return xxhash.xxh3_64_hexdigest(key.encode("utf-8", "surrogatepass"))


class Examples:
    """At most `most` documents of each name, those of the smallest ranks."""

    def __init__(self, seed: int = 0, most: int = MOST, letters: int = LETTERS) -> None:
        self.seed, self.most, self.letters = seed, most, letters
        self._of: dict[str, list[Example]] = {}

    def offer(self, name: str, document: Placed, said: str = "", text: str | None = None) -> None:
        """Keep a document as an example of a name if its rank is among the smallest.

        text: the text to show, where that is not the document's own (such as before a step changed it).
        """
        rank = rank_of(self.seed, name, document)
        rows = self._of.setdefault(name, [])
        if self.most and (len(rows) < self.most or rank <= rows[-1].rank):
            whole = document.text if text is None else text
            place = (document.source, printable(document.file), document.at)
            self._keep(name, Example(rank, *place, said, len(whole), whole[: self.letters]))

    def add(self, other: Examples) -> None:
        """Take in the examples of another worker. Raises ValueError if they were chosen in another way."""
        if (self.seed, self.most, self.letters) != (other.seed, other.most, other.letters):
            raise ValueError(
                f"examples of seed {self.seed} (at most {self.most} of {self.letters} characters) and of seed {other.seed} (at most "
                f"{other.most} of {other.letters}) cannot be merged: prepare all parts with one config"
            )
        for name, rows in other._of.items():
            for row in rows:
                self._keep(name, row)

    def names(self) -> list[str]:
        """The names that have examples, in order."""
        return sorted(name for name, rows in self._of.items() if rows)

    def of(self, name: str) -> tuple[Example, ...]:
        """The examples of a name by rank; none for an unknown one."""
        return tuple(self._of.get(name, ()))

    def said(self) -> list[str]:
        """The details of all examples."""
        return [row.said for name in self.names() for row in self._of[name]]

    def retell(self, change: Callable[[str], str]) -> None:
        """Put every detail in other words."""
        for name, rows in self._of.items():
            self._of[name] = [replace(row, said=change(row.said)) for row in rows]

    def as_json(self) -> dict[str, Any]:
        """The collection as values for JSON, in an order of its own."""
        rows = {name: [asdict(row) for row in self._of[name]] for name in self.names()}
        return {"seed": self.seed, "most": self.most, "letters": self.letters, "rows": rows}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Examples:
        """The collection that `as_json` gave. Raises KeyError or TypeError for other values."""
        made = cls(values["seed"], values["most"], values["letters"])
        for name, rows in values["rows"].items():
            for row in rows:
                made._keep(name, Example(**row))
        return made

    def _keep(self, name: str, example: Example) -> None:
        rows = self._of.setdefault(name, [])
        if len(rows) >= self.most and (not rows or example > rows[-1]):
            return
        if all(row.place != example.place for row in rows):  # a document seen twice, such as by a unit done again, counts once
            insort(rows, example)
            del rows[self.most :]
