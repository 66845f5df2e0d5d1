"""Random text on which rules are compared with their references: of few words, so that lines and n-grams repeat, and of hostile letters."""

from __future__ import annotations

import random

from hypothesis import strategies as st

PIECES = (
    *(
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "The",
        "a",
        "bc",
        "ab",
        "c",
        "word",
        "x" * 40,
        "it's",
        "5km.",
        "1,000",
        "#",
        "##",
    ),
    *(
        "...",
        "…",
        "....",
        ".",
        "?",
        "!",
        '"',
        "'",
        "•",
        "- ",
        "-",
        "!!!",
        "(see",
        "[1]",
        "[edit]",
        "[citation needed]",
        "[12",
        "lorem",
        "ipsum",
    ),
    *(
        "javascript",
        "JavaScript",
        "Lorem Ipsum",
        "privacy policy",
        "use cookies",
        "Terms of Use",
        "{",
        "}",
        "read more",
        "更多",
        "展开",
    ),
    *(
        "的",
        "是",
        "在",
        "了",
        "於",
        "為",
        "我们",
        "今天天气很好",
        "。",
        "，",
        "！",
        "？",
        "《红楼梦》",
        "【广告】",
        "12345",
        "１２",
        "〇",
        "𠀀",
        "㐀",
    ),
    *(
        "e\u0301",
        "👩‍👩‍👧",
        "𝒳",
        "\x00",
        "\x1c",
        "\ufeff",
        "\u200b",
        "\u3000",
        "ﷺ",
        "İ",
        "ſ",
        "ß",
        "日本語",
        "かな",
        "한국",
        "привет",
    ),
    *(
        "；",
        "“好”",
        "＃",
        "……",
        "。。。",
        "½",
        "①",
        "Ⅷ",
        "_",
        "●",
        "·",
        r"\u00e9",
        "0x1f,",
        "de ad",
        "QUJD" * 20,
        "# Auto-generated",
    ),
    *("<?xml version=", "【", "】"),
)
BLANKS = (" ", " ", " ", "", "", "\n", "\n", "\n\n", "\r\n", "\t", "\u2028", "\x85", "\n\n\n", "  ")

texts = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(BLANKS)), max_size=80).map(
    lambda parts: "".join(part + blank for part, blank in parts)
)
"""Texts for hypothesis."""


def random_text(seed: int, pieces: int) -> str:
    """A text of some pieces, with lines and sentences that come back."""
    made = random.Random(seed)
    few = made.sample(PIECES, made.randint(3, 30))
    parts = [made.choice(few) + made.choice(BLANKS) for _ in range(made.randint(1, max(pieces // 4, 1)))]
    return "".join(made.choice(parts) for _ in range(pieces))
