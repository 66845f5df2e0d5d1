"""Positions of a text that grows token by token are those of the text as a whole."""

import itertools
import random

import pytest
import torch

from megatrain.inference.glm_positions import Marks, places_of
from megatrain.inference.text_places import LEFT_TO_RIGHT, BlankPlaces, Segment, places_after

MARKS = Marks(sop=50, gmask=51, mask=52)


@pytest.mark.parametrize("two_dimensional", [True, False])
@pytest.mark.parametrize("mask", [51, 52])
def test_an_answer_to_a_prompt_has_the_positions_of_the_whole(two_dimensional, mask):
    draw = random.Random(1)
    for length, at in itertools.product((1, 5, 12), (0, 3)):
        text = [draw.randrange(50) for _ in range(length)]
        text.insert(min(at, length), mask)
        prompt, answer = [*text, MARKS.sop], [draw.randrange(50) for _ in range(7)]
        whole = places_of(torch.tensor([[*prompt, *answer]]), MARKS, two_dimensional)
        places = places_after(prompt, MARKS, two_dimensional)
        positions, inside = places.positions(0, len(prompt) + 7)
        assert positions.tolist() == whole.positions[0].tolist()
        assert inside.tolist() == whole.block_positions[0].tolist()
        assert places.prefix == int(whole.sep) == len(text)


def test_pieces_of_a_text_have_the_positions_of_the_whole():
    places = BlankPlaces(6, (Segment(6, 2), Segment(9, 4, counts_on=True)))
    whole = [x.tolist() for x in places.positions(0, 14)]
    assert whole == [[0, 1, 2, 3, 4, 5, 2, 2, 2, 9, 10, 11, 12, 13], [0] * 6 + [1, 2, 3, 1, 2, 3, 4, 5]]
    for start, end in ((0, 7), (7, 8), (8, 14)):
        assert [x.tolist() for x in places.positions(start, end)] == [x[start:end] for x in whole]


def test_a_prompt_without_a_blank_is_read_from_left_to_right():
    assert places_after([1, 2, 3], MARKS, True) is LEFT_TO_RIGHT
    assert [x.tolist() for x in LEFT_TO_RIGHT.positions(3, 5)] == [[3, 4], [0, 0]]
