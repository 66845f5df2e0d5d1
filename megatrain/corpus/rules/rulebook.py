"""The rules as data: what each looks at, its threshold and who says so. docs/rules.md is made from this table.

    gopher.words.least     signal quality.words of the words between blanks, at least 50
    gopher.letters         signal quality.letters, at least 0.8; a signal with one bound has a rule of its own name

A rule is asked for by its name or by any beginning of it that ends before a point: `gopher.words` is both bounds, `gopher` the whole set.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from megatrain.corpus.rules.view import Words

Bound = Literal["least", "most", "above", "below"]
"""How a signal must lie to its threshold: not below it, not above it, above it, below it."""
MEETS: Mapping[Bound, Callable[[Any, float], Any]] = {
    "least": operator.ge,
    "most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


@dataclass(frozen=True)
class TextRule:
    """One condition that a document, or a line of it, must meet.

    name     by which it is asked for and reported
    score    by which its signal is stored with a document
    signal   the measure that finds it and its name there, with a point between
    """

    name: str
    score: str
    signal: str
    words: Words
    bound: Bound
    threshold: float
    says: str
    source: str

    @property
    def of(self) -> str:
        """Name of the set of rules that it belongs to."""
        return self.name.partition(".")[0]

    @property
    def acts(self) -> Literal["document", "line"]:
        """Whether it refuses a document or takes a line away."""
        return "line" if self.signal.startswith("line.") else "document"

    def holds(self, value: float) -> bool:
        """Whether a signal meets the rule."""
        return bool(MEETS[self.bound](value, self.threshold))


Bounds = Mapping[Bound, float]
Row = tuple[str, str, Bounds, str]
"""A signal of a source: its name there, the signal, its bounds, and what it is."""


def _most(threshold: float) -> Bounds:
    return {"most": threshold}


def _rules(prefix: str, words: Words, source: str, rows: Iterable[Row]) -> Iterable[TextRule]:
    """The rules of a source; of a signal with two bounds, a rule for each."""
    for name, signal, bounds, says in rows:
        score = f"{prefix}.{name}"
        for bound, threshold in bounds.items():
            full = score if len(bounds) == 1 else f"{score}.{bound}"
            yield TextRule(full, score, signal, words, bound, threshold, says, source)


GOPHER, TABLE_A1 = "Gopher, arXiv:2112.11446, A.1.1", "Gopher, arXiv:2112.11446, table A1"
QUALITY: tuple[Row, ...] = (
    ("words", "quality.words", {"least": 50, "most": 100_000}, "words, without those of marks alone"),
    ("mean_length", "quality.mean_length", {"least": 3, "most": 10}, "letters a word"),
    ("hashes", "quality.hashes", {"most": 0.1}, "`#` a word"),
    ("ellipses", "quality.ellipses", {"most": 0.1}, "ellipses (`...`, `…`) a word"),
    ("bullets", "lines.bullets", {"most": 0.9}, "share of lines that begin with `•` or `-`"),
    ("cut_lines", "lines.cut", {"most": 0.3}, "share of lines that end in an ellipsis"),
    ("letters", "quality.letters", {"least": 0.8}, "share of words with a letter"),
    ("stop_words", "stop_words_en.words", {"least": 2}, "different ones of the, be, to, of, and, that, have, with"),
)
PROBABILITY = "probability of the language, where it was detected"
TOP = "share of letters in the most frequent {} words in a row"
AGAIN = "share of letters in {} words in a row that were there before"
REPETITION: tuple[Row, ...] = (
    ("lines", "parts.lines", {"most": 0.3}, "share of lines that were there before"),
    ("line_letters", "parts.line_letters", {"most": 0.2}, "share of letters in lines that were there before"),
    ("paragraphs", "parts.paragraphs", {"most": 0.3}, "share of paragraphs that were there before"),
    ("paragraph_letters", "parts.paragraph_letters", {"most": 0.2}, "share of letters in paragraphs that were there before"),
    *((f"top_{n}", f"grams.top_{n}", _most(most), TOP.format(n)) for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))),
    *((f"again_{n}", f"grams.again_{n}", _most((20 - n) / 100), AGAIN.format(n)) for n in range(5, 11)),
)


C4, MC4 = "C4, arXiv:1910.10683, section 2.2", "mC4, arXiv:2010.11934, section 3.1"
LINES_OF_C4: tuple[Row, ...] = (
    ("citations", "line.citations", _most(0), "`[1]`, `[edit]`, `[citation needed]`, which go; the line stays"),
    ("long_word", "line.long_word", _most(1000), "letters of the longest word of a line"),
    ("line_end", "line.line_end", {"least": 1}, "1 where a line ends in `.`, `?`, `!`, `\"` or `'`, but not in `...`; else 0"),
    ("line_words", "line.line_words", {"least": 3}, "words of a line"),
    ("javascript", "line.javascript", _most(0), "how often a line says javascript"),
    (
        "policy",
        "line.policy",
        _most(0),
        "how often a line speaks of terms of use, privacy policy, cookie policy, use of cookies",
    ),
    ("lorem_ipsum", "left.lorem_ipsum", _most(0), "how often the lines left say lorem ipsum"),
    ("curly_bracket", "left.curly_bracket", _most(0), "curly brackets `{` in the lines left"),
    ("sentences", "left.sentences", {"least": 5}, "sentences in the lines that stay"),
)
FINEWEB, FINEWEB_2 = "FineWeb, arXiv:2406.17557, section 3.6", "FineWeb-2, configs/cmn_Hani.yml"
LINES_OF_FINEWEB: tuple[Row, ...] = (
    ("ended_lines", "fineweb.ended", {"least": 0.12}, "share of lines that end in a mark which ends sentences"),
    ("short_lines", "fineweb.short", _most(0.67), "share of lines of at most 30 letters"),
    ("same_letters", "fineweb.same_letters", _most(0.01), "share of letters in lines that were there before"),
    ("feeds", "fineweb.feeds", _most(0.3), "line feeds a word"),
)
CHINESE_FINEWEB: tuple[Row, ...] = (
    ("probability", "scores.language.probability", {"least": 0.692}, PROBABILITY),
    ("lines", "parts.lines", _most(0.287), "share of lines that were there before"),
    *((f"top_{n}", f"grams.top_{n}", _most(most), TOP.format(n)) for n, most in ((2, 0.256), (3, 0.201), (4, 0.171))),
    *(
        (f"again_{n}", f"grams.again_{n}", _most(most), AGAIN.format(n))
        for n, most in ((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127))
    ),
    ("ended_lines", "fineweb.ended", {"least": 0.106}, "share of lines that end in a mark which ends sentences"),
    ("same_letters", "fineweb.same_letters", _most(0.1), "share of letters in lines that were there before"),
    ("feeds", "fineweb.feeds", _most(0.178), "line feeds a word"),
    ("words", "quality.words", {"least": 50, "most": 100_000}, "words, without those of marks alone"),
    ("mean_length", "quality.mean_length", {"least": 1, "most": 5}, "letters a word"),
    *QUALITY[2:6],
    ("letters", "quality.letters", {"least": 0.735}, "share of words with a letter"),
    ("stop_words", "stop_words_zh.words", {"least": 2}, "different ones of 的年在月是和日了於·為有被人中为他與後也而由"),
)
MAP_NEO_SAYS = "MAP-NEO, arXiv:2405.19327, Matrix/chinese_data_clean_pipeline/filter/filter.py"
MAP_NEO: tuple[Row, ...] = (
    ("line_end", "line.line_end", {"least": 1}, "1 where a line ends in `.`, `!`, `?`, `…` or `。`, `！`, `？`; else 0"),
    ("line_words", "line.line_words", {"least": 3}, "characters and words of a line, without marks"),
    ("javascript", "line.javascript", _most(0), "how often a line says javascript"),
    ("lorem_ipsum", "line.lorem_ipsum", _most(0), "how often a line says lorem ipsum"),
    ("brackets", "map_neo.brackets", _most(0.1), "share of letters between 【 and 】"),
    ("sentences", "map_neo.sentences", {"above": 1}, 'parts between `.!…?;"` and their Chinese forms'),
    ("letters", "map_neo.letters", {"least": 50, "most": 10_000}, "letters"),
    ("hashes", "map_neo.hashes", _most(0.1), "runs of `#` a letter"),
    ("ellipses", "map_neo.ellipses", _most(0.1), "runs of `…` and of points a letter"),
    ("digits", "map_neo.digits", _most(0.3), "share of digits among letters, digits and blanks"),
    ("more", "map_neo.more", _most(0.3), "share of lines that end in 更多, 展开, readmore, 。。。"),
    ("bullets", "map_neo.bullets", _most(0.9), "share of lines that begin with one of •●○■□▪▫※·➢‣▶◀◦–"),
    ("marks", "map_neo.marks", {"above": 0}, "share of Western marks, and Chinese ones with such a form"),
    ("unique", "map_neo.unique", {"above": 0.1}, "share of different ones among the first 10,000 letters"),
    ("entropy", "map_neo.entropy", {"least": 3}, "entropy of the first 10,000 letters in nats"),
    *(
        (
            f"top_{n}",
            f"letters.top_{n}",
            _most(most),
            f"share of letters in the most frequent {n} letters in a row, but the first time",
        )
        for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))
    ),
    *(
        (f"again_{n}", f"letters.again_{n}", _most(0.6), f"share of letters in {n} letters in a row that were there before")
        for n in range(5, 11)
    ),
    ("probability", "scores.language.probability", {"least": 0.4}, PROBABILITY),
)
WORDS_OF_MAP_NEO: tuple[Row, ...] = (("mean_length", "quality.mean_length", {"least": 1.3, "most": 10}, "letters a word"),)
ROOTS_SAYS = "ROOTS, arXiv:2303.03915, parameters_filtering.py"


def _roots(words: Bounds, n: int, repetition: tuple[float, float], special: float, probability: float) -> tuple[Row, ...]:
    letters_again, words_again = repetition
    return (
        ("words", "quality.words", words, "words, without those of marks alone"),
        (
            "letters_again",
            f"roots.letters_{n}",
            _most(letters_again),
            f"share of the {n} letters in a row that are the most frequent ones",
        ),
        ("words_again", "roots.words_5", _most(words_again), "share of the 5 words in a row that are there more than once"),
        ("special", "roots.special", _most(special), "share of marks, digits and blanks"),
        ("probability", "scores.language.probability", {"least": probability}, PROBABILITY),
    )


CHINESE_WEB_TEXT: tuple[Row, ...] = (
    ("letters", "web_text.letters", {"above": 200}, "letters"),
    ("line_letters", "web_text.line_letters", {"least": 10}, "letters a line"),
    ("han", "web_text.han", {"least": 0.3}, "share of Chinese characters"),
    ("traditional", "web_text.traditional", _most(0), "Chinese characters that are only traditional"),
    (
        "again_13",
        "web_text.again_13",
        _most(0.5),
        "share of the 13 letters in a row, without blanks, that are there more than once",
    ),
)
WUDAO: tuple[Row, ...] = (
    ("line_han", "line.line_han", {"least": 10}, "Chinese characters of a line"),
    ("han", "web_text.han", {"least": 0.7}, "share of Chinese characters"),
)
STACK, STARCODER_2 = (
    "bigcode-dataset, preprocessing/arguments.py (arXiv:2301.03988)",
    "StarCoder 2, arXiv:2402.19173, basic filters",
)
STACKED: tuple[Row, ...] = (
    ("long_line", "code.long_line", _most(1000), "letters of the longest line"),
    ("mean_line", "code.mean_line", _most(100), "letters a line"),
    ("letters_digits", "code.letters_digits", {"least": 0.25}, "share of letters and numbers"),
    ("xml", "code.xml", _most(0), "1 where `<?xml version=` is among the first 100 letters"),
)
STARRED: tuple[Row, ...] = (
    ("lines", "code.lines", _most(100_000), "lines"),
    ("letters", "code.letters", {"least": 0.25}, "share of letters"),
    ("generated", "code.generated", _most(0), "how often the first five lines say that a program wrote the file"),
    ("encoded", "code.encoded", _most(0.5), "share of base64, and of bytes and letters by number"),
    ("encoded_run", "code.encoded_run", _most(1024), "letters of the longest such data"),
)
LANGUAGE: tuple[Row, ...] = (("probability", "scores.language.probability", {"least": 0.65}, PROBABILITY),)
OTHER_LANGUAGE: tuple[Row, ...] = (
    (
        "other",
        "scores.language.other",
        _most(0),
        "1 where another language was found than the source declares (`language.detect: all`)",
    ),
)


def _table() -> dict[str, TextRule]:
    """Every rule by its name, in the order in which they are told."""
    sources = (
        _rules("language", "blanks", "FineWeb, arXiv:2406.17557, section 3.3", LANGUAGE),
        _rules("language", "blanks", "megatrain", OTHER_LANGUAGE),
        _rules("gopher", "blanks", GOPHER, QUALITY),
        _rules("gopher", "blanks", TABLE_A1, REPETITION),
        _rules("c4", "blanks", C4, LINES_OF_C4),
        _rules("mc4", "blanks", MC4, [("third_line", "mc4.third_line", {"least": 200}, "letters of the third longest line")]),
        _rules("fineweb", "blanks", FINEWEB, LINES_OF_FINEWEB),
        _rules("fineweb2_zh", "han", FINEWEB_2, CHINESE_FINEWEB),
        _rules("map_neo", "han", MAP_NEO_SAYS, MAP_NEO),
        _rules("map_neo", "jieba", MAP_NEO_SAYS, WORDS_OF_MAP_NEO),
        _rules("roots", "marks", ROOTS_SAYS, _roots({"least": 10, "most": 100_000}, 10, (0.2, 0.3), 0.4, 0.7)),
        _rules("roots_en", "marks", ROOTS_SAYS, _roots({"least": 20, "most": 100_000}, 10, (0.106, 0.19), 0.4, 0.8)),
        _rules("roots_zh", "han", ROOTS_SAYS, _roots({"least": 1, "most": 1_000_000}, 3, (0.2, 0.96), 0.3, 0.85)),
        _rules("chinese_web_text", "han", "ChineseWebText, arXiv:2311.01149, preprocess.py", CHINESE_WEB_TEXT),
        _rules("wudao", "han", "WuDaoCorpora, doi:10.1016/j.aiopen.2021.06.001", WUDAO),
        _rules("code", "blanks", STACK, STACKED),
        _rules("code", "blanks", STARCODER_2, STARRED),
    )
    return {rule.name: rule for rules in sources for rule in rules}


RULES: Mapping[str, TextRule] = _table()


def chosen(names: Iterable[str], thresholds: Mapping[str, float | str | bool], words: Words | None = None) -> list[TextRule]:
    """The rules of some names or beginnings of names, with their own thresholds and word table or the given ones.

    Rules that make sense of jieba's words alone are in a set where words is "jieba"; by their own name they are always there.
    thresholds: a number by rule, or "off" (which YAML reads as false) by rule or beginning of names.
    Raises ValueError: nothing has that name; a number for more than one rule; bounds that nothing meets; anything else.
    """
    wanted = [(asked, name) for asked in names for name in named(asked)]
    found = {name: RULES[name] for asked, name in wanted if words == "jieba" or RULES[name].words != "jieba" or "." in asked}
    for asked, value in thresholds.items():
        those = named(asked)
        if value is False or value == "off":
            for name in those:
                found.pop(name, None)
        elif isinstance(value, (str, bool)):
            raise ValueError(f"the threshold of the rule {asked} is {value!r}: must be a number, or off")
        elif len(those) > 1:
            raise ValueError(
                f"{asked} names {len(those)} rules, which one number cannot serve: say {asked}: off, or name one: {those[0]}"
            )
        elif those[0] in found:
            found[those[0]] = replace(found[those[0]], threshold=float(value))
        else:
            raise ValueError(f"there is a threshold for the rule {those[0]}, which is not asked for: add it to the rules")
    for name, rule in found.items():
        most = found.get(f"{rule.score}.most")
        if rule.bound == "least" and most is not None and rule.threshold > most.threshold:
            raise ValueError(
                f"no document can meet {name}={rule.threshold:g} and {most.name}={most.threshold:g}: give both, the first one smaller"
            )
    return [replace(rule, words=words) if words and rule.words != "jieba" else rule for rule in found.values()]


def named(asked: str) -> list[str]:
    """The names of the rules that a name or a beginning stands for. Raises ValueError if there are none."""
    those = [name for name in RULES if name == asked or name.startswith(f"{asked}.")]
    if those:
        return those
    known = sorted({*RULES, *(name[:at] for name in RULES for at, letter in enumerate(name) if letter == ".")})
    near = get_close_matches(asked, known, 1, 0)
    raise ValueError(f"there is no rule {asked!r}; the nearest is {near[0]} (docs/rules.md has all)")
