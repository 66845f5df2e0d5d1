"""Copies by 128-bit hash: the same as those that a dictionary finds, for any number of parts and any units."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.duplicates.exact import repeated
from megatrain.corpus.duplicates.parameters import DedupConfig

EXACT = DedupConfig(near=False)
NARROW = st.integers(0, 3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NARROW, NARROW), max_size=30), st.randoms(use_true_random=False))
def test_repeated_is_what_a_dictionary_finds(hashes, draw):
    """Also of hashes that agree in their first half alone."""
    first = {}
    copies = [(number, first[hashed]) for number, hashed in enumerate(hashes) if first.setdefault(hashed, number) != number]
    order = list(range(len(hashes)))
    draw.shuffle(order)
    columns = np.array([hashes[number] for number in order], np.uint64).reshape(-1, 2)
    later, earlier = repeated(columns[:, 0], columns[:, 1], np.array(order, np.int64))
    assert list(zip(later.tolist(), earlier.tolist(), strict=True)) == copies


def test_copies_of_any_units_and_parts_are_those_of_a_dictionary(deduplicated):
    texts = [f"text {number * number % 61}" for number in range(200)]
    first = {}
    copies = {number: first[text] for number, text in enumerate(texts) if first.setdefault(text, number) != number}
    assert len(copies) == 169
    for units in ([texts], [texts[:3], [], texts[3:150], texts[150:]]):
        for parts in (1, 2, 7):
            found = deduplicated(units, DedupConfig(near=False, parts=parts))
            assert found.instead == copies
            assert set(found.reason.values()) == {"duplicates.exact"}
            assert set(found.agreement.values()) == {1.0}


def test_the_text_counts_to_the_letter_unless_its_normal_form_is_asked_for(deduplicated):
    texts = ["Total: 12", "total 34", "Total: 12", "!!", "??", "other"]
    assert deduplicated([texts], EXACT).instead == {2: 0}
    assert deduplicated([texts], DedupConfig(near=False, exact="normal")).instead == {1: 0, 2: 0}  # marks alone are no form
    assert deduplicated([texts], DedupConfig(near=False, exact="none")).instead == {}


def test_code_is_compared_to_the_letter(deduplicated):
    texts = ["#!a = 1", "#!a = 2", "a 3", "#!a = 2", "A: 4"]
    assert deduplicated([texts], DedupConfig(near=False, exact="normal")).instead == {3: 1, 4: 2}
