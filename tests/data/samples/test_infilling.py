"""Parts A and B as the model reads them, with literal expectations."""

from dataclasses import replace

import numpy as np
import pytest

from megatrain.data.draws import Draws
from megatrain.data.samples.infilling import (
    Rules,
    Sentinels,
    chosen_sentences,
    continue_text,
    fill_blanks,
    sentences_of,
)
from megatrain.data.samples.spans import Spans

IDS = Sentinels(cls=90, eos=91, mask=92, gmask=93, smask=94, sop=95, eop=96, noise=97)
M, G, S, E = 92, 93, 95, 96


class Order(Draws):
    """A permutation, given."""

    def __init__(self, *order):
        super().__init__(0)
        self.order = np.array(order)

    def permutation(self, count):
        return self.order


TEXT = np.array([1, 2, 3, 4, 5, 6])
BLANKS = Spans(np.array([2, 4]), np.array([1, 2]))


def lists(laid):
    return (
        laid.tokens.tolist(),
        laid.targets.tolist(),
        laid.weights.tolist(),
        laid.positions.tolist(),
        laid.block_positions.tolist(),
    )


def test_the_worked_example():
    """arXiv:2103.10360, figure 2: x3 and x5 x6, filled in the order x5 x6, x3."""
    laid = fill_blanks(Order(1, 0), TEXT, BLANKS, M, IDS, Rules())
    tokens, targets, weights, positions, inside = lists(laid)
    assert tokens == [1, 2, M, 4, M, S, 5, 6, S, 3]
    assert targets[5:] == [5, 6, E, 3, E]
    assert weights == [0] * 5 + [1] * 5
    assert positions == [0, 1, 2, 3, 4, 4, 4, 4, 2, 2]
    assert inside == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert laid.sep == 5


def test_in_the_order_of_the_text():
    laid = fill_blanks(Draws(1), TEXT, BLANKS, M, IDS, Rules(shuffle=False))
    assert laid.tokens.tolist() == [1, 2, M, 4, M, S, 3, S, 5, 6]
    assert laid.targets[5:].tolist() == [3, E, 5, 6, E]


def test_positions_of_the_original_text():
    laid = fill_blanks(Order(1, 0), np.array([1, 2, 3, 4, 5, 6, 7]), BLANKS, M, IDS, Rules(original_start=True))
    assert laid.tokens.tolist() == [1, 2, M, 4, M, 7, S, 5, 6, S, 3]
    assert laid.positions.tolist() == [0, 1, 2, 3, 4, 6, 4, 4, 4, 2, 2]


def test_without_block_positions():
    laid = fill_blanks(Order(1, 0), TEXT, BLANKS, M, IDS, Rules(block_positions=False))
    assert laid.block_positions.tolist() == [0] * 5 + [1] * 5


def test_masks_at_both_ends():
    laid = fill_blanks(Order(0, 1), TEXT, Spans(np.array([0, 4]), np.array([3, 2])), M, IDS, Rules())
    assert laid.tokens.tolist() == [M, 4, M, S, 1, 2, 3, S, 5, 6]
    assert laid.positions.tolist() == [0, 1, 2, 0, 0, 0, 0, 2, 2, 2]


def test_noise_is_shown_and_not_predicted():
    text = np.arange(1, 60)
    plain = fill_blanks(Draws(2), text, Spans(np.array([3, 20]), np.array([10, 30])), M, IDS, Rules())
    noisy = fill_blanks(Draws(2), text, Spans(np.array([3, 20]), np.array([10, 30])), M, IDS, replace(Rules(), noise=0.5))
    changed = plain.tokens != noisy.tokens
    assert np.array_equal(plain.targets, noisy.targets)
    assert (noisy.tokens[changed] == IDS.noise).all() and 8 < changed.sum() < 32
    assert not changed[: plain.sep].any() and (plain.tokens[changed] != S).all()


def test_the_suffix_form():
    """n = 6, L = 3: S = text[:3], then [gMASK], and no end of piece."""
    laid = continue_text(np.array([90, 1, 2, 3, 4, 91]), 3, G, IDS, Rules())
    tokens, targets, weights, positions, inside = lists(laid)
    assert tokens == [90, 1, 2, G, S, 3, 4]
    assert targets == [90, 1, 2, G, 3, 4, 91]
    assert weights == [0, 0, 0, 0, 1, 1, 1]
    assert positions == [0, 1, 2, 3, 3, 3, 3]
    assert inside == [0, 0, 0, 0, 1, 2, 3]
    assert laid.sep == 4


def test_a_second_document_begins_without_a_loss():
    laid = continue_text(np.array([90, 1, 91, 90, 4, 91]), 2, G, IDS, Rules())
    assert laid.targets[3:].tolist() == [91, 90, 4, 91]
    assert laid.weights.tolist() == [0, 0, 0, 1, 0, 1, 1]


def test_the_suffix_form_without_block_positions():
    laid = continue_text(np.array([90, 1, 2, 3]), 2, G, IDS, Rules(block_positions=False))
    assert len(laid.block_positions) == len(laid.tokens) and laid.block_positions.tolist() == [0, 0, 0, 1, 1]


def test_the_suffix_form_in_one_dimension():
    laid = continue_text(np.array([90, 1, 2, 3, 4, 91]), 3, G, IDS, Rules(counts_on=True))
    assert laid.positions.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_the_infill_form():
    laid = fill_blanks(Draws(1), np.array([90, 1, 2, 3, 4, 91]), Spans(np.array([2]), np.array([2])), G, IDS, Rules())
    tokens, targets, weights, positions, inside = lists(laid)
    assert tokens == [90, 1, G, 4, 91, S, 2, 3] and targets[5:] == [2, 3, E] and weights == [0] * 5 + [1] * 3
    assert positions == [0, 1, 2, 3, 4, 2, 2, 2] and inside == [0] * 5 + [1, 2, 3]
    one = fill_blanks(
        Draws(1), np.array([90, 1, 2, 3, 4, 91]), Spans(np.array([2]), np.array([2])), G, IDS, Rules(counts_on=True)
    )
    assert one.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


ENDS = np.zeros(100, bool)
ENDS[[10, 11]] = True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([90, 1, 2, 10, 3, 4, 5], [[1, 2, 10], [3, 4, 5]]),  # the tail is a sentence
        ([90, 1, 10, 2, 11, 91], [[1, 10], [2, 11]]),
        ([90, 1, 2, 91, 90, 3, 10, 91], [[1, 2], [90, 3, 10]]),  # the second [CLS] belongs to its sentence
        ([1, 10, 10, 91], [[1, 10], [10]]),
        ([90, 91], []),
        ([90], []),
    ],
)
def test_sentences(text, expected):
    text = np.array(text)
    found = sentences_of(text, ENDS, 90, 91)
    assert [text[a : a + n].tolist() for a, n in zip(found.starts, found.lengths, strict=True)] == expected


def test_sentences_are_taken_until_there_are_enough():
    sentences = Spans(np.array([1, 4, 9, 12]), np.array([3, 5, 3, 4]))
    taken = chosen_sentences(Order(2, 0, 1, 3), sentences, 4)
    assert taken.starts.tolist() == [1, 9] and taken.lengths.tolist() == [3, 3]
    assert chosen_sentences(Order(1, 0, 2, 3), sentences, 4).starts.tolist() == [4]
    assert chosen_sentences(Order(1, 0, 2, 3), sentences, 0).starts.tolist() == [4], "one at least"
    assert chosen_sentences(Draws(0), Spans(np.zeros(0, int), np.zeros(0, int)), 3) is None


def test_neighbouring_sentences_are_two_masks():
    laid = fill_blanks(
        Order(1, 0), np.array([90, 1, 10, 2, 11, 3]), Spans(np.array([1, 3]), np.array([2, 2])), 94, IDS, Rules()
    )
    assert laid.tokens.tolist() == [90, 94, 94, 3, S, 2, 11, S, 1, 10]
    assert laid.positions.tolist() == [0, 1, 2, 3, 2, 2, 2, 1, 1, 1]
