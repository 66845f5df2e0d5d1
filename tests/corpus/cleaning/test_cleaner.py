"""The step that cleans: what each part does, in which order, and that cleaning twice changes nothing."""

import random
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.cleaning.choices import CleanConfig
from megatrain.corpus.cleaning.cleaner import clean_step
from megatrain.corpus.document import Document, Tally


@cache
def step_of(**keys):
    return clean_step(CleanConfig(**keys))


def cleaned(text, kind="text", **keys):
    """(The text, what was counted, rules that refuse it)."""
    document, tally = Document(text, "web", "a.jsonl", 0, kind), Tally()
    refused = step_of(**keys)(document, tally)
    return document.text, {name.removeprefix("clean."): number for name, number in tally.counts.items()}, refused


PIECES = [
    *(
        "<b>",
        "</b>",
        "<",
        "b",
        ">",
        "<p>",
        "&amp;",
        "&lt;",
        "&",
        "amp;",
        "#38;",
        "[[",
        "]]",
        "[1]",
        "[edit]",
        "。",
        "a",
        "word.",
        "File:x",
        "<!--",
        "-->",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "    ",
        "```",
        "```py",
        "`",
        "\u3000",
        "\xa0",
        "\u200b",
        "\u200d",
        "\xad",
        "\r\n",
        "\r",
        "\x85",
        "\x0c",
        "\0",
    ),
    *(
        "é",
        "e\u0301",
        "Ã©",
        "â€™",
        "锟斤拷",
        "鍏充簬鎴戜滑鐨",
        "Read more",
        "home",
        "about",
        "contact",
        "|",
        "首页",
        "上一篇",
        "版权所有",
        "\ufeff",
        "中文",
        "क",
    ),
    *(
        "13800138000",
        "+86",
        "a@b.com",
        "@",
        "93.184.216.34",
        "v",
        "ip ",
        "4111 1111 1111 1111",
        "-",
        ".",
        "1",
        "2001:4860::8888",
        ":",
        "<script>",
    ),
]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.text(max_size=40))


@settings(max_examples=200, deadline=None)
@given(
    TEXTS, st.sampled_from(["text", "code"]), st.sampled_from([{}, {"form": "NFKC", "tails": True, "chinese": "simplified"}])
)
def test_cleaning_twice_changes_nothing(text, kind, keys):
    once, counts, _ = cleaned(text, kind, **keys)
    once.encode()  # no half of a surrogate pair
    assert cleaned(once, kind, **keys)[0] == once or counts["unsettled"] == 1


def test_all_parts_at_once():
    text = (
        "\ufeffHome | News | Contact\r\n\r\n\r\n<p>The cafe\u0301  of\xa0Anna &amp;amp; Bob (anna@cafe.fr),\u200b itâ€™s   open.[1]</p>\r\n"
        "Read more »\r\n\u3000\u3000欢迎光临。电话：13800138000\r\n上一篇：没有了\r\n责任编辑：王\r\n"
    )
    clean, counts, refused = cleaned(text)
    assert clean == "The café of Anna & Bob (<EMAIL>), it’s open.\n\n欢迎光临。电话：<PHONE>"
    assert refused == ()
    assert {name: counts[name] for name in ("boilerplate", "email", "phone", "mojibake", "tags", "entities", "citations", "form")} == {
        "boilerplate": 4, "email": 1, "phone": 1, "mojibake": 1, "tags": 2, "entities": 1, "citations": 1, "form": 1,
    }  # fmt: skip


def test_code_keeps_its_blanks_and_marks():
    text = (
        "\ufeffdef f(x):\r\n\tif x  <b>  0:\r\n\r\n\r\n\r\n        return '&amp; e\u0301\u200b'  \r\n"
        "\x0c\0# a@b.com 13800138000\r\nhome\r\nabout\r\nsearch\r\n"
    )
    clean, counts, _ = cleaned(text, "code")
    assert (
        clean
        == "def f(x):\n\tif x  <b>  0:\n\n\n\n        return '&amp; e\u0301\u200b'  \n\x0c# <EMAIL> <PHONE>\nhome\nabout\nsearch\n"
    )
    assert counts == {"controls": 1, "email": 1, "phone": 1}


def test_what_is_off_changes_nothing():
    text = "Home | News | Contact\r\n\r\n\r\n<b>e\u0301</b>  a@b.com\u200b &amp; Ã©\x00"
    off = {
        "mojibake": False,
        "markup": False,
        "controls": False,
        "form": "none",
        "boilerplate": False,
        "blanks": False,
        "personal": (),
    }
    assert cleaned(text, **off) == (text, {}, ())
    assert cleaned("ﬁ①", **off | {"form": "NFKC"})[0] == "fi1"


def test_a_document_of_which_nothing_is_left_is_refused():
    assert cleaned("Read more\n\u200b")[0::2] == ("", ("clean.empty",))


def test_a_text_that_never_settles_is_counted():
    assert cleaned("<" * 3 + "img>" * 3 + "x") == ("x", {"tags": 3}, ())
    text, counts, _ = cleaned("<" * 9 + "img>" * 9 + "x")
    assert text == "<" * 5 + "img>" * 5 + "x" and counts == {"tags": 5, "unsettled": 1}


@pytest.mark.slow
def test_cleaning_2000_documents_twice_changes_nothing():
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in sorted(library.rglob("*")) if path.suffix in (".py", ".txt", ".rst", ".md", ".html") and path.is_file()
    ]
    texts = [path.read_text("utf-8", "replace") for path in random.Random(1).sample(files, 2000)]
    for text in texts:
        once, counts, _ = cleaned(text)
        assert cleaned(once)[0] == once or counts["unsettled"] == 1
