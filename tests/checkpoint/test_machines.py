"""Which machine keeps a copy of which: never its own, each one's once, and far away."""

from collections import Counter

import pytest

from megatrain.checkpoint.machines import Machines
from megatrain.checkpoint.newest_copy import Delivery, Listing, Whole, deliveries, newest_whole
from megatrain.testing import simulate

TWO = Machines(((0, 1), (2, 3)))


def of(machines, ranks=1):
    return Machines(tuple(tuple(range(ranks * m, ranks * m + ranks)) for m in range(machines)))


@pytest.mark.parametrize(
    ("machines", "keepers"),
    [
        (1, [None]),
        (2, [1, 0]),
        (3, [1, 2, 0]),
        (4, [2, 3, 0, 1]),
        (5, [2, 3, 0, 4, 1]),
        (6, [3, 4, 5, 0, 1, 2]),
        (7, [3, 4, 5, 0, 1, 6, 2]),
    ],
)
def test_pairs_half_the_machines_apart_and_a_ring_of_three_where_one_is_left(machines, keepers):
    assert [of(machines).keeper(machine) for machine in range(machines)] == keepers


@pytest.mark.parametrize("machines", range(2, 40))
def test_each_machine_keeps_one_other_and_every_rank_has_a_receiver(machines):
    run = of(machines, ranks=3)
    assert Counter(run.keeper(machine) for machine in range(machines)) == dict.fromkeys(range(machines), 1)
    for rank in range(3 * machines):
        receiver = run.receiver(rank)
        assert run.machine(receiver) == run.keeper(run.machine(rank)) != run.machine(rank)
        assert rank in run.givers(receiver)


def test_two_losses_at_once_hit_half_as_many_pairs_as_in_a_ring():
    both = {frozenset((machine, of(8).keeper(machine))) for machine in range(8)}
    assert both == {frozenset(pair) for pair in ((0, 4), (1, 5), (2, 6), (3, 7))}


def test_machines_with_other_numbers_of_ranks_take_turns():
    run = Machines.of(["a", "b", "b", "b"])
    assert run.ranks == ((0,), (1, 2, 3))
    assert [run.receiver(rank) for rank in range(4)] == [1, 0, 0, 0]
    assert [run.givers(rank) for rank in range(4)] == [(1, 2, 3), (0,), (), ()]
    assert [run.share(rank) for rank in range(4)] == [(0, 1), (0, 3), (1, 3), (2, 3)]
    assert [run.leads(rank) for rank in range(4)] == [True, True, False, False]


def test_the_ranks_tell_each_other_their_machines():
    assert simulate(4, lambda ctx: Machines.meet(7 - ctx.world.rank % 2, ctx).ranks) == [((0, 2), (1, 3))] * 4


def listing(sum_, *here, files=4):
    return Listing(sum_, files, frozenset(here))


def test_the_newest_copy_of_which_some_machine_has_each_file():
    old, new = {"step_00000005": listing("a", 0, 1, 2, 3)}, {"step_00000010": listing("b", 2, 3)}
    assert newest_whole([old, new, {}]) == (Whole("step_00000005", "a"), "")
    assert newest_whole([new, {"step_00000010": listing("b", 0, 1)}, old]) == (Whole("step_00000010", "b"), "")
    assert newest_whole([{}, {}]) == (None, "")


def test_files_of_two_saves_of_a_step_make_no_copy():
    halves = [{"step_00000010": listing("b", 2, 3)}, {"step_00000010": listing("c", 0, 1)}]
    assert newest_whole(halves) == (
        None,
        "the copy of step 10 in memory is not used: 2 of its 4 files are on no machine any more",
    )


def test_files_go_from_those_that_have_them_to_those_that_need_them_in_turns():
    held, needed = [frozenset({0, 1, 2, 3}), frozenset()], [frozenset({0, 1}), frozenset({1, 2, 3})]
    assert deliveries(needed, held, TWO) == [Delivery(1, 0, 2), Delivery(2, 1, 3), Delivery(3, 0, 2)]
    assert deliveries([frozenset({0}), frozenset()], held, TWO) == []


def test_of_two_machines_that_have_a_file_each_gives_half():
    run, both = Machines(((0,), (1,), (2,))), frozenset(range(4))
    plan = deliveries([frozenset(), frozenset(), both], [both, both, frozenset()], run)
    assert [one.giver for one in plan] == [0, 1, 0, 1] and {one.taker for one in plan} == {2}


def test_a_file_that_no_machine_has_is_told_by_its_number():
    with pytest.raises(KeyError) as caught:
        deliveries([frozenset({3}), frozenset()], [frozenset({0}), frozenset({1})], TWO)
    assert caught.value.args == (3,)
