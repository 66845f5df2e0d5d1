"""Signals for Chinese: MAP-NEO's (arXiv:2405.19327), ChineseWebText's (arXiv:2311.01149) and those of ROOTS (arXiv:2303.03915).

map_neo    of the text in Unicode's compatible forms, one letter after another, with Chinese marks for Western ones
           brackets   share of letters between 【 and 】 on a line
           sentences  parts with something in them between . ! … ? ; "
           letters    how many there are
           hashes, ellipses     runs of `#`; of `…` and of two points or more, a letter
           digits     share of letters, digits and blanks
           more       share of lines that end in 更多, 展开, readmore or 。。。
           bullets    share of lines that begin with a bullet
           marks      share of Western marks
           unique     share of different ones among the first 10,000 letters
           entropy    of the first 10,000 letters, in nats
letters    top_2 .. top_4       share of letters in the most frequent n letters in a row, but the first time
           again_5 .. again_10  share of letters in n letters in a row that were there before, each letter once
web_text   letters; line_letters: letters a line; han: share of Chinese characters; traditional: how many of them are only traditional;
           again_13: share of the 13 letters in a row, without blanks, that are there more than once
roots      letters_3, letters_10   share of the n letters in a row that are among the most frequent (as many as the root of how many
                                   different ones there are, but none that is there once)
           words_5                 share of the 5 words in a row that are there more than once, in small letters
           special                 share of marks, digits and blanks
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

from megatrain.corpus.letters import DIGIT, HAN, LETTER, MARK, NUMBER, SPACE
from megatrain.corpus.rules.hashed import Hashes
from megatrain.corpus.rules.repetition import GRAMS
from megatrain.corpus.rules.scripts import forms
from megatrain.corpus.rules.view import View, Words
from megatrain.corpus.words import Text

FIRST = 10_000
"""Letters on which signals hang that fall with the length of a text: as many as MAP-NEO's longest text has."""
WESTERN = str.maketrans(
    "。！“”＃＄％＆‘’（）＊＋，－／：；＜＝＞？＠［＼］＾＿｀｛｜｝～",
    ".!\"\"#$%&''()*+,-/:;<=>?@[\\]^_`{|}~",
)
SENTENCES = re.compile(r'[.!…?;"。！？；“”]+')
MORE = ("readmore", "展开", "更多", "。。。", "...")
BULLETS = tuple("•●○■□▪▫※·➢\u2023\u25b6\u25c0\u25e6\u2013")
MARKS = np.array([ord(mark) for mark in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…"], np.uint32)


@cache
def _compatible() -> dict[int, str]:
    """The compatible form of each letter that has another one, of Chinese marks the Western ones."""
    forms_of = {
        code: unicodedata.normalize("NFKC", chr(WESTERN.get(code, code)))
        for code in range(0x30000)
        if not 0xD800 <= code < 0xE000
    }
    return {code: form for code, form in forms_of.items() if form != chr(code)}


def _bracketed(text: str) -> int:
    """Letters between 【 and the next 】, on one line."""
    inside = 0
    for line in text.split("\n") if "【" in text else ():
        begin = line.find("【")
        while begin >= 0 and (end := line.find("】", begin + 1)) >= 0:
            inside += end - begin - 1
            begin = line.find("【", end + 1)
    return inside


def _runs(inside: npt.NDArray[np.bool_], least: int = 1) -> int:
    """How many runs of at least so many."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return int(np.count_nonzero(edges[1::2] - edges[::2] >= least))


def map_neo(view: View, table: Words) -> dict[str, float]:
    """The signals of MAP-NEO."""
    text = view.text if view.text.isascii() else view.text.translate(_compatible())
    codes, letters = Text.of(text)
    raw, whole, long = view.arrays.codes, max(len(view.text), 1), max(len(codes), 1)
    lines = text.splitlines()
    _, often = np.unique(codes[:FIRST], return_counts=True)
    shares = often / max(often.sum(), 1)
    points = (raw == ord(".")) | (raw == ord("。"))
    told = int(np.count_nonzero(letters & (LETTER | DIGIT | NUMBER | SPACE) != 0)) + int(np.count_nonzero(codes == ord("_")))
    return {
        "brackets": _bracketed(text) / long,
        "sentences": float(sum(not part.isspace() for part in SENTENCES.split(view.text) if part)),
        "letters": float(len(codes)),
        "hashes": _runs((raw == ord("#")) | (raw == ord("＃"))) / whole,
        "ellipses": (_runs(raw == ord("…")) + _runs(points, 2)) / whole,
        "digits": int(np.count_nonzero(letters & DIGIT)) / max(told, 1),
        "more": sum(line.endswith(MORE) for line in lines) / max(len(lines), 1),
        "bullets": sum(line.startswith(BULLETS) for line in lines) / max(len(lines), 1),
        "marks": int(np.count_nonzero(np.isin(codes, MARKS))) / long,
        "unique": len(often) / max(min(len(codes), FIRST), 1),
        "entropy": float(-(shares * np.log(shares)).sum()) if len(often) else 0.0,
    }


def letters(view: View, table: Words) -> dict[str, float]:
    """Repetition of letters in a row."""
    codes, whole = view.arrays.codes, max(len(view.text), 1)
    found = view.repeats.grams(codes.astype(np.uint64), np.ones(len(codes), np.int64))
    for n in (2, 3, 4):  # letters have no blanks between them
        found[n - 2] = max(found[n - 2] // (2 * n - 1) - 1, 0) * n
    return dict(zip(GRAMS, (found / whole).tolist(), strict=True))


def _twice(often: npt.NDArray[np.int64]) -> float:
    """The share of what is there more than once."""
    return int(often[often > 1].sum()) / max(int(often.sum()), 1)


def web_text(view: View, table: Words) -> dict[str, float]:
    """The signals of ChineseWebText."""
    codes, classes = view.arrays
    solid = view.text.strip().lower().replace(" ", "").replace("\n", "").replace("\t", "")
    return {
        "letters": float(len(codes)),
        "line_letters": len(codes) / (view.text.count("\n") + 1),
        "han": int(np.count_nonzero(classes & HAN)) / max(len(codes), 1),
        "traditional": float(forms(codes).traditional),
        "again_13": _twice(view.repeats.often(Text.of(solid).codes.astype(np.uint64), 13)),
    }


def _frequent(often: npt.NDArray[np.int64]) -> float:
    """The share of the most frequent, as many as the root of how many there are, but none that is there once."""
    count = min(int(len(often) ** 0.5), int(np.count_nonzero(often > 1)))
    return int(np.partition(often, len(often) - count)[len(often) - count :].sum()) / int(often.sum()) if count else 0.0


def _plain(view: View, table: Words) -> Hashes:
    """The hashes of words that are not marks alone."""
    words = view.words(table)
    before = np.concatenate([[0], np.cumsum(view.arrays.letters & MARK == 0)])
    return view.hashes(table)[before[words.ends] > before[words.starts]]


def roots(view: View, table: Words) -> dict[str, float]:
    """The signals of ROOTS."""
    codes, classes = view.arrays
    low = view.of(view.text.lower())
    return {
        **{f"letters_{n}": _frequent(view.repeats.often(codes.astype(np.uint64), n)) for n in (3, 10)},
        "words_5": _twice(view.repeats.often(_plain(low, table), 5)),
        "special": int(np.count_nonzero(classes & (MARK | DIGIT | SPACE))) / max(len(codes), 1),
    }
