"""Markup that was left in a text: HTML's tags, comments and entities, a wiki's links, marks of citations. Code stays as it is.

Conservative: known tags alone, inline ones only where they are opened and closed; entities with their semicolon, and never so that a tag
comes out; links only of words.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections import Counter
from html.entities import html5
from itertools import accumulate

from megatrain.corpus.cleaning.spacing import INDENTED, fenced_lines

QUOTED = re.compile(r"`[^`\n]{1,200}`")
"""Code within a line of Markdown."""
BLOCKS = (
    "address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|figcaption|figure|footer|form|h[1-6]|head|header|hr|html|li|main|nav|ol|p"
    "|section|table|tbody|td|tfoot|th|thead|tr|ul"
)
INLINE = "a|abbr|b|big|button|cite|del|em|font|i|iframe|ins|label|mark|s|small|span|strike|strong|sub|sup|u"
VOID = "img|input|link|meta|wbr"
TAG = re.compile(
    rf"<(?P<close>/)?(?:(?P<block>{BLOCKS})|(?P<inline>{INLINE})|{VOID})(?:\s[^<>]{{0,1000}})?/?>", re.IGNORECASE | re.ASCII
)
HIDDEN = (("<!--", "-->"), ("<script", "</script>"), ("<style", "</style>"))
"""Begin and end of what is no text."""
HIDDEN_SIGN = re.compile("<(?:!--|script|style)", re.IGNORECASE | re.ASCII)
ENTITY = re.compile(
    r"&(?P<amps>(?:amp;|#38;|#x26;)*)(?P<name>#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{1,31};)?", re.ASCII
)
LINK = re.compile(
    r"\[\[(?<![A-Za-z0-9_)]\[\[)(?<![^\]]\]\[\[)"
    r"(?P<target>[^\W\d][^\[\]{}<>|\n=$\"']{0,200})(?:\|(?P<label>[^\[\]{}<>|\n]{0,200}))?\]\]"
)
NO_TEXT = re.compile(r"(?:file|image|category|文件|图像|图片|檔案|圖像|分类|分類)\s*:", re.IGNORECASE)
"""Links that show a picture or file the page."""
CITATION = re.compile(
    r"\[(?:(?:(?<=[A-Za-z]\.\[)|(?<=[。！？；，、\u4e00-\u9fff]\[))[0-9]{1,3}\](?:\[[0-9]{1,3}\])*"
    r"|(?:edit|citation needed|编辑|編輯|来源请求|來源請求)\])"
)


class Code:
    """Which letters of a text may be code: lines of it, and what is quoted within one. Asked in order, it reads each line once."""

    def __init__(self, text: str) -> None:
        self.text, self.begin, self.end = text, 0, -1
        self.spans: list[tuple[int, int]] = []
        """Code in the line from `begin` to `end`."""
        self.fenced: list[tuple[int, int]] | None = None if "```" in text else []

    def _between_fences(self) -> list[tuple[int, int]]:
        """Begin and end of the lines between fences."""
        lines = self.text.split("\n")
        fenced = fenced_lines(self.text, lines)
        ends = list(accumulate(map(len, lines))) if fenced else []  # without the ends of lines
        return [(ends[number] - len(lines[number]) + number, ends[number] + number) for number in sorted(fenced)]

    def holds(self, at: int) -> bool:
        """Whether a letter may be code."""
        if self.fenced is None:
            self.fenced = self._between_fences()
        place = bisect_right(self.fenced, (at, len(self.text))) - 1
        if place >= 0 and at < self.fenced[place][1]:
            return True
        if not self.begin <= at <= self.end:
            self.begin, self.end = self.text.rfind("\n", 0, at) + 1, self.text.find("\n", at)
            self.end = len(self.text) if self.end < 0 else self.end
            line = self.text[self.begin : self.end]
            quoted = [(0, len(line))] if line.startswith(INDENTED) else [code.span() for code in QUOTED.finditer(line)]
            self.spans = [(self.begin + begin, self.begin + end) for begin, end in quoted]
        place = bisect_right(self.spans, (at, len(self.text))) - 1
        return place >= 0 and at < self.spans[place][1]


SIGNS = (
    re.compile(rf"<(?:/?(?:{BLOCKS}|{INLINE}|{VOID})[\s/>]|!--|script|style)", re.IGNORECASE | re.ASCII),
    re.compile("&(?:#[0-9]|#[xX][0-9a-fA-F]|[A-Za-z][A-Za-z0-9]{1,31};)"),
    LINK,
    CITATION,
)
"""Without these a text has no remains of a kind; each begins with one letter, so that 3 GB are searched in a second."""


def without_markup(text: str, counts: Counter[str]) -> str:
    """A text without the remains of markup."""
    parts = (_without_tags, _without_entities, _without_links, _without_citations)
    for mark, sign, part in zip("<&[[", SIGNS, parts, strict=True):
        if mark in text and sign.search(text) is not None:
            text = part(text, counts)
    return text


def _without_tags(text: str, counts: Counter[str]) -> str:
    """A text without tags, comments, scripts and styles; a tag that begins or ends a block leaves the end of a line."""
    for begin, end in HIDDEN if HIDDEN_SIGN.search(text) is not None else ():
        text = _without_hidden(text, begin, end, counts)
    code = Code(text)
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for tag in TAG.finditer(text):
        if tag["inline"] and not code.holds(tag.start()):
            sides[bool(tag["close"])].add(tag["inline"].lower())
    paired = sides[True] & sides[False]

    def removed(tag: re.Match[str]) -> str:
        if code.holds(tag.start()) or (tag["inline"] and tag["inline"].lower() not in paired):
            return tag[0]
        counts["tags"] += 1
        return "\n" if tag["block"] else ""

    return TAG.sub(removed, text)


def _without_hidden(text: str, begin: str, end: str, counts: Counter[str]) -> str:
    """A text without what lies between two marks; a begin without an end stays."""
    folded = text if begin == "<!--" else text.lower()
    at = folded.find(begin)
    if at < 0 or len(folded) != len(text):  # few letters become two when they are folded
        return text
    code, parts, done = Code(text), [], 0
    while at >= 0:
        other = begin != "<!--" and folded[at + len(begin) : at + len(begin) + 1].isalnum()  # <scripture
        if other or code.holds(at):
            at = folded.find(begin, at + 1)
            continue
        if (close := folded.find(end, at)) < 0:
            break
        parts.append(text[done:at])
        done = close + len(end)
        counts["tags"] += 1
        at = folded.find(begin, done)
    return "".join([*parts, text[done:]])


def _without_entities(text: str, counts: Counter[str]) -> str:
    """A text with letters for entities, those that were escaped twice too; `&lt;b` stays, which would become a tag."""
    code = Code(text)

    def letter(entity: re.Match[str]) -> str:
        said, name, shown = entity[0], entity["name"], "&"
        if said == "&" or code.holds(entity.start()):
            return said
        if name:
            shown = html.unescape(f"&{name}") if name[0] == "#" else html5.get(name, f"&{name}")
        if shown == "<" and re.match("[/!A-Za-z<]", text[entity.end() : entity.end() + 1]):
            shown = "&lt;"
        counts["entities"] += shown != said
        return shown

    return ENTITY.sub(letter, text)


def _without_links(text: str, counts: Counter[str]) -> str:
    """A text with the words of a wiki's links alone."""
    code = Code(text)

    def words(link: re.Match[str]) -> str:
        if code.holds(link.start()):
            return link[0]
        counts["links"] += 1
        return "" if NO_TEXT.match(link["target"]) else link["label"] or link["target"]

    return LINK.sub(words, text)


def _without_citations(text: str, counts: Counter[str]) -> str:
    """A text without `[1]` behind a sentence, `[edit]` and their like."""
    code = Code(text)

    def nothing(citation: re.Match[str]) -> str:
        if code.holds(citation.start()):
            return citation[0]
        counts["citations"] += 1
        return ""

    return CITATION.sub(nothing, text)
