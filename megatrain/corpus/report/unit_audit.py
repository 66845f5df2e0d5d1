"""The audit of one unit of work: documents into and out of each stage, what each rule refuses, examples, a sheet to read.

Everything is a count or a bounded sample of smallest ranks, so the audits of all units add up to the same one in any order, for any
number of workers. The counts have these names, in the unit's tally:

    STAGE/in/documents/SOURCE           STAGE/in/bytes/SOURCE      STAGE/in/letters/BIN       also `out`: kept
    STAGE/refused/RULE/documents/SOURCE .../bytes/SOURCE           named by the rule, whoever else refuses
    STAGE/alone/RULE/documents/SOURCE   .../bytes/SOURCE           named by this rule and no other: what the rule removes by itself
    STAGE/language/CODE                                            documents that leave, by language; `?`: unknown
    tokens/SOURCE, tokenized/SOURCE                                tokens, and bytes of text they are of
    copies/documents/SOURCE        copies/bytes/SOURCE             changed copies, which are tokenized too
    perplexity/LANGUAGE/BIN                                        documents by perplexity (perplexity.py)
    cluster/KIND/SIZE                                              clusters of duplicates by number of documents
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.report.bins import bin_of
from megatrain.corpus.report.examples import MOST, Examples

KEPT, CLEAN = "kept", "clean"
"""The name of examples on the sheet; the stage whose texts are shown as they leave it, with personal data masked."""
SHEET, SHEET_LETTERS = 100, 4000
"""Documents of the sheet to read, and characters of each."""


class Audit:
    """Counts, problems and examples of a unit, or of all of them."""

    def __init__(self, seed: int = 0, examples: int = MOST, sheet: int = SHEET) -> None:
        self.tally = Tally()
        self.removed = Examples(seed, examples)
        """By `STAGE/RULE`."""
        self.sheet = Examples(seed, sheet, SHEET_LETTERS)
        self._entered: dict[str, str] = {}
        """By stage, the text of the document that entered last."""
        self._sized = ("", 0, bin_of(0))
        """The text whose size was asked for last, its bytes, the bin of its letters."""

    def enter(self, stage: str, document: Document) -> None:
        """Count a document into a stage, before a step changes it."""
        self._flow(stage, "in", document)
        self._entered[stage] = document.text

    def leave(
        self,
        stage: str,
        document: Document,
        refusals: Collection[str] = (),
        *,
        keep: bool | None = None,
        said: str = "",
        entered: str | None = None,
    ) -> None:
        """Count the document that entered last out of a stage, and what refuses it, with examples: bytes and text as they entered.

        keep: whether it goes on; None: if nothing refuses it. True with refusals where they are only noted (annotate, a dry run).
        said: a detail for its examples, such as what it is a duplicate of.
        entered: its text as it did, where another one has entered since.
        """
        if refusals:
            self._refused(
                stage, document, refusals, said, self._entered.get(stage, document.text) if entered is None else entered
            )
        if keep if keep is not None else not refusals:
            self._flow(stage, "out", document)
            self.tally.count(f"{stage}/language/{document.language or '?'}")

    def tokenized(self, source: str, size: int, tokens: int) -> None:
        """Count the tokens that `size` bytes of a source's text became."""
        self.tally.count(f"tokens/{source}", tokens)
        self.tally.count(f"tokenized/{source}", size)

    def copied(self, document: Document) -> None:
        """Count a changed copy of a document that is kept."""
        self.tally.count(f"copies/documents/{document.source}")
        self.tally.count(f"copies/bytes/{document.source}", len(document.text.encode()))

    def show(self, document: Document) -> None:
        """Offer a document that is kept to the sheet."""
        self.sheet.offer(KEPT, document)

    def cluster(self, kind: str, size: int) -> None:
        """Count a cluster of `size` duplicates; kind: `exact`, `near`."""
        self.tally.count(f"cluster/{_word(kind)}/{size}")

    def add(self, other: Audit) -> None:
        """Add another unit; in their order, for the places of problems. Raises ValueError for one of other settings."""
        self.tally.add(other.tally)
        self.removed.add(other.removed)
        self.sheet.add(other.sheet)

    def as_json(self) -> dict[str, Any]:
        """The audit as values for JSON."""
        return {"tally": self.tally.as_json(), "removed": self.removed.as_json(), "sheet": self.sheet.as_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Audit:
        """The audit that `as_json` gave. Raises KeyError or TypeError for other values."""
        made = cls()
        made.tally = Tally.of_json(values["tally"])
        made.removed = Examples.from_json(values["removed"])
        made.sheet = Examples.from_json(values["sheet"])
        return made

    def _flow(self, stage: str, way: str, document: Document) -> None:
        counts, source = self.tally.counts, document.source
        _, size, letters = self._size(document.text)
        counts[f"{stage}/{way}/documents/{source}"] += 1
        counts[f"{stage}/{way}/bytes/{source}"] += size
        counts[f"{stage}/{way}/letters/{letters}"] += 1

    def _size(self, text: str) -> tuple[str, int, int]:
        """(a text, its bytes, the bin of its letters); most stages hand on the text that they were given."""
        if text is not self._sized[0]:
            self._sized = text, len(text) if text.isascii() else len(text.encode()), bin_of(len(text))
        return self._sized

    def _refused(self, stage: str, document: Document, refusals: Collection[str], said: str, text: str) -> None:
        names = dict.fromkeys(map(_word, refusals))
        size = self._size(text)[1]
        for way in ("refused", "alone") if len(names) == 1 else ("refused",):
            for rule in names:
                self.tally.count(f"{stage}/{way}/{rule}/documents/{document.source}")
                self.tally.count(f"{stage}/{way}/{rule}/bytes/{document.source}", size)
        for rule in names:
            self.removed.offer(f"{stage}/{rule}", document, said, None if stage == CLEAN else text)


def _word(name: str) -> str:
    """A name that can be a part of another."""
    return name.replace("/", "_")
