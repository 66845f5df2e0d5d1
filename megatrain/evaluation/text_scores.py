"""Exact match and token F1 of an answer and its references, in SQuAD's normal form, Chinese by characters.

The normal form is that of SQuAD's evaluation (Rajpurkar 2016: lower case, no punctuation, no articles, single blanks), with what MLQA's
(Lewis 2020) adds for other writing: punctuation is all of Unicode's, and Han and kana characters are tokens of their own, so that mixed
text is scored by words and characters. Full-width forms are as their ASCII ones, and equal strings of two encodings (é as one character
or two) are equal. Token F1 counts bags of tokens, not sets: "no no" against "no" is 2/3.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

_KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_CHARACTER = f"\u3005-\u3007{_KANA}\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WRITTEN_WITHOUT_BLANKS = re.compile(f"[{_CHARACTER}]")
"""A Han or kana character."""
_TOKEN = re.compile(f"[{_CHARACTER}]|[^\\s{_CHARACTER}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_SYMBOLS = "$+<=>^`|~"
"""The part of Python's string.punctuation that is no punctuation to Unicode."""
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"
"""Soft hyphen, blanks and joiners of no width, byte order mark."""


@cache
def _table() -> dict[int, str | None]:
    """Full-width forms to ASCII, punctuation and what cannot be seen to nothing."""
    wide = {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)} | {0x3000: " "}
    gone = {code for code in range(0x20000) if unicodedata.category(chr(code)).startswith("P")}
    gone |= {code for letter in _ASCII_SYMBOLS for code in (ord(letter), 0xFEE0 + ord(letter))}
    return {**wide, **dict.fromkeys([*gone, *map(ord, _INVISIBLE)])}


def normal_form(text: str) -> str:
    """A text in the form in which answers are compared.

    Articles (a, an, the) are removed from text without Han and kana, unless nothing would be left: the answer "A" is not the empty one.
    """
    plain = " ".join(unicodedata.normalize("NFC", text).lower().translate(_table()).split())
    if WRITTEN_WITHOUT_BLANKS.search(plain):
        return plain
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain


def answer_tokens(text: str) -> list[str]:
    """Tokens of a text's normal form: Han and kana characters, and what stands between blanks and them."""
    return _TOKEN.findall(normal_form(text))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals one of the references in normal form, where blanks beside Han and kana do not count; else 0.

    Raises ValueError without references.
    """
    _check(references)
    given = answer_tokens(answer)
    return float(any(given == answer_tokens(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """2 common / (tokens of the answer + tokens of the reference), the largest over references.

    Where the answer or a reference has no tokens, 1 if neither has. Raises ValueError without references.
    """
    _check(references)
    given = Counter(answer_tokens(answer))
    return max(_f1(given, Counter(answer_tokens(reference))) for reference in references)


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = (given & wanted).total()
    return 2.0 * common / (given.total() + wanted.total())


def _check(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"{references!r} are no references. Give a list of at least one text.")


def mostly_without_blanks(text: str) -> bool:
    """Whether most letters of a text are Han or kana."""
    letters = sum(letter.isalpha() for letter in text)
    return 2 * len(WRITTEN_WITHOUT_BLANKS.findall(text)) > letters
