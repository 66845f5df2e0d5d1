"""The table of words `spacy`: nearly those of spaCy's English tokenizer, by which datatrove's filters count.

What lies between blanks loses marks at its begin and end, each a word by itself; what is left is cut at some marks inside it, unless it is
an address:

    "(it's 5km.)"          ( it 's 5 km . )
    well-known, end.Next   well - known , end . Next
    https://x.org/a-b      one word, as e.g. and Mr. are

Differences that are left: smileys, and joined words such as cannot, 5pm, dont.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

from megatrain.corpus.letters import ASSIGNED, DIGIT, LETTER, SPACE, UPPER
from megatrain.corpus.rules.hashed import Codes, Hashes, Letters, Where, hashes_of_words
from megatrain.corpus.words import Extents, Text, hash_of, jit

EDGE, FRONT, MONEY, QUOTE, DASH, SIGN, CUT, ICON, APOSTROPHE, SCHEME = (np.uint16(1 << bit) for bit in range(10))
"""Kinds of marks: at either end; at the begin alone; behind a number; quotes; between letters; between numbers; before letters; symbols
anywhere; in short forms; in the name of a scheme.
"""
QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
CURRENCIES = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
MARKS = (
    (EDGE, "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪—–" + QUOTES),
    (FRONT, "§%=" + CURRENCIES),
    (MONEY, CURRENCIES),
    (QUOTE, QUOTES + ","),
    (DASH, "-–—~"),
    (SIGN, "+-*^"),
    (CUT, ":<>=/"),
    (ICON, "…"),
    (APOSTROPHE, "'’"),
    (SCHEME, "+-._"),
)
WHOLE = """
a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z. ä. ö. ü. Mr. Mrs. Ms. Dr. Prof. St. Mt. Jr. Messrs. Gen. Gov.
Rep. Rev. Sen. Adm. Ph.D. D.C. a.m. p.m. e.g. E.g. E.G. i.e. I.e. I.E. vs. v.s. Inc. Ltd. Co. Corp. Bros. co. Jan. Feb. Mar. Apr. Jun.
Jul. Aug. Sep. Sept. Oct. Nov. Dec. Ala. Ariz. Ark. Calif. Colo. Conn. Del. Fla. Ga. Ia. Id. Ill. Ind. Kan. Ky. La. Mass. Md. Mich. Minn.
Miss. Mo. Mont. Neb. Nev. N.C. N.D. N.H. N.J. N.M. N.Y. S.C. Okla. Ore. Pa. Tenn. Va. Wash. Wis. C++
"""
"""Words that keep the mark at their end."""
UNITS = """
km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb MB kb KB gb GB tb
TB T G M K %
"""
"""Words of their own behind a number."""
LONGEST_WHOLE, LONGEST_UNIT = 7, 4
POINT, PLUS, COLON, SLASH, AT, COMMA, BRACKET, MINUS = (np.uint32(ord(mark)) for mark in ".+:/@,)-")
S, N, T, D, M = (np.uint32(ord(letter)) for letter in "sntdm")
L, V, R, E = (np.uint32(ord(letter)) for letter in "lvre")
CASE = np.uint32(32)
"""The bit that a small letter of ASCII has and its capital has not."""
WORD = LETTER | DIGIT
Kinds = npt.NDArray[np.uint16]


@cache
def _kinds() -> Kinds:
    """The kinds of marks by code point [0x110000]."""
    found = np.zeros(0x110000, np.uint16)
    for kind, marks in MARKS:
        found[[ord(mark) for mark in marks]] |= kind
    found[[code for code in range(ASSIGNED) if unicodedata.category(chr(code)) == "So"]] |= ICON | EDGE
    found.flags.writeable = False
    return found


@cache
def _known() -> tuple[Hashes, Hashes]:
    """Sorted hashes of (WHOLE, UNITS)."""
    return np.sort(hashes_of_words(tuple(WHOLE.split()))), np.sort(hashes_of_words(tuple(UNITS.split())))


@jit
def _is_one(codes: Codes, begin: int, end: int, hashes: Hashes) -> bool:
    """Whether some letters are one of the words with sorted hashes."""
    h = hash_of(codes, begin, end)
    at = np.searchsorted(hashes, h)
    return bool(at < len(hashes) and hashes[at] == h)


@jit
def _is_whole(codes: Codes, begin: int, end: int, whole: Hashes) -> bool:
    """Whether some letters are a word that keeps the mark at its end, or the smiley that a bracket before a colon is."""
    last, size = codes[end - 1], end - begin
    if last == COLON:
        return bool(size == 2 and codes[begin] == BRACKET)
    return bool(last == POINT or last == PLUS) and size <= LONGEST_WHOLE and _is_one(codes, begin, end, whole)  # noqa: PLR1714, SIM109


@jit
def _run(codes: Codes, at: int, end: int) -> int:
    """How often a letter is there in a row."""
    i = at
    while i < end and codes[i] == codes[at]:
        i += 1
    return i - at


@jit
def _host(codes: Codes, letters: Letters, kinds: Kinds, begin: int, end: int) -> int:
    """Where the host of an address begins: behind `scheme://` and `name@`."""
    at = begin
    while at < end and (letters[at] & WORD or kinds[at] & SCHEME):
        at += 1
    slashes = begin + 1 < at < end - 2 and codes[at] == COLON and codes[at + 1] == SLASH and codes[at + 2] == SLASH
    host = at + 3 if slashes else begin
    for i in range(host, end):
        if codes[i] == AT:
            host = i + 1
    return host


@jit
def _is_address(codes: Codes, letters: Letters, kinds: Kinds, begin: int, end: int) -> bool:
    """Whether some letters are an address: perhaps scheme and name, then `a.b.cd` or four numbers, then perhaps port and path."""
    i = _host(codes, letters, kinds, begin, end)
    points, size, small, numbers = 0, 0, True, True
    while i < end and (letters[i] & WORD or kinds[i] & SCHEME) and codes[i] != PLUS:
        point = codes[i] == POINT
        if point and size == 0:
            return False
        points += point
        numbers = numbers and (point or bool(letters[i] & DIGIT))
        small = point or (small and bool(letters[i] & LETTER) and not letters[i] & UPPER)
        size = 0 if point else size + 1
        i += 1
    if points == 0 or size == 0 or not ((small and size > 1) or (numbers and points == 3)):
        return False
    if i < end and codes[i] == COLON:
        i += 1
        while i < end and letters[i] & DIGIT:
            i += 1
    return bool(i == end or codes[i] == SLASH or codes[i] == 63 or codes[i] == 35)


@jit
def _front(codes: Codes, letters: Letters, kinds: Kinds, begin: int, end: int) -> int:
    """Letters of the mark at the begin; 0: none."""
    if codes[begin] == POINT:
        run = _run(codes, begin, end)
        return run if run > 1 else 0
    if codes[begin] == PLUS:
        return 0 if begin + 1 < end and letters[begin + 1] & DIGIT else 1
    return 1 if kinds[begin] & (EDGE | FRONT) else 0


@jit
def _point_behind(codes: Codes, letters: Letters, kinds: Kinds, begin: int, end: int) -> int:
    """Letters of the points at the end; 0: they belong to what is before them."""
    i = end
    while i > begin and codes[i - 1] == POINT:
        i -= 1
    if end - i > 1 or i == begin:
        return end - i if end - i > 1 else 0
    before = letters[i - 1]
    if before & UPPER:
        return 1 if i - 1 > begin and letters[i - 2] & UPPER else 0
    return 1 if before & WORD or kinds[i - 1] & (EDGE | SIGN) or codes[i - 1] == 37 else 0


@jit
def _back(codes: Codes, letters: Letters, kinds: Kinds, begin: int, end: int, units: Hashes) -> int:
    """Letters of the mark, `'s` or unit at the end; 0: none."""
    if begin >= end:
        return 0
    last, long = codes[end - 1], end - begin > 1
    if last == POINT:
        return _point_behind(codes, letters, kinds, begin, end)
    found = 1 if kinds[end - 1] & EDGE else 0
    if long and kinds[end - 2] & APOSTROPHE and last | CASE == S:
        found = 2
    if long and not found and letters[end - 2] & DIGIT and (last == PLUS or kinds[end - 1] & MONEY):
        found = 1
    size = min(LONGEST_UNIT, end - begin - 1)
    while size > 0 and not found:
        if letters[end - size - 1] & DIGIT and _is_one(codes, end - size, end, units):
            found = size
        size -= 1
    return found


@jit
def _inside(codes: Codes, letters: Letters, kinds: Kinds, i: int, begin: int, end: int) -> int:
    """Letters of the mark at i, in the middle of a word, that cuts it; 0: none."""
    code, kind = codes[i], kinds[i]
    run = _run(codes, i, end if code == POINT else min(end, i + 3))
    if (code == POINT and run > 1) or kind & ICON:
        return run if code == POINT else 1
    if i == begin or i + 1 >= end:
        return 0
    left, right = letters[i - 1], letters[i + 1]
    if kind & DASH and left & WORD and i + run < end and letters[i + run] & LETTER:
        return run
    lower = (left & LETTER and not left & UPPER) or kinds[i - 1] & QUOTE
    numbers = kind & SIGN and left & DIGIT and (right & DIGIT or codes[i + 1] == MINUS)
    sentences = code == POINT and lower and (right & UPPER or kinds[i + 1] & QUOTE)
    words = right & LETTER and ((code == COMMA and left & LETTER) or (kind & CUT and left & WORD))
    return 1 if numbers or sentences or words else 0


@jit
def _short_form(codes: Codes, letters: Letters, kinds: Kinds, begin: int, end: int) -> int:
    """Letters of n't, 'll, 've, 're, 'd or 'm at the end of a word of letters; 0: none."""
    at = end - 2 if end - begin > 2 and kinds[end - 2] & APOSTROPHE else end - 3
    if at <= begin or not kinds[at] & APOSTROPHE:
        return 0
    for i in range(begin, at):
        if not letters[i] & LETTER:
            return 0
    one, two = codes[at + 1], codes[end - 1]
    if end - at == 2:
        negates = one == T and codes[at - 1] == N and at - 1 > begin
        return 3 if negates else 2 if one in (D, M) else 0
    return 3 if (one == L and two == L) or (two == E and one in (V, R)) else 0


@jit
def _add(begin: int, end: int, starts: Where, ends: Where, count: int) -> int:
    """Add a word if it has letters; how many there are."""
    if begin >= end:
        return count
    starts[count], ends[count] = begin, end
    return count + 1


@jit
def _find(
    codes: Codes, letters: Letters, kinds: Kinds, whole: Hashes, units: Hashes, starts: Where, ends: Where, cuts: Where
) -> int:
    """Fill in where words begin and end; their number. cuts: room for the ends of the marks at the end of a word."""
    count, at, n = 0, 0, len(codes)
    while at < n:
        begin = at
        while at < n and not letters[at] & SPACE:
            at += 1
        end, behind = at, 0
        at += 1
        while begin < end and not _is_whole(codes, begin, end, whole):
            front = _front(codes, letters, kinds, begin, end)
            back = _back(codes, letters, kinds, begin + front, end, units)
            if front and begin + front < end and _is_whole(codes, begin + front, end, whole):
                back = 0
            elif back and begin < end - back and _is_whole(codes, begin, end - back, whole):
                front = 0
            if front + back == 0:
                break
            count = _add(begin, begin + front, starts, ends, count)
            begin += front
            cuts[behind] = end
            behind += back > 0
            end -= back
        short = _short_form(codes, letters, kinds, begin, end)
        i = begin + 1
        if short or begin >= end or _is_whole(codes, begin, end, whole) or _is_address(codes, letters, kinds, begin, end):
            i = end
        first = begin
        while i < end:
            size = _inside(codes, letters, kinds, i, begin, end)
            if size:
                count = _add(first, i, starts, ends, count)
                count = _add(i, i + size, starts, ends, count)
                first = i + size
            i += max(size, 1)
        count = _add(first, end - short, starts, ends, count)
        count = _add(end - short, end, starts, ends, count)
        while behind:
            behind -= 1
            smiley = behind > 0 and codes[end] == BRACKET and codes[end + 1] == COLON and cuts[behind - 1] == end + 2
            behind -= smiley
            count = _add(end, cuts[behind], starts, ends, count)
            end = cuts[behind]
    return count


def spacy_words(text: Text) -> Extents:
    """The words of a text."""
    codes, letters = text
    starts, ends, cuts = (np.empty(len(codes), np.int64) for _ in range(3))
    count = _find(codes, letters, _kinds()[codes], *_known(), starts, ends, cuts)
    return Extents(starts[:count], ends[:count])
