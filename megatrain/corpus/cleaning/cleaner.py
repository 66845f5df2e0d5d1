"""The step that cleans documents. Its order is fixed:

    ends of lines -> mojibake -> markup -> controls -> Unicode form -> simplified Chinese -> blanks -> personal data
    -> boilerplate lines -> tails of paragraphs -> words of lists -> stop words

What it gives, it gives back unchanged: all is done once more as long as a part other than blanks and personal data finds something, since
what is removed may show something else: `<<b>b>`, a zero-width blank within `&amp;`. A text that is not settled after four rounds is left
as it then is, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from megatrain.corpus.cleaning.boilerplate import Boilerplate, read_lines
from megatrain.corpus.cleaning.characters import in_form, mended, with_line_feeds, without_controls, without_controls_of_code
from megatrain.corpus.cleaning.choices import CleanConfig
from megatrain.corpus.cleaning.personal import mask
from megatrain.corpus.cleaning.remains import without_markup
from megatrain.corpus.cleaning.sensitive import Sensitive
from megatrain.corpus.cleaning.simplified import simplified
from megatrain.corpus.cleaning.spacing import with_few_blanks, with_plain_blanks
from megatrain.corpus.cleaning.stop_words import StopWords
from megatrain.corpus.cleaning.tails import without_tails
from megatrain.corpus.document import Document, Step, Tally

ROUNDS = 4
"""How often a text is cleaned, at most."""


class Cleaner:
    """A `Step` that cleans; refuses documents of which nothing is left (`clean.empty`) and those with too many words of the lists
    (`clean.words`).
    """

    def __init__(self, settings: CleanConfig) -> None:
        self.settings = settings
        own = read_lines(settings.boilerplate_file) if settings.boilerplate_file is not None else ()
        self.boilerplate = Boilerplate(own) if settings.boilerplate else None
        self.stop_words = StopWords(settings.stop_words) if settings.stop_words is not None else None
        self.sensitive = Sensitive(settings.words) if settings.words.lists else None

    def __call__(self, document: Document, tally: Tally) -> Collection[str]:
        """Clean a document in place, and count each change by its name."""
        counts: Counter[str] = Counter()
        settle = self._code if document.kind == "code" else self._text
        document.text = settle(document.text, document.language, counts)
        refused = False
        if self.sensitive is not None:
            before, refused = document.text, self.sensitive.apply(document, counts)
            if document.text != before:
                document.text = settle(document.text, document.language, counts)
        if self.stop_words is not None and document.kind != "code":
            document.text = self.stop_words.without(document.text, counts)
        for name, number in counts.items():
            if number:
                tally.count(f"clean.{name}", number)
        return ("clean.words",) if refused else () if document.text.strip() else ("clean.empty",)

    def _text(self, text: str, language: str, counts: Counter[str]) -> str:
        """The text of a document, cleaned until it is settled."""
        settings = self.settings
        if settings.controls:
            text = with_line_feeds(text)
        fresh = self._mended(text, language, counts)
        changed = fresh != text
        for _ in range(ROUNDS):
            text = with_few_blanks(fresh, counts) if settings.blanks else fresh
            text = kept = self._masked(text, counts)
            if self.boilerplate is not None:
                kept = self.boilerplate.without(text, counts)
            if settings.tails:
                kept = without_tails(kept, counts)
            if changed or kept != text:
                fresh = self._mended(kept, language, counts)
                changed = fresh != kept
            if not changed and kept == text:
                return text
        counts["unsettled"] += 1
        return text

    def _mended(self, text: str, language: str, counts: Counter[str]) -> str:
        """A text with what its characters and its markup need."""
        settings = self.settings
        if settings.mojibake:
            text = mended(text, counts)
        if settings.markup:
            text = without_markup(text, counts)
        if settings.controls:
            text = without_controls(text, counts)
        if settings.form != "none":
            text = in_form(text, settings.form, counts)
        if settings.chinese == "simplified":
            text = simplified(text, language, counts)
        return with_plain_blanks(text, counts) if settings.blanks else text

    def _code(self, text: str, _language: str, counts: Counter[str]) -> str:
        """The text of a source, cleaned."""
        if self.settings.controls:
            text = without_controls_of_code(with_line_feeds(text), counts)
        return self._masked(text, counts)

    def _masked(self, text: str, counts: Counter[str]) -> str:
        """A text without personal data."""
        if self.settings.personal:
            text, found = mask(text, self.settings.personal)
            counts.update(found)
        return text


def clean_step(settings: CleanConfig) -> Step:
    """The step that cleans by some settings. Raises ValueError or OSError for a file of the settings that cannot be used."""
    return Cleaner(settings)
