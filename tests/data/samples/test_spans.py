"""Blanks: how long they are, where they lie, and when there is no place for them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.glm_data import BlankConfig
from megatrain.data.draws import Draws
from megatrain.data.samples.spans import blanks_of, documents_of, draw_lengths, length_table, lengths_for, place

BLANK = BlankConfig()
CLS, EOS = 90, 91


class Given(Draws):
    """Draws that were chosen beforehand."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def uniform(self, count):
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        return np.array(taken, dtype=float)

    def permutation(self, count):
        return np.arange(count)


def test_lengths_are_a_poisson_law_without_zero():
    table = length_table(3.0, 1, 39)
    p = np.diff(table, prepend=0)
    assert p[:3] == pytest.approx([0.1572, 0.2358, 0.2358], abs=1e-4)  # 3^n / n! / (e^3 - 1)
    assert float((p * np.arange(1, 40)).sum()) == pytest.approx(3 / (1 - np.exp(-3)), abs=1e-9)
    drawn = draw_lengths(Draws(1), BLANK, 200_000)
    assert drawn.min() == 1 and drawn.mean() == pytest.approx(3.157, abs=0.01)


def test_the_length_law_of_a_whole_sample():
    """512 tokens: the target is 76, and with the last span kept whole 77.5 are masked, in 24.5 spans."""
    samples = [lengths_for(Draws(2, n), BLANK, 512) for n in range(4000)]
    sums = np.array([s.sum() for s in samples])
    assert sums.min() == 76
    assert sums.mean() == pytest.approx(77.50, abs=0.1)
    assert np.mean([s.size for s in samples]) == pytest.approx(24.54, abs=0.15)


@pytest.mark.parametrize(("overflow", "least", "most"), [("clip", 76, 76), ("drop", 60, 76)])
def test_other_treatments_of_the_last_span(overflow, least, most):
    for n in range(300):
        lengths = lengths_for(Draws(3, n), replace(BLANK, overflow=overflow), 512)
        assert least <= lengths.sum() <= most and lengths.min() >= 1


def test_the_order_of_lengths_is_shuffled():
    firsts, lasts = zip(*((s[0], s[-1]) for s in (lengths_for(Draws(4, n), BLANK, 100) for n in range(6000))), strict=True)
    assert np.mean(firsts) == pytest.approx(np.mean(lasts), rel=0.05)  # unshuffled, the last one is longer than the others


def test_short_texts_have_no_blanks():
    assert lengths_for(Draws(5), BLANK, 6).size == 0  # int(0.9) = 0
    assert lengths_for(Draws(5), BLANK, 7).size >= 1


def test_where_sorted_draws_put_spans():
    """D = 12, lengths 2, 1, 3: free = 12 - 6 - 3 + 1 = 4, draws 3, 0, 3 of 0 .. 4."""
    draws = Given(0.7, 0.1, 0.79)
    found = place(draws, BLANK, np.array([[10, 22]]), np.array([2, 1, 3]))
    assert found.starts.tolist() == [10 + 0, 10 + 3 + 3, 10 + 3 + 3 + 2]
    assert found.lengths.tolist() == [2, 1, 3]


def test_spans_may_touch_both_ends_of_a_document():
    low, high = (place(Given(x, x), BLANK, np.array([[0, 9]]), np.array([2, 3])).starts.tolist() for x in (0.0, 0.999))
    assert low == [0, 3] and high == [3, 6]


def test_a_document_that_is_full():
    assert place(Draws(1), BLANK, np.array([[0, 6]]), np.array([2, 3])).starts.tolist() == [0, 3]
    assert place(Draws(1), BLANK, np.array([[0, 5]]), np.array([2, 3])) is None
    assert place(Draws(1), replace(BLANK, min_gap=0), np.array([[0, 5]]), np.array([2, 3])).starts.tolist() == [0, 2]
    assert place(Draws(1), replace(BLANK, min_gap=3), np.array([[0, 7]]), np.array([2, 3])) is None


def test_budgets_of_documents():
    """20 and 40 tokens allow 3 and 6; the longest takes what is left. Lists are taken in order, to the first that does not fit."""
    documents = np.array([[0, 100], [101, 121], [122, 162]])
    found = place(Draws(6), BLANK, documents, np.array([2, 2, 3, 5, 4, 1]))
    inside = [[int(n) for s, n in zip(found.starts, found.lengths, strict=True) if a <= s < b] for a, b in documents]
    assert sorted(inside[1]) == [2] and sorted(inside[2]) == [2, 3] and sorted(inside[0]) == [1, 4, 5]


def test_what_the_longest_document_cannot_take_is_refused():
    documents = np.array([[0, 10], [11, 20]])
    assert place(Draws(6), BLANK, documents, np.array([1, 4, 4])) is not None  # 9 with the gap
    assert place(Draws(6), BLANK, documents, np.array([1, 4, 6])) is None
    assert place(Draws(6), BLANK, np.zeros((0, 2), np.int64), np.array([1])) is None


def test_another_draw_where_asked_for():
    text = np.arange(30)
    document = np.array([[0, 5]])
    tries = [blanks_of(Draws(7, n), BLANK, text, document, single=False) for n in range(200)]
    again = [blanks_of(Draws(7, n), replace(BLANK, on_unplaceable="redraw"), text, document, single=False) for n in range(200)]
    assert sum(t is None for t in tries) > 100 > sum(t is None for t in again)


def test_a_single_blank():
    for n in range(50):
        assert blanks_of(Draws(8, n), BLANK, np.arange(200), np.array([[0, 200]]), single=True).starts.size == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([CLS, 1, 2, 3, EOS], [[1, 4]]),
        ([CLS, 1, 2, 3], [[1, 3]]),  # unclosed: without its last token
        ([1, 2, 3, EOS], [[0, 3]]),
        ([CLS, 1, 2, EOS, CLS, 3, 4, 5, EOS], [[1, 3], [5, 8]]),
        ([CLS, 1, 2, EOS, CLS, 3, 4, 5], [[1, 3], [5, 7]]),
        ([CLS, 1, EOS, CLS], [[1, 2]]),
        ([CLS, EOS, EOS], []),
        ([CLS], []),
        ([CLS, 5], []),
    ],
)
def test_documents_of_a_text(text, expected):
    assert documents_of(np.array(text), CLS, EOS).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    gap=st.integers(0, 3),
    layout=st.sampled_from(["sorted_draws", "uniform"]),
    seed=st.integers(0, 1000),
)
def test_spans_lie_within_documents_and_apart(sizes, lengths, gap, layout, seed):
    ends = np.cumsum(np.array(sizes) + 1) - 1
    documents = np.stack([ends - sizes, ends], 1)
    found = place(Draws(seed), replace(BLANK, min_gap=gap, span_layout=layout), documents, np.array(lengths))
    if found is None:
        return
    assert sorted(found.lengths.tolist()) == sorted(lengths)
    stops = found.starts + found.lengths
    inside = [(documents[:, 0] <= a) & (b <= documents[:, 1]) for a, b in zip(found.starts, stops, strict=True)]
    assert all(i.sum() == 1 for i in inside)
    for n in range(len(stops) - 1):
        assert found.starts[n + 1] >= stops[n] + (gap if (inside[n] == inside[n + 1]).all() else 0)


def test_uniform_layouts_are_uniform():
    """Spans of 1 and 2 in 6 tokens: free = 2, so 3 + 2 + 1 = 6 arrangements of each order."""
    counts = {}
    for n in range(6000):
        found = place(Draws(9, n), replace(BLANK, span_layout="uniform"), np.array([[0, 6]]), np.array([1, 2]))
        counts[tuple(found.starts.tolist())] = counts.get(tuple(found.starts.tolist()), 0) + 1
    assert len(counts) == 6 and max(abs(c - 1000) for c in counts.values()) < 150
