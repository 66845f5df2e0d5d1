"""A stage that becomes slow as a whole is told by its own past; one that has more work by its nature, or where all grow, is not."""

import math

import numpy as np
import pytest
from lifecycle.test_stragglers import told

from megatrain.lifecycle.own_past import OwnPast
from megatrain.lifecycle.stragglers import Comparison

USUAL = [0.030, 0.045]


def test_growth_is_by_the_past_and_by_the_other_stages():
    past = OwnPast([0, 0, 1], 2)
    rows = np.log([[1.0, 2.0, 9.0], [1.0, 2.0, 9.0], [1.0, 2.0, 9.0]])
    assert [past.growth(row) is None for row in rows if past.add(row, False) is None] == [True, True, False]
    grown = past.growth(np.log([4.0, 6.0, 9.0]))
    assert np.exp(grown).tolist() == pytest.approx([3.0, 1 / 3])
    assert np.exp(past.growth(np.log([4.0, 6.0, 18.0]))).tolist() == pytest.approx([1.5, 2 / 3])
    assert np.exp(past.growth(np.log([1.0, 2.0, 4.5]))).tolist() == pytest.approx([1.0, 0.5]), (
        "another that is faster is no harm"
    )
    assert OwnPast([0, 0], 2).growth(rows[0][:2]) is None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_of_one_rank_that_becomes_five_times_slower_is_told_in_three_intervals_and_told_well(victim):
    slow = [5 * seconds if rank == victim else seconds for rank, seconds in enumerate(USUAL)]
    judge = Comparison([0, 1], 1.15, 3)
    assert told(judge, [USUAL] * 4 + [slow] * 100 + [USUAL] * 9) == ([(6, victim)], [(104, victim)])
    judge = Comparison([0, 1], 1.15, 3)
    paces = [judge(row) for row in [USUAL] * 4 + [slow] * 3]
    assert [pace.slowest for pace in paces] == [1] * 4 + [victim] * 3
    assert math.isnan(paces[3].ratio) and [pace.ratio for pace in paces[4:]] == [pytest.approx(5.0)] * 3
    assert paces[-1].slow == ((victim, pytest.approx(5.0)),) and paces[-1].of_stage == {victim}


def test_a_stage_of_two_is_told_with_both_and_one_of_them_alone_by_its_peer():
    usual, judge = [0.03, 0.03, 0.05, 0.05], Comparison([0, 0, 1, 1], 1.15, 3)
    assert told(judge, [usual] * 5 + [[0.03, 0.03, 0.25, 0.26]] * 9)[0] == [(7, 2), (7, 3)]
    judge = Comparison([0, 0, 1, 1], 1.15, 3)
    paces = [judge(row) for row in [usual] * 5 + [[0.03, 0.03, 0.25, 0.05]] * 9]
    assert [(i, pace.slow, pace.of_stage) for i, pace in enumerate(paces) if pace.slow] == [
        (7, ((2, pytest.approx(5.0)),), set())
    ]


def test_where_nobody_stands_out_the_slowest_is_the_one_that_took_longest():
    for stages, row, slowest in ([0, 1], [0.03, 0.30], 1), ([0, 0, 1, 1], [0.03, 0.03, 0.30, 0.31], 3):
        judge = Comparison(stages, 1.15, 3)
        assert [judge(row).slowest for _ in range(5)] == [slowest] * 5
    assert Comparison([0, 0, 1, 1], 1.15, 3)([0.03, 0.06, 0.30, 0.31]).slowest == 1


@pytest.mark.parametrize("factors", [(1.0, 9.0), (9.0, 1.0), (1.0, 3.0, 0.2)])
def test_stages_that_differ_and_grow_and_shrink_together_raise_nothing(factors):
    rows = [np.array(factors) * by for by in (1.0,) * 10 + (5.0,) * 20 + (0.5,) * 20 + (2.0,) * 20]
    assert told(Comparison(range(len(factors)), 1.15, 3), rows) == ([], [])
    rows = [[1.0, 1.0 if n < 10 else 0.2] for n in range(40)]  # one becomes faster: the other has not become slow
    assert told(Comparison([0, 1], 1.15, 3), rows) == ([], [])


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("stages", [[0, 1], [0, 1, 2, 3], [0, 0, 1, 1]])
def test_noise_raises_nothing_and_hides_no_stage(stages, noise):
    rows = np.exp(noise * np.random.default_rng(len(stages)).standard_normal((1500, len(stages)))) * (1 + np.array(stages))
    assert told(Comparison(stages, 1.15, 3), rows)[0] == []
    rows[8:, [n for n, stage in enumerate(stages) if stage == 1]] *= 5
    found = told(Comparison(stages, 1.15, 3), rows[:12])[0]
    assert found == [(10, rank) for rank, stage in enumerate(stages) if stage == 1]


@pytest.mark.parametrize(("stages", "victim"), [([0, 1], 0), ([0, 1], 1), ([0, 1, 2, 3], 2), ([0, 0, 1, 1], 1)])
def test_a_stage_that_is_five_times_slower_from_the_first_step_on_is_told_by_the_others(stages, victim):
    """Of stages that do about the same; it is told well once it is."""
    ranks = [rank for rank, stage in enumerate(stages) if stage == victim]
    usual = [0.030 + 0.002 * stage for stage in stages]
    slow = [5 * seconds if rank in ranks else seconds for rank, seconds in enumerate(usual)]
    judge = Comparison(stages, 1.15, 3, [2.0 + stage / 10 for stage in range(max(stages) + 1)])
    paces = [judge(row) for row in [slow] * 30 + [usual] * 9]
    assert [(i, rank) for i, pace in enumerate(paces) for rank, _ in pace.slow] == [(2, rank) for rank in ranks]
    assert [(i, rank) for i, pace in enumerate(paces) for rank in pace.recovered] == [(30, rank) for rank in ranks]
    assert paces[2].of_work == set(ranks) and paces[2].of_stage == set() and paces[2].slowest in ranks
    assert paces[2].ratio == pytest.approx(5.0, rel=0.2)


@pytest.mark.parametrize(
    ("seconds", "work"),
    [
        ([1.0, 9.0, 1.0], [1.0, 9.0, 1.0]),  # more to do
        ([1.0, 9.0, 1.0], [1.0, 4.0, 1.0]),
        ([1.0, 1.1, 1.0], [1.0, 9.0, 1.0]),  # time that does not follow the work
        ([1.0, 1.1], [9.0, 1.0]),
        ([1.0, 2.7], [1.0, 1.0]),
        ([1.0, 9.0, 1.0], []),
    ],
)
def test_more_work_or_a_time_that_does_not_follow_it_excuses_a_stage(seconds, work):
    judge = Comparison(range(len(seconds)), 1.15, 3, work)
    assert told(judge, [seconds] * 50) == ([], [])


def test_a_stage_that_becomes_slow_is_held_against_its_past_as_long_as_it_is():
    judge = Comparison([0, 1], 1.15, 3, [1.0, 1.0])
    rows = [[1.0, 1.0]] * 9 + [[1.0, 5.0]] * 200 + [[1.0, 2.5]] * 200
    assert told(judge, rows) == ([(11, 1)], [])
