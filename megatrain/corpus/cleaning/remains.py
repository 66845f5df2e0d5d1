"""Markup that was left in a text: HTML's tags, comments and entities, a wiki's links, marks of citations. Code stays as it is.

Conservative: known tags alone, inline ones only where they are opened and closed; entities with their semicolon, and never so that a tag
comes out; links only of words.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable
from html.entities import html5

from megatrain.corpus.cleaning.spacing import code_lines

QUOTED = r"(?P<quoted>`[^`\n]{1,200}`)|"
"""Code within a line of Markdown."""
BLOCKS = (
    "address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|figcaption|figure|footer|form|h[1-6]|head|header|hr|html|li|main|nav|ol|p"
    "|section|table|tbody|td|tfoot|th|thead|tr|ul"
)
INLINE = "a|abbr|b|big|button|cite|del|em|font|i|iframe|ins|label|mark|s|small|span|strike|strong|sub|sup|u"
VOID = "img|input|link|meta|wbr"
TAG = re.compile(
    rf"{QUOTED}<(?P<close>/)?(?:(?P<block>{BLOCKS})|(?P<inline>{INLINE})|{VOID})(?:\s[^<>]{{0,1000}})?/?>",
    re.IGNORECASE | re.ASCII,
)
HIDDEN = (("<!--", "-->"), ("<script", "</script>"), ("<style", "</style>"))
"""Begin and end of what is no text."""
ENTITY = re.compile(
    QUOTED + r"&(?P<amps>(?:amp;|#38;|#x26;)*)(?P<name>#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{1,31};)?",
    re.ASCII,
)
LINK = re.compile(
    QUOTED
    + r"(?<![A-Za-z0-9_)])(?<![^\]]\])\[\[(?P<target>[^\W\d][^\[\]{}<>|\n=$\"']{0,200})(?:\|(?P<label>[^\[\]{}<>|\n]{0,200}))?\]\]"
)
NO_TEXT = re.compile(r"(?:file|image|category|文件|图像|图片|檔案|圖像|分类|分類)\s*:", re.IGNORECASE)
"""Links that show a picture or file the page."""
CITATION = re.compile(
    QUOTED
    + r"(?:(?<=[A-Za-z]\.)|(?<=[。！？；，、\u4e00-\u9fff]))(?:\[[0-9]{1,3}\])+|\[(?:edit|citation needed|编辑|編輯|来源请求|來源請求)\]"
)

SIGNS = {
    "tags": re.compile(r"<(?:/?[A-Za-z]|!--)"),
    "entities": re.compile("&[#A-Za-z0-9]{2,32};"),
    "links": re.compile(r"\[\["),
    "citations": re.compile(r"\[(?:[0-9]{1,3}|edit|citation needed|编辑|編輯|来源请求|來源請求)\]"),
}
"""Without these a text has no remains of a kind; each begins with one letter, so that 3 GB are searched in a second."""


def without_markup(text: str, counts: Counter[str]) -> str:
    """A text without the remains of markup."""
    kinds = [kind for kind, sign in SIGNS.items() if sign.search(text) is not None]
    if not kinds:
        return text
    remove: dict[str, Callable[[str, Counter[str]], str]] = {
        "tags": _without_tags,
        "entities": _without_entities,
        "links": _without_links,
        "citations": _without_citations,
    }
    lines, parts, begin = text.split("\n"), [], 0
    code = code_lines(lines)
    for end in range(1, len(lines) + 1):
        if end < len(lines) and code[end] == code[begin]:
            continue
        part = "\n".join(lines[begin:end])
        if not code[begin]:
            for kind in kinds:
                part = remove[kind](part, counts)
        parts.append(part)
        begin = end
    return "\n".join(parts)


def _without_tags(text: str, counts: Counter[str]) -> str:
    """A text without tags, comments, scripts and styles; a tag that begins or ends a block leaves the end of a line."""
    for begin, end in HIDDEN:
        text = _without_hidden(text, begin, end, counts)
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for tag in TAG.finditer(text):
        if tag["inline"]:
            sides[bool(tag["close"])].add(tag["inline"].lower())
    paired = sides[True] & sides[False]

    def removed(tag: re.Match[str]) -> str:
        if tag["quoted"] or (tag["inline"] and tag["inline"].lower() not in paired):
            return tag[0]
        counts["tags"] += 1
        return "\n" if tag["block"] else ""

    return TAG.sub(removed, text)


def _without_hidden(text: str, begin: str, end: str, counts: Counter[str]) -> str:
    """A text without what lies between two marks; a begin without an end stays."""
    folded = text.lower() if begin[1].isalpha() else text
    if begin not in folded or len(folded) != len(text):  # few letters become two when they are folded
        return text
    parts, done, at = [], 0, folded.find(begin)
    while at >= 0:
        if begin[1].isalpha() and folded[at + len(begin) : at + len(begin) + 1].isalnum():  # another name: <stylesheet
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

    def letter(entity: re.Match[str]) -> str:
        said, name = entity[0], entity["name"]
        if entity["quoted"]:
            return said
        shown = "&"
        if name:
            shown = html.unescape(f"&{name}") if name[0] == "#" else html5.get(name, f"&{name}")
        if shown == "<" and re.match("[/!A-Za-z<]", entity.string[entity.end() : entity.end() + 1]):
            shown = "&lt;"
        counts["entities"] += shown != said
        return shown

    return ENTITY.sub(letter, text)


def _without_links(text: str, counts: Counter[str]) -> str:
    """A text with the words of a wiki's links alone."""

    def words(link: re.Match[str]) -> str:
        if link["quoted"]:
            return link[0]
        counts["links"] += 1
        return "" if NO_TEXT.match(link["target"]) else link["label"] or link["target"]

    return LINK.sub(words, text)


def _without_citations(text: str, counts: Counter[str]) -> str:
    """A text without `[1]` behind a sentence, `[edit]` and their like."""

    def nothing(citation: re.Match[str]) -> str:
        counts["citations"] += not citation["quoted"]
        return citation["quoted"] or ""

    return CITATION.sub(nothing, text)
