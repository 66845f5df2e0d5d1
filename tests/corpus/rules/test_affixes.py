"""Words cut as spaCy's English tokenizer cuts them; the expected ones are its own (3.8)."""

import pytest
from hypothesis import given, settings
from rule_texts import texts

from megatrain.corpus.rules.affixes import spacy_words
from megatrain.corpus.words import Text


def cut(text: str) -> list[str]:
    words = spacy_words(Text.of(text))
    return [text[begin:end] for begin, end in zip(words.starts, words.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(it's 5km.)", "( it 's 5 km . )"),
        ("A well-known end.Next, i.e. Mr. Smith's.", "A well - known end . Next , i.e. Mr. Smith 's ."),
        (
            "See https://x.org/a-b?c=d, www.python.org: or me@x.org!",
            "See https://x.org/a-b?c=d , www.python.org : or me@x.org !",
        ),
        ("don't we'll I'm they've can't 'quoted' “so”", "do n't we 'll I 'm they 've ca n't ' quoted ' “ so ”"),
        ("U.S. and 3.5% of $5.00+tax, 10-20 a/b c=d", "U.S. and 3.5 % of $ 5.00+tax , 10 - 20 a / b c = d"),
        ("foo(x): def f():", "foo(x ): def f ( ):"),
        ("wait... what…ever ..end -- a--b —c", "wait ... what … ever .. end -- a -- b — c"),
        ("os.path torch.Tensor 192.0.2.1:80/x 1.2.3", "os.path torch . Tensor 192.0.2.1:80/x 1.2.3"),
        ("你好，世界 ☃x C++ +5 +x #tag @me", "你好，世界 ☃ x C++ +5 + x # tag @me"),
        ("a,b 1,000 A.B.C. x...y v1.2", "a , b 1,000 A.B.C. x ... y v1.2"),
        (" \n\t", ""),
    ],
)
def test_words_are_those_of_spacy(text: str, words: str) -> None:
    assert cut(text) == words.split()


@settings(max_examples=60, deadline=None)
@given(texts)
def test_the_words_of_a_text_are_the_text_without_its_blanks(text: str) -> None:
    assert "".join(cut(text)) == "".join(text.split())


def test_long_runs_take_linear_time() -> None:
    for letter in "a.-('…@:/1":
        assert "".join(cut(letter * 300_000)) == letter * 300_000
