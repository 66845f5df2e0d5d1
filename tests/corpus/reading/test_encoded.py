"""Halves of surrogate pairs are found wherever a value of JSON has them, and nothing else is changed."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.reading.encoded import has_halves, without_halves

TEXT = st.text(st.characters() | st.sampled_from("\ud800\udfff\U0001f600"), max_size=4)
VALUE = st.recursive(
    TEXT | st.integers() | st.none(), lambda of: st.lists(of, max_size=3) | st.dictionaries(TEXT, of, max_size=3)
)


@settings(max_examples=60)
@given(VALUE)
def test_halves_of_pairs(value):
    text = json.dumps(value, ensure_ascii=False)
    whole = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
    assert has_halves(value) == (whole != text)
    assert without_halves(value) == json.loads(whole)
