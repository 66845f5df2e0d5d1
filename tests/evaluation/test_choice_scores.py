"""Picks of multiple choice by every rule."""

import math
from dataclasses import replace

import pytest

from megatrain.evaluation.choice_scores import ChoiceSums, choice_accuracy, choice_picks

# Each rule picks another choice: the largest sum; a character's, a byte's, a token's mean; the gain over the choice alone.
FIVE = ChoiceSums(
    sums=[-5.0, -6.0, -7.0, -8.0, -9.0],
    tokens=[1, 2, 2, 8, 2],
    characters=[2, 12, 4, 8, 3],
    utf8_bytes=[2, 12, 24, 8, 9],
    alone=[-5.0, -6.0, -7.0, -8.0, -20.0],
)


def test_each_rule_picks_its_own() -> None:
    assert choice_picks(FIVE) == {"acc": 0, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 3, "acc_pmi": 4}
    assert choice_picks(replace(FIVE, alone=None)) == {"acc": 0, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 3}


def test_ties_go_to_the_first_choice() -> None:
    tied = ChoiceSums([-2.0, -2.0, -2.0], [1, 1, 1], [3, 3, 3], [3, 3, 3], [-1.0, -1.0, -1.0])
    assert set(choice_picks(tied).values()) == {0}


def test_impossible_and_empty_choices() -> None:
    hopeless = ChoiceSums([-math.inf, -4.0], [1, 1], [1, 1], [1, 1], [-math.inf, -1.0])
    assert set(choice_picks(hopeless).values()) == {1}
    nothing = ChoiceSums([-math.inf, -math.inf], [1, 1], [1, 1], [1, 1], [-math.inf, -math.inf])
    assert set(choice_picks(nothing).values()) == {0}
    empty = ChoiceSums([0.0, -4.0], [0, 1], [0, 1], [0, 1])
    assert set(choice_picks(empty).values()) == {0}


def test_accuracy_of_questions() -> None:
    found = choice_accuracy([FIVE, replace(FIVE, alone=None), FIVE], [0, 0, 1])
    assert found == {
        "acc": [True, True, False],
        "acc_norm": [False, False, True],
        "acc_bytes": [False] * 3,
        "acc_tokens": [False] * 3,
    }
    assert choice_accuracy([], []) == {}


@pytest.mark.parametrize(
    "question",
    [
        ChoiceSums([], [], [], []),
        ChoiceSums([-1.0], [1, 2], [1], [1]),
        ChoiceSums([math.nan, -1.0], [1, 1], [1, 1], [1, 1]),
        ChoiceSums([-1.0], [1], [1], [1], [-1.0, -2.0]),
    ],
)
def test_what_is_no_question(question: ChoiceSums) -> None:
    with pytest.raises(ValueError, match="are no choices of one question"):
        choice_picks(question)


@pytest.mark.parametrize("right", [-1, 5])
def test_a_right_choice_that_there_is_not(right: int) -> None:
    with pytest.raises(ValueError, match=f"question 0 has choices 0 to 4; its right one cannot be {right}"):
        choice_accuracy([FIVE], [right])
