"""Remains of markup: what goes and, more often, what stays."""

import time
from collections import Counter

import pytest

from megatrain.corpus.cleaning.remains import without_markup

CASES = {
    "<p>One</p><div class='x'>two<br/>three</div>": "\nOne\n\ntwo\nthree\n",
    "a <b>bold</b> and <a href=\"x\">link</a><img src='y'>.": "a bold and link.",
    "the <b> tag": "the <b> tag",  # opened and never closed: it is spoken of
    "use `<p>` or `&amp;`; x<y, a <T> b, <user@host>, <EMAIL>": "use `<p>` or `&amp;`; x<y, a <T> b, <user@host>, <EMAIL>",
    "see\n\n    <p>code</p>\n\n```\n<br>&amp;\n```\n": "see\n\n    <p>code</p>\n\n```\n<br>&amp;\n```\n",
    "a<!-- b > c -->d<script type='x'>if (a<b) {}</script>e<style>p{}</STYLE>f": "adef",
    "a<!-- b <scripture> <script>": "a<!-- b <scripture> <script>",
    "R&amp;D &lt;3 &#8217;s &amp;nbsp;x &#x4E2D; 5&gt;4 &hellip;": "R&D <3 ’s \xa0x 中 5>4 …",
    "&lt;div&gt; &amp;lt;p&gt; &#60;/b&#62;": "&lt;div> &lt;p> &lt;/b>",  # no tags come out
    "&#xD800; &#x110000; &#0; &foo; &notit; a&b &copy=1 &amp": "\ufffd \ufffd \ufffd &foo; &notit; a&b &copy=1 &amp",
    "&amp;amp;amp;lt;": "<",
    "[[Paris|the city]] of [[Light]][[File:x.jpg|thumb]][[分类:城市]]": "the city of Light",
    '[[1, 2], [3, 4]] a[[b]] [[ -f x ]] [["a"]]': '[[1, 2], [3, 4]] a[[b]] [[ -f x ]] [["a"]]',
    "It is so.[1][23] 如此。[4] 城市[5]在 History[edit]": "It is so. 如此。 城市在 History",
    "a[1] f(x)[2] x: [3], [1] 3.[1]": "a[1] f(x)[2] x: [3], [1] 3.[1]",
}


@pytest.mark.parametrize("text", CASES)
def test_what_goes_and_what_stays(text):
    counts = Counter()
    once = without_markup(text, counts)
    assert once == CASES[text]
    assert (+counts != {}) == (once != text)
    assert without_markup(once, Counter()) == once


def test_changes_are_counted():
    counts = Counter()
    without_markup("<p>a</p>&amp;&lt; [[b]] c.[1] d.[2][3]\n    <p>&amp;", counts)
    assert counts == {"tags": 2, "entities": 2, "links": 1, "citations": 2}


HOSTILE = [
    "<",
    "<p ",
    "<!--",
    "<script>",
    "<scriptx",
    "&amp;",
    "&#38",
    "&",
    "[[",
    "[[a",
    "[[a|",
    "`",
    "`a",
    "[1]",
    "。[1",
    "<b><b>",
    "</script>",
    "<a\t",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear_on_hostile_text(piece):
    begun = time.process_time()
    without_markup(piece * (150_000 // len(piece)) + "<p> &amp; [[a]] .[1]", Counter())
    assert time.process_time() - begun < 2
