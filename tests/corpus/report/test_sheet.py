"""The sheet of kept documents: to read, and to label."""

import json

from megatrain.corpus.report.examples import Example
from megatrain.corpus.report.sheet import sheet_lines, sheet_page

ROWS = [
    Example("00", "web", "a.jsonl", 120, "", 13, "two\nlines\x1b[2J"),
    Example("01", "书", "b.jsonl", 0, "", 4000, "# no heading"),
]


def test_a_text_is_shown_as_it_is_and_does_nothing():
    assert sheet_page(ROWS) == (
        "# Documents that are kept, chosen by a hash of seed and document\n\n"
        "## 1\n\n    web: a.jsonl:120, 13 characters\n\n    two\n    lines\\x1b[2J\n\n"
        "## 2\n\n    书: b.jsonl:0, 4,000 characters, of which 12 are shown\n\n    # no heading\n"
    )


def test_a_line_has_an_empty_label_to_fill_in():
    first, second = map(json.loads, sheet_lines(ROWS).splitlines())
    assert list(first) == ["item", "label", "source", "file", "at", "letters", "text"]
    assert (first["item"], first["label"], first["text"]) == ("a.jsonl:120", "", "two\nlines\x1b[2J")
    assert second["source"] == "书"
