"""REPORT.md and removed.md: the right numbers in the right rows, and texts of files that stay texts."""

import pytest

from megatrain.corpus.document import Document, Sighting
from megatrain.corpus.report.examples import Examples
from megatrain.corpus.report.page import examples_page, page
from megatrain.corpus.report.summary import summary_of

COUNTS = {
    "read/in/documents/web": 40,
    "read/in/documents/books": 10,
    "read/in/bytes/web": 4_000,
    "read/in/bytes/books": 6_000,
    "read/out/documents/web": 40,
    "read/out/documents/books": 10,
    "read/out/bytes/web": 4_000,
    "read/out/bytes/books": 6_000,
    "read/in/letters/26": 40,
    "read/in/letters/37": 10,
    "filter/in/documents/web": 40,
    "filter/in/documents/books": 10,
    "filter/in/bytes/web": 4_000,
    "filter/in/bytes/books": 6_000,
    "filter/refused/c4.brace/documents/web": 2,
    "filter/refused/c4.brace/documents/books": 1,
    "filter/refused/c4.brace/bytes/web": 100,
    "filter/alone/c4.brace/documents/web": 2,
    "filter/refused/gopher.words/documents/web": 20,
    "filter/refused/gopher.words/bytes/web": 2_000,
    "filter/alone/gopher.words/documents/web": 18,
    "filter/out/documents/web": 20,
    "filter/out/documents/books": 9,
    "filter/out/bytes/web": 1_900,
    "filter/out/bytes/books": 5_000,
    "filter/out/letters/26": 29,
    "filter/language/en": 20,
    "filter/language/zh": 9,
    "tokens/web": 500,
    "tokenized/web": 1_000,
    "cluster/near/2": 5,
    "cluster/near/3": 1,
    "cluster/near/9": 1,
    "cluster/exact/2": 3,
    "perplexity/en/32": 10,
    "clean.email": 7,
    "read.invalid_utf8": 3,
}
PLACES = {
    "read.invalid_utf8": [Sighting("a|b`.jsonl", "line 7", "byte 0xff <img src=x>\n\x1b[2J"), Sighting("b.jsonl", "", "x")]
}


def rows(text, title):
    """The rows of the table below a title."""
    below = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in below.splitlines() if line.startswith("|")][2:]


@pytest.fixture(scope="module")
def text():
    cutoffs = {"en": (260.0, 290.0)}
    return page(summary_of(COUNTS, ["read", "filter"]), PLACES, title="A|B", note="n", pictures=["rules.png"], cutoffs=cutoffs)


def test_the_first_lines_say_what_became_of_the_input(text):
    assert text.startswith(
        "# A\\|B\n\nn\n\n50 documents (10.00 kB) became 29 (58.0%; 6.90 kB, 69.0% of the bytes, 500 tokens).\n\n## Alarms\n\n"
        "- source web loses 50% of its documents (20 of 40), most of them in filter (20)\n\n"
        "To read: [documents that are kept](sheet.md), [what rules refuse](removed.md).\n\n## Stages"
    )


def test_every_table_has_its_numbers(text):
    assert rows(text, "Stages") == [
        ["read", "50", "50", "100.0%", "10.00 kB", "10.00 kB", "5,000", "5,000"],
        ["filter", "50", "29", "58.0%", "10.00 kB", "6.90 kB", "5,000", "3,450"],
    ]
    assert rows(text, "Rules of filter") == [
        ["gopher.words", "20", "40.0%", "20.0%", "1,000", "18", "web 50.0%"],
        ["c4.brace", "3", "6.0%", "1.0%", "50", "2", "books 10.0%"],
    ]
    assert rows(text, "Sources") == [
        ["books", "10", "9", "90.0%", "5.00 kB", "-", "0.0%", "10.0%"],
        ["web", "40", "20", "50.0%", "1.90 kB", "0.500", "0.0%", "50.0%"],
    ]
    assert rows(text, "Languages") == [["en", "20"], ["zh", "9"]]
    assert rows(text, "Lengths") == [
        ["into read", "91.5", "96.6", "101", "103", "693"],
        ["out of filter", "91.3", "95.3", "98.7", "100", "107"],
    ]
    assert rows(text, "Perplexities") == [["en", "258", "270", "279", "284", "302"]]
    assert "The middle and the tail begin at: en 260.0 and 290.0." in text
    assert rows(text, "Clusters of duplicates") == [["exact", "3", "0", "2"], ["near", "6", "1", "9"]]
    assert rows(text, "Other counts") == [["clean.email", "7"]]
    assert "![rules](rules.png)" in text


def test_problems_have_their_places_and_do_nothing(text):
    below = text.split("## Problems\n\n")[1].split("\n\n")[0]
    assert below.splitlines() == [
        "- **read.invalid_utf8**: 3",
        "  - `a|b'.jsonl`, line 7: byte 0xff \\<img src=x\\>\\\\n\\\\x1b\\[2J",
        "  - `b.jsonl`: x",
        "  - and 1 more",
    ]


def test_what_was_not_counted_is_not_there():
    assert page(summary_of({}, ["read"]), {}, title="T", linked=False) == "# T\n\nNothing was counted.\n\n## Alarms\n\nNone.\n"
    refused = summary_of({"read/in/documents/x": 9, "read/refused/rule/documents/x": 1}, ["read"])
    assert ("removed.md" in page(refused, {}, title="T"), "removed.md" in page(refused, {}, title="T", linked=False)) == (
        True,
        False,
    )
    assert rows(page(refused, {}, title="T"), "Rules of read") == [["rule", "1", "11.1%", "-", "0", "x 11.1%"]]
    bare = page(summary_of({"read/in/documents/x": 0}, ["read"]), {}, title="T")
    assert "tokens in" not in bare and "Perplex" not in bare and "0 documents (0 B) became 0 (-; 0 B, - of the bytes)." in bare


def test_examples_say_where_they_come_from():
    removed = Examples(letters=12)
    removed.offer("near/near", Document("a `tick`\nand more", "web", "web.jsonl", 77), "near <x>:3")
    assert examples_page(removed).split("\n\n")[2:] == [
        "## near/near",
        "- `web.jsonl:77` (near \\<x\\>:3), 17 characters: `a 'tick'\\nand`\n",
    ]
