"""Changed copies of documents, for small sets of labelled data; a function of (seed, source, file, place, number of the copy) alone.

    sentences   shuffled within their paragraph, or recombined: dealt out anew over all paragraphs of the document
    synonyms    words of the user's groups, each replaced by another one of its group
    noise       letters dropped, doubled, swapped with the next, or replaced by another letter of the document

In this order. Lines that may be code and placeholders of personal data stay. A copy says in its mark `augmented` which one it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import xxhash

from megatrain.corpus.cleaning.boilerplate import read_lines
from megatrain.corpus.cleaning.choices import AugmentConfig
from megatrain.corpus.cleaning.sensitive import Trie
from megatrain.corpus.cleaning.spacing import code_lines
from megatrain.corpus.cleaning.tails import END
from megatrain.corpus.document import Document, Tally
from megatrain.data.draws import Draws

MARK = "augmented"
GROUP = re.compile("[,，\t]")
"""Parts the words of a group of synonyms."""
PLACEHOLDER = re.compile("<(?:EMAIL|PHONE|ID|CARD|IP)>")


class Augmenter:
    """Gives a document and its changed copies. Raises ValueError or OSError for a file of synonyms that cannot be used."""

    def __init__(self, settings: AugmentConfig, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.synonyms = read_synonyms(settings.synonyms) if settings.synonyms is not None else {}
        self.trie = Trie(sorted(self.synonyms))

    def __call__(self, document: Document, tally: Tally) -> Iterator[Document]:
        """The document and its copies; of code, and of sources that are not chosen, the document alone."""
        yield document
        settings = self.settings
        if document.kind == "code" or (settings.sources and document.source not in settings.sources):
            return
        place = xxhash.xxh3_64_intdigest(f"{document.source}\0{document.file}\0{document.at}".encode())
        for copy in range(1, settings.copies + 1):
            text = self.changed(document.text, Draws(self.seed, place, copy))
            if text == document.text:  # nothing to change, such as one sentence without synonyms
                tally.count("augment.unchanged")
                continue
            tally.count("augment.copies")
            yield replace(document, text=text, scores=dict(document.scores), marks={**document.marks, MARK: copy})

    def changed(self, text: str, draws: Draws) -> str:
        """A text, changed by a stream of random numbers."""
        if self.settings.sentences != "keep":
            text = with_moved_sentences(text, draws, across=self.settings.sentences == "recombine")
        if self.synonyms:
            text = self._with_synonyms(text, draws)
        return with_noise(text, self.settings.noise, draws) if self.settings.noise > 0 else text

    def _with_synonyms(self, text: str, draws: Draws) -> str:
        """A text with other words of their groups, in the case of those they replace."""
        found = self.trie.find(text)[0].tolist()
        chances, choices = draws.uniform(len(found)), draws.uniform(len(found))
        parts, done = [], 0
        for (begin, end), chance, choice in zip(found, chances, choices, strict=True):
            if chance < self.settings.synonym_share and not _in_placeholder(text, begin):
                said, others = text[begin:end], self.synonyms[_small(text[begin:end])]
                parts += [text[done:begin], in_case_of(said, others[int(choice * len(others))])]
                done = end
        return "".join([*parts, text[done:]])


def augmenting(settings: AugmentConfig, seed: int) -> Callable[[Document, Tally], Iterator[Document]]:
    """The function from a document to it and its copies."""
    return Augmenter(settings, seed)


# --- sentences ------------------------------------------------------------------------------------------------------------


def sentences_of(line: str) -> list[str]:
    """The sentences of a paragraph, without blanks at their ends; what stands behind the last is one too."""
    found, begin = [], 0
    for mark in END.finditer(line):
        found.append(line[begin : mark.end()].strip())
        begin = mark.end()
    return [sentence for sentence in (*found, line[begin:].strip()) if sentence]


def joined(sentences: Sequence[str]) -> str:
    """A paragraph of some sentences: blanks between them, but behind a wide letter as in Chinese."""
    return "".join(said if said[-1] > "\u2e80" else f"{said} " for said in sentences).rstrip(" ")


def with_moved_sentences(text: str, draws: Draws, *, across: bool) -> str:
    """A text whose sentences stand in another order within their paragraphs; across: within the whole text, as many a paragraph."""
    lines = text.split("\n")
    numbers = [number for number, code in enumerate(code_lines(text, lines)) if not code and lines[number].strip()]
    parts = {number: sentences_of(lines[number]) for number in numbers}
    if across:
        pool = [sentence for number in numbers for sentence in parts[number]]
        dealt = iter([pool[place] for place in draws.permutation(len(pool))])
        parts = {number: list(islice(dealt, len(parts[number]))) for number in numbers}
    else:
        parts = {number: [of[place] for place in draws.permutation(len(of))] for number, of in parts.items()}
    for number, of in parts.items():
        lines[number] = joined(of)
    return "\n".join(lines)


# --- words and letters ----------------------------------------------------------------------------------------------------


def read_synonyms(path: str) -> Mapping[str, Sequence[str]]:
    """Word -> other words, from a file with a group a line, parted by commas or tabs. Raises ValueError for a line of one word."""
    groups: dict[str, list[str]] = {}
    for line in read_lines(path):
        words = [word.strip() for word in GROUP.split(line) if word.strip()]
        if len(words) < 2:
            raise ValueError(
                f"{path}: {line[:40]!r} has one word alone. Write words that mean the same in a line, with commas: big, large"
            )
        for word in words:
            groups.setdefault(_small(word), []).extend(other for other in words if _small(other) != _small(word))
    return {word: sorted(set(others)) for word, others in groups.items() if others}


def _small(word: str) -> str:
    """A word in small letters, as many as it has."""
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in word)


def in_case_of(said: str, word: str) -> str:
    """A word with capitals where another one has them: at its beginning, or everywhere."""
    if said.isupper() and len(said) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if said[:1].isupper() else word


def with_noise(text: str, share: float, draws: Draws) -> str:
    """A text with a share of its letters changed; digits, marks and placeholders stay."""
    chances, kinds, others = draws.uniform(len(text)), draws.below(4, len(text)), draws.below(max(1, len(text)), len(text))
    held = {place for found in PLACEHOLDER.finditer(text) for place in range(*found.span())}
    letters, place = list(text), 0
    for place in (chances < share).nonzero()[0].tolist():
        letter = text[place]
        if not letter.isalpha() or place in held:
            continue
        kind, behind, other = int(kinds[place]), text[place + 1 : place + 2], text[int(others[place])]
        if kind == 0:
            letters[place] = ""
        elif kind == 1:
            letters[place] = letter * 2
        elif kind == 2 and behind.isalpha() and place + 1 not in held and letters[place + 1] == behind:
            letters[place], letters[place + 1] = behind, letter
        elif other.isalpha():
            letters[place] = other
    return "".join(letters)


def _in_placeholder(text: str, begin: int) -> bool:
    """Whether a word is that of a placeholder."""
    return text[max(0, begin - 1) : begin] == "<" and PLACEHOLDER.match(text, begin - 1) is not None
