"""The settings of cleaning, `clean:` in a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatrain.config.effects import above, given, where
from megatrain.config.knob import knob

LISTS = given("clean.words.lists")
REMOVES, MASKS = LISTS & where("clean.words.action", "remove"), LISTS & where("clean.words.action", "mask")
COPIES = above("augment.copies", 0)


@dataclass(frozen=True)
class WordsConfig:
    """Words that are not wanted."""

    lists: tuple[str, ...] = knob(
        (),
        "Files of words or phrases, one a line; found without case, English ones as whole words, Chinese ones anywhere.",
        path=True,
        use=("words.txt",),
    )
    action: Literal["score", "mask", "remove"] = knob(
        "score",
        "Keep their share of the letters as score clean.words; also mask them; or remove each line or document that has more.",
        LISTS,
    )
    per: Literal["line", "document"] = knob("document", "Part that is removed.", REMOVES)
    threshold: float = knob(
        0.0, "Share of the letters of the part, blanks not counted, above which it is removed.", REMOVES, at_least=0, at_most=1
    )
    mask: str = knob("*", "Mark for each letter that is masked.", MASKS, not_empty=True)


@dataclass(frozen=True)
class CleanConfig:
    """Cleaning of each document's text, in this order. Code gets line ends, controls, personal data and words alone."""

    mojibake: bool = knob(
        True,
        "Mend lines that were read in a wrong encoding (`ftfy`; UTF-8 read as GBK), and remove those that lost bytes by it.",
    )
    markup: bool = knob(
        True, "Remove HTML's tags and entities, a wiki's links and marks of citations that were left in a text."
    )
    controls: bool = knob(
        True, "Remove control characters and what is not seen (zero-width blanks, soft hyphens, marks of direction)."
    )
    form: Literal["NFC", "NFKC", "none"] = knob("NFC", "Unicode form; NFKC also makes full-width letters and ligatures plain.")
    chinese: Literal["keep", "simplified"] = knob(
        "keep", "Simplified letters for traditional ones (`opencc`), but in texts that are Japanese or Korean."
    )
    blanks: bool = knob(
        True,
        "One blank for several, one empty line for several, none at the ends of lines; not within code, nor before a line.",
    )
    personal: tuple[Literal["email", "phone", "abroad", "id", "card", "ip"], ...] = knob(
        ("email", "phone", "abroad", "id", "card", "ip"),
        "Personal data that is masked as <EMAIL>, <PHONE>, <ID>, <CARD>, <IP>: mail addresses, mobile phones of China, numbers with + and "
        "another country's code (`abroad`), identity cards of China, bank cards, IP addresses.",
    )
    boilerplate: bool = knob(True, "Remove lines of menus, banners and buttons, English and Chinese.")
    boilerplate_file: str | None = knob(
        None,
        "File of further such lines, one a line; `*` at its end: all lines that begin so.",
        where("clean.boilerplate", True),
        path=True,
        use="boilerplate.txt",
    )
    tails: bool = knob(False, "Cut what stands behind the last end of a sentence of a paragraph that has one.")
    words: WordsConfig = field(default_factory=WordsConfig)
    stop_words: str | None = knob(
        None,
        "File of words to remove, one a line: for data of classifiers that count words. It harms language models.",
        path=True,
        use="stop_words.txt",
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Changed copies of documents, for small sets of labelled data. They harm language models, which learn from order and spelling."""

    copies: int = knob(0, "Changed copies that follow each document; 0: none.", at_least=0, at_most=100)
    sources: tuple[str, ...] = knob(
        (), "Names of the sources whose documents get copies; empty: all but code.", COPIES, not_empty=True, use=("labelled",)
    )
    sentences: Literal["keep", "shuffle", "recombine"] = knob(
        "shuffle", "Order of the sentences: kept, shuffled within each paragraph, or dealt out over all paragraphs.", COPIES
    )
    synonyms: str | None = knob(
        None,
        "File of words that may stand for each other, a group a line, with commas: big, large.",
        COPIES,
        path=True,
        use="synonyms.txt",
    )
    synonym_share: float = knob(
        0.2, "Share of the words of that file that are replaced.", COPIES & given("augment.synonyms"), at_least=0, at_most=1
    )
    noise: float = knob(
        0.0, "Share of the letters that are dropped, doubled, swapped or replaced.", COPIES, at_least=0, at_most=1
    )
