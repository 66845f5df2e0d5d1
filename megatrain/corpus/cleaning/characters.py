"""Characters of a text: misread ones mended, one Unicode form, no controls, nothing invisible, one mark for the end of a line.

Each function gives the text back as it is, unless it finds something; finding nothing costs a few nanoseconds a letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Literal

from megatrain.corpus.letters import without_piles
from megatrain.extras import need

PLAIN = bytes([9, 10, *range(32, 127)])
"""Tabs, line feeds and what ASCII shows."""


def unusual(text: str) -> str:
    """The letters of a text but for plain ones; a GB of text in a second, so that other searches have little to look at."""
    return text.encode(errors="surrogatepass").translate(None, PLAIN).decode(errors="surrogatepass")


# --- text that was read in the wrong encoding -----------------------------------------------------------------------------

CONTINUED = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
"""A byte 0x80 to 0xBF, as Latin-1 or Windows-1252 reads it."""
MISREAD = re.compile(
    f"[\xc2-\xdf]{CONTINUED}|[\xe0-\xef]{CONTINUED}{{2}}|[\xf0-\xf4]{CONTINUED}{{3}}|‚Ä|вЂ|[РС][°±²³µ¶·€‚„…†‡‰‹‘’“”•–—™›¤¦§©«¬®ЂЃѓЉЊЌЋЏђљњќћџЎўЈҐґЇ]"
)
"""Where UTF-8 may have been read as Latin-1, Windows-1252, Mac Roman or Windows-1251; `ftfy` then decides, line by line."""
HAN = re.compile("[\u4e00-\u9fff]")
LOST = "锟斤拷"
"""U+FFFD, which stands for what could not be read, in UTF-8 that was read as GBK."""
FEW, SHARE = 4, 0.3
"""A line is UTF-8 read as GBK if at least so many of its characters, and such a share of the Chinese ones, look like it."""


@cache
def _misread_chinese() -> re.Pattern[str]:
    """The 378 characters that GBK reads in the first two bytes of a Chinese character in UTF-8. Hardly any is in use."""
    pairs = [bytes((first, second)) for first in range(0xE4, 0xEA) for second in range(0x80, 0xC0) if second != 0x7F]
    return re.compile("[" + "".join(sorted(pair.decode("gbk", "ignore") for pair in pairs)) + "]")


def mended(text: str, counts: Counter[str]) -> str:
    """A text with lines mended that were read in a wrong encoding; without those that were so and have lost bytes."""
    if text.isascii():
        return text
    rest = unusual(text)
    doubtful = MISREAD.search(rest) is not None
    chinese = HAN.search(rest) is not None and (LOST in rest or len(_misread_chinese().findall(rest)) >= FEW)
    if not doubtful and not chinese:
        return text
    lines = []
    for line in text.split("\n"):
        if line.isascii():
            lines.append(line)
            continue
        found: str | None = _mended_chinese(line) if chinese else line
        if doubtful and found and MISREAD.search(found):
            found = need("ftfy", "clean.mojibake", "data").fix_encoding(found)
        if found is None:
            counts["unreadable"] += 1
            continue
        counts["mojibake"] += found != line
        lines.append(found)
    return "\n".join(lines)


def _mended_chinese(line: str) -> str | None:
    """A line of UTF-8 that was read as GBK, mended; None if bytes of it are lost; other lines as they are."""
    suspects = len(_misread_chinese().findall(line))
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in line)
    if LOST not in line and (suspects < FEW or suspects < SHARE * chinese):
        return line
    try:
        found = line.encode("gb18030").decode()
    except UnicodeError:
        return None
    return None if "\ufffd" in found else found


# --- form, controls, what is not seen -------------------------------------------------------------------------------------

FORM_FEEDS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufff9-\ufffc\ufffe\uffff\ufdd0-\ufdef]")
CONTROLS_OF_CODE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")
"""Removed from source code: form feeds are not, since they part its sections, nor what a string may hold of the rest of Unicode."""
JOINED = "\u0600-\u1fff\u20e3\u2190-\u2bff\ua800-\uabff\ufe0f\U00010a00-\U00011fff\U0001f000-\U0001faff"
"""Letters of scripts, and pictures, whose look a joiner behind them changes."""
INVISIBLE = re.compile(
    f"[\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]|(?<![{JOINED}])[\u200c\u200d]+"
    "|(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+"
)
"""Soft hyphens, zero-width blanks and joiners, marks of direction, byte-order marks, tags that are no part of a flag."""
UNSEEN = re.compile("[\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
"""Without these there is nothing invisible."""


def in_form(text: str, form: Literal["NFC", "NFKC"], counts: Counter[str]) -> str:
    """A text in a Unicode form, with at most 30 combining marks on a letter."""
    before, text = text, without_piles(text)
    if text.isascii() or unicodedata.is_normalized(form, text):
        counts["form"] += text is not before
        return text
    counts["form"] += 1
    return unicodedata.normalize(form, text)


def without_controls(text: str, counts: Counter[str]) -> str:
    """A text without control characters and what is not seen; with ends of lines for what ends a line, page or paragraph."""
    odd = unusual(text)
    if FORM_FEEDS.search(odd) is not None:
        text = FORM_FEEDS.sub("\n", text)
    if CONTROLS.search(odd) is not None:
        text, controls = CONTROLS.subn("", text)
        counts["controls"] += controls
    if UNSEEN.search(odd) is not None:
        text, unseen = INVISIBLE.subn("", text)
        counts["invisible"] += unseen
    return text


def without_controls_of_code(text: str, counts: Counter[str]) -> str:
    """A source without control characters but tabs and form feeds."""
    if CONTROLS_OF_CODE.search(unusual(text)) is not None:
        text, controls = CONTROLS_OF_CODE.subn("", text)
        counts["controls"] += controls
    return text.lstrip("\ufeff")


def with_line_feeds(text: str) -> str:
    """A text with line feeds for CR LF and CR."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
