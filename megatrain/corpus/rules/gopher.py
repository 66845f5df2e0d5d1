"""Signals of the quality of a text (Gopher, arXiv:2112.11446, appendix A.1.1) and of repetition in it (table A1).

Numbers, not decisions: which of them removes a document, and beyond which threshold, rulebook.py and the config say.

    quality      words          words that are not marks alone
                 mean_length    their letters a word
                 hashes         `#` a word, of all words
                 ellipses       `...` and `…` a word
                 letters        share of words with a letter
    lines        bullets        share of lines that begin with • or -
                 cut            share of lines that end in an ellipsis
    stop_words_en, _zh: words   how many different ones of a list there are
    parts        PARTS of repetition.py
    grams        GRAMS of repetition.py
"""

from __future__ import annotations

from functools import cache

import numpy as np

from megatrain.corpus.letters import LETTER, MARK, SPACE
from megatrain.corpus.rules.hashed import Codes, Hashes, Letters, Numbers, Where, hash_all, hashes_of_words
from megatrain.corpus.rules.repetition import GRAMS, PARTS
from megatrain.corpus.rules.view import View, Words
from megatrain.corpus.words import find_parts, jit

STOP_WORDS = {
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    "zh": tuple("的年在月是和日了於·為有被人中为他與後也而由"),
}
"""English: Gopher, A.1.1. Chinese, simplified and traditional: FineWeb-2, configs/cmn_Hani.yml."""
POINT, ELLIPSIS, NUMBER, BULLET, DASH = np.uint32(46), np.uint32(0x2026), np.uint32(35), np.uint32(0x2022), np.uint32(45)


@jit
def _quality(codes: Codes, letters: Letters, starts: Where, ends: Where, out: Numbers) -> None:
    """Fill in words, letters in them, `#`, ellipses, words with a letter."""
    symbols, length, alphabetic = 0, 0, 0
    for i in range(len(starts)):
        plain, has_letter = False, False
        for at in range(starts[i], ends[i]):
            plain = plain or not letters[at] & MARK
            has_letter = has_letter or bool(letters[at] & LETTER)
        if plain:
            length += ends[i] - starts[i]
        else:
            symbols += 1
        alphabetic += has_letter
    hashes, ellipses, points = 0, 0, 0
    for code in codes:
        hashes += code == NUMBER
        ellipses += code == ELLIPSIS
        points = points + 1 if code == POINT else 0
        if points == 3:
            ellipses += 1
            points = 0
    out[0], out[1], out[2], out[3], out[4] = len(starts) - symbols, length, hashes, ellipses, alphabetic


@jit
def _lines(codes: Codes, letters: Letters, starts: Where, ends: Where) -> tuple[int, int]:
    """(lines that begin with a bullet, lines that end in an ellipsis)."""
    bullets, cut = 0, 0
    for i in range(len(starts)):
        begin, end = starts[i], ends[i]
        while begin < end and letters[begin] & SPACE:
            begin += 1
        while end > begin and letters[end - 1] & SPACE:
            end -= 1
        if begin < end:
            bullets += codes[begin] == BULLET or codes[begin] == DASH
            three = end - begin >= 3 and codes[end - 1] == POINT and codes[end - 2] == POINT and codes[end - 3] == POINT
            cut += codes[end - 1] == ELLIPSIS or three
    return bullets, cut


@jit
def _hash_parts(codes: Codes, feeds: int, hashes: Hashes, sizes: Where) -> int:
    """Fill in hashes and letters of the parts between runs of at least so many line feeds; their number."""
    starts = np.empty(len(codes) + 1, np.int64)
    count = find_parts(codes, feeds, starts, sizes)
    hash_all(codes, starts[:count], sizes[:count], hashes)
    for i in range(count):
        sizes[i] -= starts[i]
    return count


@jit
def _stop_words(hashes: Hashes, stops: Hashes) -> int:
    """How many different ones of at most 63 stop words there are."""
    seen = np.int64(0)
    for h in hashes:
        for k in range(len(stops)):
            if h == stops[k]:
                seen |= np.int64(1) << k
                break
    count = 0
    while seen:
        seen &= seen - 1
        count += 1
    return count


@cache
def _stops(language: str) -> Hashes:
    return hashes_of_words(STOP_WORDS[language])


def quality(view: View, table: Words) -> dict[str, float]:
    """The signals of a text's words."""
    spans, out = view.words(table), np.zeros(5)
    _quality(view.arrays.codes, view.arrays.letters, spans.starts, spans.ends, out)
    words, length, hashes, ellipses, letters = out.tolist()
    every = max(len(spans.starts), 1)
    return {
        "words": words,
        "mean_length": length / max(words, 1),
        "hashes": hashes / every,
        "ellipses": ellipses / every,
        "letters": letters / every,
    }


def lines(view: View, table: Words) -> dict[str, float]:
    """The signals of a text's lines."""
    bullets, cut = _lines(view.arrays.codes, view.arrays.letters, view.lines.starts, view.lines.ends)
    every = max(len(view.lines.starts), 1)
    return {"bullets": bullets / every, "cut": cut / every}


def stop_words(language: str, view: View, table: Words) -> dict[str, float]:
    """How many different stop words of a list there are."""
    return {"words": float(_stop_words(view.hashes(table), _stops(language)))}


def parts(view: View, table: Words) -> dict[str, float]:
    """Repetition of lines and paragraphs, of a text without the blanks at its ends."""
    whole, found, codes = max(len(view.text), 1), [], view.stripped.codes
    hashes, sizes = np.empty(len(codes) + 1, np.uint64), np.empty(len(codes) + 1, np.int64)
    for feeds in (1, 2):
        count = _hash_parts(codes, feeds, hashes, sizes)
        again, length = view.repeats.again(hashes[:count], sizes[:count])
        found += [again / count, length / whole]
    return dict(zip(PARTS, found, strict=True))


def grams(view: View, table: Words) -> dict[str, float]:
    """Repetition of n-grams of words."""
    spans = view.words(table)
    found = view.repeats.grams(view.hashes(table), spans.ends - spans.starts) / max(len(view.text), 1)
    return dict(zip(GRAMS, found.tolist(), strict=True))
