"""The signals of rules written plainly, from their sources: str.split, Counter and regular expressions. Slow.

Each function takes a text and its words and gives a signal's numbers by name, as megatrain/corpus/rules has them.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter


def is_mark(letter: str) -> bool:
    """Whether a letter is punctuation, a symbol or a control character, and no blank."""
    return unicodedata.category(letter)[0] in "PSC" and not letter.isspace()


def is_han(letter: str) -> bool:
    """Whether a letter is a Chinese character."""
    return letter in "々〆〇" or unicodedata.name(letter, "").startswith(
        ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
    )


def words(text: str, table: str) -> list[str]:
    """The words of a text: between blanks; and each mark by itself; and each Chinese character by itself."""
    if table == "marks":
        text = "".join(f" {letter} " if is_mark(letter) else letter for letter in text)
    if table == "han":
        text = "".join(f" {letter} " if is_mark(letter) or is_han(letter) else letter for letter in text)
    return text.split()


def quality(text: str, found: list[str]) -> dict[str, float]:
    """Gopher, A.1.1, of words."""
    plain = [word for word in found if not all(map(is_mark, word))]
    every = max(len(found), 1)
    return {
        "words": len(plain),
        "mean_length": sum(map(len, plain)) / max(len(plain), 1),
        "hashes": text.count("#") / every,
        "ellipses": (text.count("...") + text.count("…")) / every,
        "letters": sum(any(letter.isalpha() for letter in word) for word in found) / every,
    }


def lines(text: str) -> dict[str, float]:
    """Gopher, A.1.1, of lines."""
    found = text.splitlines()
    return {
        "bullets": sum(line.strip().startswith(("•", "-")) for line in found) / max(len(found), 1),
        "cut": sum(line.strip().endswith(("...", "…")) for line in found) / max(len(found), 1),
    }


def stop_words(found: list[str], wanted: str) -> dict[str, float]:
    """How many different ones of some words there are."""
    return {"words": len(set(found) & set(wanted.split()))}


def seen_before(parts: list[str]) -> tuple[int, int]:
    """(how many parts were there before, their letters)."""
    known, again = set(), []
    for part in parts:
        if part in known:
            again.append(part)
        known.add(part)
    return len(again), sum(map(len, again))


def parts(text: str) -> dict[str, float]:
    """Gopher, table A1, of lines and paragraphs."""
    rows, paragraphs = re.split(r"\n+", text.strip()), re.split(r"\n{2,}", text.strip())
    (again_rows, row_letters), (again_paragraphs, paragraph_letters) = seen_before(rows), seen_before(paragraphs)
    return {
        "lines": again_rows / len(rows),
        "line_letters": row_letters / max(len(text), 1),
        "paragraphs": again_paragraphs / len(paragraphs),
        "paragraph_letters": paragraph_letters / max(len(text), 1),
    }


def grams(text: str, found: list[str]) -> dict[str, float]:
    """Gopher, table A1, of n-grams: words joined by a blank; the repeated ones taken from the beginning, none overlapping another."""
    numbers, whole = {}, max(len(text), 1)
    for n in (2, 3, 4):
        often = Counter(" ".join(found[i : i + n]) for i in range(len(found) - n + 1)).most_common(1)
        numbers[f"top_{n}"] = sum(len(gram) * times for gram, times in often) / whole
    for n in range(5, 11):
        known, length, i = set(), 0, 0
        while i + n <= len(found):
            gram = tuple(found[i : i + n])
            if gram in known:
                length += sum(map(len, gram))
                i += n
            else:
                known.add(gram)
                i += 1
        numbers[f"again_{n}"] = length / whole
    return numbers


def fineweb(text: str, found: list[str], endings: set[str]) -> dict[str, float]:
    """FineWeb, section 3.6; endings: marks that end sentences."""
    rows = [line for line in text.split("\n") if line.strip()]
    return {
        "ended": sum(line[-1] in endings for line in rows) / max(len(rows), 1),
        "short": sum(len(line) <= 30 for line in rows) / max(len(rows), 1),
        "same_letters": seen_before(rows)[1] / max(len(text.replace("\n", "")), 1),
        "feeds": text.count("\n") / max(len(found), 1),
    }


def mc4(text: str) -> dict[str, float]:
    """mC4, section 3.1: three lines of at least 200 letters."""
    return {"third_line": sorted([0, 0, 0, *map(len, text.split("\n"))])[-3]} if text.count("\n") > 1 else {"third_line": 0}


POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def c4(text: str, keep_unended: bool = False) -> tuple[str, dict[str, float]]:
    """C4, section 2.2, in the order of its program: (the lines that stay, the numbers of the document)."""
    kept, numbers = [], {"lorem_ipsum": 0, "curly_bracket": 0, "sentences": 0}
    for row in text.splitlines():
        line = re.sub(r"\[\d*]|\[edit]|\[citation needed]", "", row).strip()
        low = line.lower()
        if any(len(word) > 1000 for word in line.split()):
            continue
        if not keep_unended and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(line.split()) < 3:
            continue
        numbers["lorem_ipsum"] += low.count("lorem ipsum")
        if "javascript" in low:
            continue
        numbers["curly_bracket"] += line.count("{")
        if any(phrase in low for phrase in POLICIES):
            continue
        numbers["sentences"] += len([part for part in re.split(r"""(?<=[.!?])[.!?]*["')\]’”]*\s""", line) if part])
        kept.append(line)
    return "\n".join(kept).strip(), numbers


WESTERN = str.maketrans(
    "。！“”＃＄％＆‘’（）＊＋，－／：；＜＝＞？＠［＼］＾＿｀｛｜｝～", ".!\"\"#$%&''()*+,-/:;<=>?@[\\]^_`{|}~"
)


def map_neo(text: str) -> dict[str, float]:
    """MAP-NEO's rules for Chinese, with a letter's compatible form for that of the text, and the first 10,000 letters for all."""
    western = text.translate(WESTERN)
    plain = "".join(unicodedata.normalize("NFKC", letter) for letter in western)
    lines, first = plain.splitlines(), plain[:10_000]
    told = [letter for letter in plain if re.match(r"[\w\s]", letter)]
    shares = [often / len(first) for often in Counter(first).values()]
    bullets = ("•", "●", "○", "■", "□", "▪", "▫", "※", "·", "➢", "\u2023", "\u25b6", "\u25c0", "\u25e6", "\u2013")
    return {
        "brackets": sum(map(len, re.findall("【(.*?)】", plain))) / max(len(plain), 1),
        "sentences": len([part for part in re.split(r'[.!…?;"]+', western) if part.strip()]),
        "letters": len(plain),
        "hashes": len(re.findall("#+", western)) / max(len(text), 1),
        "ellipses": (len(re.findall("…+", western)) + len(re.findall(r"\.{2,}", western))) / max(len(text), 1),
        "digits": sum(letter.isdecimal() for letter in told) / max(len(told), 1),
        "more": sum(line.endswith(("readmore", "展开", "更多", "。。。", "...")) for line in lines) / max(len(lines), 1),
        "bullets": sum(line.startswith(bullets) for line in lines) / max(len(lines), 1),
        "marks": sum(letter in string.punctuation + "…" for letter in plain) / max(len(plain), 1),
        "unique": len(set(first)) / max(len(first), 1),
        "entropy": -sum(share * math.log(share) for share in shares),
    }


def letters(text: str) -> dict[str, float]:
    """MAP-NEO's repetition of letters in a row; of the repeated ones the letters, where its program counts different letters."""
    numbers, whole = {}, max(len(text), 1)
    for n in (2, 3, 4):
        often = Counter(text[i : i + n] for i in range(len(text) - n + 1)).most_common(1)
        numbers[f"top_{n}"] = sum(n * (times - 1) for _, times in often) / whole
    return numbers | {name: number for name, number in grams(text, list(text)).items() if name.startswith("again")}


def twice(found: list[str]) -> float:
    """The share of what is there more than once."""
    often = Counter(found)
    return sum(times for times in often.values() if times > 1) / max(len(found), 1)


def web_text(text: str) -> dict[str, float]:
    """ChineseWebText, preprocess.py; without its test for traditional characters."""
    solid = re.sub("[ \n\t]", "", text.strip().lower())
    return {
        "letters": len(text),
        "line_letters": len(text) / len(text.split("\n")),
        "han": sum(map(is_han, text)) / max(len(text), 1),
        "again_13": twice([solid[i : i + 13] for i in range(len(solid) - 12)]),
    }


def frequent(found: list[str]) -> float:
    """ROOTS, compute_character_repetition_ratio."""
    often = sorted(Counter(found).values(), reverse=True)
    count = min(int(math.sqrt(len(often))), sum(times > 1 for times in often))
    return sum(often[:count]) / max(len(found), 1)


def roots(text: str, table: str) -> dict[str, float]:
    """ROOTS, filtering.py, with the words of a table and Unicode's marks, digits and blanks for its list of special letters."""
    plain = [word for word in words(text.lower(), table) if not all(map(is_mark, word))]
    return {
        "letters_3": frequent([text[i : i + 3] for i in range(len(text) - 2)]),
        "letters_10": frequent([text[i : i + 10] for i in range(len(text) - 9)]),
        "words_5": twice([" ".join(plain[i : i + 5]) for i in range(len(plain) - 4)]),
        "special": sum(is_mark(letter) or letter.isdecimal() or letter.isspace() for letter in text) / max(len(text), 1),
    }


def code(text: str) -> dict[str, float]:
    """bigcode-dataset, filtering.py, and StarCoder 2's basic filters."""
    sizes = [len(line) for line in text.splitlines()]
    marks = ("auto-generated", "autogenerated", "automatically generated", "generated automatically", "this file is generated")
    patterns = (
        r"[a-zA-Z0-9+/\n=]{64,}",
        r"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}",
        r"(?:\\u[0-9a-fA-F]{4}){8,}",
    )
    runs = [len(match[0]) for pattern in patterns for match in re.finditer(pattern, text)]
    return {
        "lines": len(sizes),
        "long_line": max(sizes, default=0),
        "mean_line": sum(sizes) / max(len(sizes), 1),
        "letters": sum(map(str.isalpha, text)) / max(len(text), 1),
        "letters_digits": sum(map(str.isalnum, text)) / max(len(text), 1),
        "generated": sum("\n".join(text.splitlines()[:5]).lower().count(mark) for mark in marks),
        "encoded": sum(runs) / max(len(text), 1),
        "encoded_run": max(runs, default=0),
        "xml": "<?xml version=" in text[:100],
    }


def chinese_lines(text: str, wudao: bool) -> tuple[str, dict[str, float]]:
    """The lines that stay by WuDao's rule (10 Chinese characters), or by MAP-NEO's."""
    kept = []
    for line in map(str.strip, text.splitlines()):
        low, found = line.lower(), [word for word in words(line, "han") if not all(map(is_mark, word))]
        good = line.endswith(tuple(".?!…。！？")) and len(found) >= 3 and "javascript" not in low and "lorem ipsum" not in low
        if sum(map(is_han, line)) >= 10 if wudao else good:
            kept.append(line)
    return "\n".join(kept).strip(), {}


ENGLISH, CHINESE = "the be to of and that have with", "的 年 在 月 是 和 日 了 於 · 為 有 被 人 中 为 他 與 後 也 而 由"
ENDINGS = set(".!?。！？．｡؟।‼⁇")
"""Those of the marks which end sentences that the documents of the tests have, and some."""


def signals(text: str, measure: str, table: str) -> dict[str, float]:
    """The signals of a measure by its name in megatrain/corpus/rules/judge.py."""
    found = words(text, table)
    if measure == "web_text":
        traditional = [letter for letter in text if is_han(letter) and b"" < letter.encode("big5", "ignore") < b"\xc6\xa1"]
        return web_text(text) | {"traditional": sum(not letter.encode("gb2312", "ignore") for letter in traditional)}
    made = {
        "quality": lambda: quality(text, found),
        "lines": lambda: lines(text),
        "stop_words_en": lambda: stop_words(found, ENGLISH),
        "stop_words_zh": lambda: stop_words(found, CHINESE),
        "parts": lambda: parts(text),
        "grams": lambda: grams(text, found),
        "fineweb": lambda: fineweb(text, found, ENDINGS),
        "mc4": lambda: mc4(text),
        "map_neo": lambda: map_neo(text),
        "letters": lambda: letters(text),
        "roots": lambda: roots(text, table),
        "code": lambda: code(text),
    }
    return made[measure]()
