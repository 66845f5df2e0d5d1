"""The step that cleans documents. Its order is fixed:

    mojibake -> markup -> controls -> Unicode form -> blanks -> personal data -> boilerplate lines

What it gives, it gives back unchanged: as long as a part other than blanks and personal data changes something, all are done once more,
since what is removed may show something else: `<<b>b>`, a zero-width blank within `&amp;`. A text that is not settled after four rounds is
left as it then is, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from megatrain.corpus.cleaning.boilerplate import Boilerplate, read_lines
from megatrain.corpus.cleaning.characters import in_form, mended, without_controls, without_controls_of_code
from megatrain.corpus.cleaning.choices import CleanConfig
from megatrain.corpus.cleaning.personal import mask
from megatrain.corpus.cleaning.remains import without_markup
from megatrain.corpus.cleaning.spacing import with_few_blanks, with_plain_blanks
from megatrain.corpus.document import Document, Step, Tally

ROUNDS = 4
"""How often a text is cleaned, at most."""


class Cleaner:
    """A `Step` that cleans; refuses (`clean.empty`) a document of which nothing is left."""

    def __init__(self, settings: CleanConfig) -> None:
        self.settings = settings
        own = read_lines(settings.boilerplate_file) if settings.boilerplate_file is not None else ()
        self.boilerplate = Boilerplate(own) if settings.boilerplate else None

    def __call__(self, document: Document, tally: Tally) -> Collection[str]:
        """Clean a document in place, and count each change by its name."""
        counts: Counter[str] = Counter()
        clean_once = self._code if document.kind == "code" else self._text
        for _ in range(ROUNDS):
            document.text, settled = clean_once(document, counts)
            if settled:
                break
        else:
            counts["unsettled"] += 1
        for name, number in counts.items():
            if number:
                tally.count(f"clean.{name}", number)
        return () if document.text.strip() else ("clean.empty",)

    def _text(self, document: Document, counts: Counter[str]) -> tuple[str, bool]:
        """(The text of a document, cleaned once; whether it is settled)."""
        settings, text = self.settings, document.text
        if settings.mojibake:
            text = mended(text, counts)
        if settings.markup:
            text = without_markup(text, counts)
        if settings.controls:
            text = without_controls(text, counts)
        if settings.form != "none":
            text = in_form(text, settings.form, counts)
        if settings.blanks:
            text = with_plain_blanks(text, counts)
        settled = text == document.text
        if settings.blanks:
            text = with_few_blanks(text, counts)
        text = masked = self._masked(text, counts)
        if self.boilerplate is not None:
            text = self.boilerplate.without(text, counts)
        return text, settled and text == masked

    def _code(self, document: Document, counts: Counter[str]) -> tuple[str, bool]:
        """(The text of a source, cleaned; that it is settled)."""
        text = without_controls_of_code(document.text, counts) if self.settings.controls else document.text
        return self._masked(text, counts), True

    def _masked(self, text: str, counts: Counter[str]) -> str:
        """A text without personal data."""
        if self.settings.personal:
            text, found = mask(text, self.settings.personal)
            counts.update(found)
        return text


def clean_step(settings: CleanConfig) -> Step:
    """The step that cleans by some settings. Raises ValueError or OSError for a file of the settings that cannot be used."""
    return Cleaner(settings)
