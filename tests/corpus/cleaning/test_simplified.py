"""Traditional letters made simplified ones, in Chinese alone."""

from collections import Counter

import pytest

from megatrain.corpus.cleaning.simplified import simplified

CASES = {
    ("漢語的「簡體字」，臺灣", ""): "汉语的「简体字」，台湾",
    ("約翰・史密斯說：漢語", ""): "约翰・史密斯说：汉语",  # the dot between names is also a kana
    ("日本語の漢字は難しい", ""): None,
    ("漢字學", "ja"): None,
    ("漢字와 한국어", ""): None,
    ("书籍", "zh"): None,
    ("plain é", ""): None,
}


@pytest.mark.parametrize(("text", "language"), CASES)
def test_simplified(text, language):
    counts = Counter()
    expected = CASES[text, language] or text
    assert simplified(text, language, counts) == expected
    assert counts["simplified"] == (expected != text)
    assert simplified(expected, language, Counter()) == expected
