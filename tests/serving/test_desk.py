"""Between HTTP and the engine: how much is taken in, and who gets what."""

import asyncio

import pytest

from megatrain.inference.requests import Answer, Request, Scored
from megatrain.serving.desk import Desk
from megatrain.serving.mail import Mail, Mailbox
from megatrain.serving.meters import NOTHING
from megatrain.serving.refusal import Refusal
from megatrain.serving.replica import AnswerPart, StepParts

ONE = Request((1, 2))


def a_desk(running=2, waiting=3):
    desk = Desk(Mailbox(), running, waiting)
    desk.open_for(100)
    return desk


def step(*parts, started=()):
    return StepParts(parts, started, NOTHING, 5.0)


def last(key, text=""):
    return AnswerPart(key, (Scored(7, -1.0, True),), text, Answer((), text, "stop", None, (), 0))


def test_nothing_is_taken_in_before_the_model_is_there_and_after_the_end():
    desk = Desk(Mailbox(), 1, 1)
    for state, said in (("loading", "the model is being loaded"), ("stopping", "over"), ("dead", "it died")):
        if state != "loading":
            desk.change(state, said)
        with pytest.raises(Refusal, match=said) as caught:
            desk.submit([ONE])
        assert (caught.value.status, caught.value.code) == (503, state) and caught.value.headers()["retry-after"] == "5"
    desk.change("ready")
    assert desk.state == "dead"  # it stays so


def test_what_does_not_fit_is_a_429_that_says_when():
    desk = a_desk()
    desk.submit([ONE] * 4)
    with pytest.raises(Refusal, match=r"4 texts are being written, and 2 may be at a time, with 3 more in the queue") as caught:
        desk.submit([ONE] * 2)
    assert caught.value.status == 429 and caught.value.headers() == {"retry-after": "1"}
    assert caught.value.body()["error"]["type"] == "rate_limit_error"
    desk.submit([ONE])
    assert desk.open == 5


def test_parts_reach_those_who_wait_and_are_joined_for_the_slow():
    async def drive():
        desk = a_desk()
        first, second = desk.submit([ONE, ONE]), desk.submit([ONE])
        assert desk.mailbox.collect(0) == Mail(((0, ONE), (1, ONE), (2, ONE)))
        desk.deliver(step(AnswerPart(0, (Scored(1, -1.0, True),), "a"), AnswerPart(2, (), "x"), started=(0, 2)))
        desk.deliver(step(AnswerPart(0, (Scored(2, -1.0, True),), "b"), last(1, "z")))
        parts = dict(await first.take())
        assert (parts[0].text, [each.token for each in parts[0].tokens], parts[1].text) == ("ab", [1, 2], "z")
        assert await second.take() == [(0, AnswerPart(2, (), "x"))]
        desk.deliver(step(last(0), last(2)))
        assert desk.open == 0 and desk.emptied.is_set()
        assert [place for place, _ in await first.take()] == [0]

    asyncio.run(drive())


def test_whoever_leaves_is_forgotten():
    async def drive():
        desk = a_desk()
        inbox = desk.submit([ONE, ONE])
        desk.deliver(step(last(0)))
        desk.leave(inbox)
        desk.leave(inbox)
        desk.deliver(step(AnswerPart(1, (), "late")))  # was under way
        assert desk.open == 0 and desk.mailbox.collect(0).dropped == (1,)
        assert dict(desk.meters.finished) == {"stop": 1, "abort": 1}

    asyncio.run(drive())


def test_all_fail_at_the_end():
    async def drive():
        desk = a_desk()
        inboxes = [desk.submit([ONE, ONE]), desk.submit([ONE])]
        desk.end_all(Refusal("over", status=503))
        for inbox in inboxes:
            with pytest.raises(Refusal, match="over"):
                await inbox.take()
        assert desk.open == 0 and desk.mailbox.collect(0).dropped == (0, 1, 2)

    asyncio.run(drive())


def test_parts_are_further_apart_the_more_streams_there_are():
    desk = a_desk(100, 0)
    assert desk.pause() == 0
    desk.submit([ONE] * 50)
    assert desk.pause() == pytest.approx(0.06)
