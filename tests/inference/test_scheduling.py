"""The plan of a step, block by block: budgets, admission, pre-emption, prefixes; and that blocks are never lost."""

import random

import pytest

from megatrain.inference.blocks import Blocks
from megatrain.inference.requests import Request
from megatrain.inference.scheduling import Scheduler
from megatrain.inference.sequences import Sequence
from megatrain.inference.text_places import BlankPlaces, Segment


def sequence(number, length, max_tokens=4, **more):
    return Sequence(number, Request(tuple(100 * number + n for n in range(length)), max_tokens, **more), 0, None)


def scheduler(blocks=8, step_tokens=16, most_running=4, prefix_cache=True):
    return Scheduler(Blocks(blocks), 4, step_tokens, most_running, prefix_cache)


def pieces(planned):
    return [(piece.sequence.number, piece.start, piece.end, piece.draws) for piece in planned]


def draw(planned):
    for piece in planned:
        if piece.draws:
            piece.sequence.tokens.append(7)


def test_prompts_are_cut_to_the_budget_and_answers_come_first():
    of = scheduler()
    of.waiting.extend([sequence(0, 3), sequence(1, 20), sequence(2, 2)])
    first = of.plan()
    assert pieces(first) == [(0, 0, 3, True), (1, 0, 13, False)]
    draw(first)
    second = of.plan()
    assert pieces(second) == [(0, 3, 4, True), (1, 13, 20, True), (2, 0, 2, True)]


def test_no_more_run_than_may():
    of = scheduler(most_running=2)
    of.waiting.extend(sequence(n, 1) for n in range(3))
    assert [piece.sequence.number for piece in of.plan()] == [0, 1] and len(of.waiting) == 1


def test_the_last_that_came_gives_way_and_goes_on_first():
    of = scheduler(blocks=2, prefix_cache=False)
    of.waiting.extend([sequence(0, 4), sequence(1, 3), sequence(2, 1)])
    draw(of.plan())
    assert of.blocks.available == 0
    planned = of.plan()  # the first needs a second block
    assert pieces(planned) == [(0, 4, 5, True)] and of.preemptions == 1
    assert [s.number for s in of.waiting] == [1, 2]
    of.remove([planned[0].sequence])
    assert pieces(of.plan()) == [(1, 0, 4, True), (2, 0, 1, True)]  # three tokens of the prompt and one of the answer


def test_a_prefix_that_is_being_read_is_shared():
    of = scheduler()
    prompt = tuple(range(10))
    of.waiting.extend(Sequence(n, Request(prompt, 4), 0, None) for n in range(2))
    assert pieces(of.plan()) == [(0, 0, 10, True), (1, 8, 10, True)]
    assert of.blocks.used == 4 and (of.prefix_queries, of.prefix_hits) == (20, 8)


def test_the_token_before_the_first_that_is_scored_is_read():
    of = scheduler()
    for score_from, start in ((1, 0), (8, 4), (9, 8), (10, 8)):
        prompt = tuple(range(10))
        of.waiting.append(Sequence(0, Request(prompt, 0, score_from=score_from), 0, None))
        (piece,) = of.plan()
        assert (piece.start, piece.end) == (start, 9)
        assert list(piece.scores) == list(range(score_from, 10))
        of.remove([piece.sequence])


def test_part_a_is_read_at_once_and_shared_only_whole():
    of, places = scheduler(step_tokens=4), BlankPlaces(9, (Segment(9, 3),))
    prompt = tuple(range(10))
    of.waiting.append(Sequence(0, Request(prompt, 4, places=places), 0, None))
    assert pieces(of.plan()) == [(0, 0, 9, False)]
    assert pieces(of.plan()) == [(0, 9, 10, True)]
    for other, start in ((prompt, 8), ((*prompt[:8], 50, 9), 0)):
        of.waiting.append(Sequence(1, Request(other, 4, places=places), 0, None))
        found = [piece.start for piece in of.plan() if piece.sequence.number == 1]
        assert found == [start] or (found == [] and start == 0)
        of.remove([s for s in (*of.running.values(), *of.waiting) if s.number == 1])


def test_blocks_are_never_lost():
    draw_from = random.Random(3)
    of, live, number = scheduler(blocks=12, step_tokens=9, most_running=5), [], 0
    for _ in range(2000):
        if draw_from.random() < 0.3 and len(live) < 9:
            made = sequence(number % 5, draw_from.randrange(1, 30), draw_from.randrange(1, 9))
            made.number = number
            of.waiting.append(made)
            live.append(made)
            number += 1
        if live and draw_from.random() < 0.2:
            gone = live.pop(draw_from.randrange(len(live)))
            of.remove([gone])
        planned = of.plan()
        assert sum(piece.end - piece.start for piece in planned) <= 9
        draw(planned)
        for piece in planned:
            done = piece.sequence
            if len(done.tokens) - len(done.request.tokens) == done.request.max_tokens:
                live.remove(done)
                of.remove([done])
        held = {block for s in of.running.values() for block in s.blocks}
        assert len(held) == of.blocks.used
        assert planned or not live
    of.remove(live)
    assert of.blocks.used == 0 and of.preemptions > 30


def test_a_block_more_than_there_are_is_an_error():
    blocks = Blocks(1)
    blocks.take()
    with pytest.raises(IndexError, match="all of 1 blocks are held"):
        blocks.take()
