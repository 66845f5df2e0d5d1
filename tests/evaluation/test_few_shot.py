import pytest

from megatrain.evaluation.few_shot import shots_for
from megatrain.evaluation.items import Item, TaskError
from megatrain.evaluation.questions import Question

POOL = tuple(Question(Item("f.jsonl", n, {"n": n}), f"text {n}", targets=(str(n),)) for n in range(20))


def test_shots_are_a_function_of_seed_and_item():
    of = {one.text: [shot.text for shot in shots_for(one, POOL, 3, 1234)] for one in POOL}
    assert of["text 0"] == ["text 15", "text 6", "text 4"]
    assert {one.text: [shot.text for shot in shots_for(one, POOL[::-1], 3, 1234)] for one in reversed(POOL)} == of
    assert [shot.text for shot in shots_for(POOL[0], POOL, 2, 1234)] == of["text 0"][:2]
    assert [shot.text for shot in shots_for(POOL[0], POOL, 3, 1)] != of["text 0"]
    assert len({tuple(shots) for shots in of.values()}) == 20
    assert shots_for(POOL[0], POOL, 0, 1) == ()


def test_the_item_is_never_among_them_nor_one_that_asks_the_same():
    for seed in range(50):
        assert POOL[3] not in shots_for(POOL[3], POOL, 5, seed)
    twin = Question(Item("g.jsonl", 1, {"m": 3}), "text 3", targets=("4",))
    again = Question(Item("g.jsonl", 9, {"n": 3}), "other", targets=("3",))
    assert {shot.text for shot in shots_for(POOL[3], (*POOL, twin, again), 19, 1)} == {one.text for one in POOL} - {"text 3"}


def test_the_first_ones_and_too_few():
    assert [shot.text for shot in shots_for(POOL[1], POOL, 3, 5, first=True)] == ["text 0", "text 2", "text 3"]
    with pytest.raises(
        TaskError, match=r"f\.jsonl:1: 20 examples are asked for, and there are 19 other items .* Use --num-fewshot 19"
    ):
        shots_for(POOL[1], POOL, 20, 5)
