"""Plans of texts, carried out side by side by an engine that is pretended: it says the letters of a script, one a step."""

from dataclasses import replace

import pytest

from megatrain.data.tokenizer import ByteTokenizer
from megatrain.inference.beams import Beams
from megatrain.inference.requests import Answer, Request, Scored, StepUpdate
from megatrain.inference.text_plans import Asked, PlannedText, PlanSettings, write, written

CODEC = ByteTokenizer()
POSITIONS = 8


class ScriptedEngine:
    """After a prompt that ends in a letter comes the next one of the alphabet; of a new prompt at most `positions` tokens are known."""

    max_length, vocab_size = POSITIONS, 257

    def __init__(self):
        self.requests, self._live, self._answers, self.cancelled = [], {}, {}, []

    def add(self, request):
        if len(request.tokens) > POSITIONS:
            raise ValueError(f"{len(request.tokens)} tokens are too many")
        self.requests.append(request)
        self._live[len(self.requests) - 1] = (request, [])
        return len(self.requests) - 1

    def step(self):
        updates = []
        for number, (request, said) in list(self._live.items()):
            text = [*request.tokens, *(scored.token for scored in said)]
            token = (text[-1] - 97 + 1) % 26 + 97
            top = tuple((97 + (token - 97 + n) % 26, -1.0 - n) for n in range(request.top or 0))
            if token in request.ends:
                updates.append(self._end(number, request, said, (), "stop"))
                continue
            said.append(Scored(token, -1.0, greedy=True, top=top))
            full = len(said) == request.max_tokens or len(text) + 1 > POSITIONS
            updates.append(
                self._end(number, request, said, said[-1:], "length")
                if full
                else StepUpdate(number, tuple(said[-1:]), "", None)
            )
        return updates

    def _end(self, number, request, said, last, finish):
        del self._live[number]
        self._answers[number] = Answer(tuple(said), "", finish, None, (), 0)
        return StepUpdate(number, tuple(last), "", finish)

    def answer(self, number):
        return self._answers.pop(number)

    def cancel(self, number):
        self._live.pop(number, None)
        self._answers.pop(number, None)
        self.cancelled.append(number)


def manner(**more):
    return PlanSettings(**{"codec": CODEC, "positions": POSITIONS, "vocab_size": 257, **more})


def texts(engine, *plans):
    found, order = {}, []
    write(engine, plans, lambda number, writing: (found.__setitem__(number, writing), order.append(number)))
    return [found[number] for number in sorted(found)], order


def asked(text, max_tokens=4, **more):
    return Request(tuple(text.encode()), max_tokens, **more)


def test_texts_are_written_side_by_side_and_end_when_they_end():
    engine, shown = ScriptedEngine(), []
    plans = [
        written(asked("a"), manner(), (), shown.append),
        written(asked("m", 2), manner(), ()),
        written(asked("x", ends=frozenset([97])), manner(), ()),
    ]
    found, order = texts(engine, *plans)
    assert [(writing.text, writing.finish, len(writing.tokens)) for writing in found] == [
        ("bcde", "length", 4),
        ("no", "length", 2),
        ("yz", "stop", 2),
    ]
    assert (order, shown) == ([1, 2, 0], ["b", "c", "d", "e"])
    assert not any((engine._live, engine._answers, engine.cancelled))


def test_a_text_goes_on_where_the_positions_are_used_up():
    engine = ScriptedEngine()
    (writing,), _ = texts(engine, written(asked("abcdef", 12), manner(), ()))
    assert (writing.text, writing.finish) == ("ghijklmnopqr", "length")
    assert [bytes(request.tokens) for request in engine.requests] == [b"abcdef", b"fghi", b"klmn"]
    assert [request.first_draw for request in engine.requests] == [0, 3, 8]
    (short,), _ = texts(ScriptedEngine(), written(asked("abcdef", 12), manner(goes_on=False), ()))
    assert (short.text, short.finish) == ("ghi", "length")
    (cut,), _ = texts(ScriptedEngine(), written(asked("abcdefghijklm", 2), manner(), ()))
    assert cut.text == "no"


def test_a_stop_string_ends_a_text_even_across_its_parts():
    engine, shown = ScriptedEngine(), []
    (writing,), _ = texts(engine, written(asked("abcdef", 12), manner(stops=("ij",)), (), shown.append))
    assert (writing.text, writing.finish, shown) == ("gh", "stop", ["g", "h"])
    assert engine.cancelled == [1]
    (held,), _ = texts(ScriptedEngine(), written(asked("a", 3), manner(stops=("dex",)), ()))
    assert (held.text, held.finish) == ("bcd", "length")
    (late,), _ = texts(ScriptedEngine(), written(asked("a", 3), manner(stops=("bcde", "c")), ()))
    assert (late.text, late.finish) == ("b", "stop")


def test_a_text_ends_where_it_is_said_to_be_enough():
    presses = iter([False, False, True])
    engine = ScriptedEngine()
    (writing,), _ = texts(engine, written(asked("a", 6), manner(enough=lambda: next(presses)), ()))
    assert (writing.text, engine.cancelled) == ("bcd", [0])


def test_a_beam_search_beside_another_text():
    engine = ScriptedEngine()
    beams = written(asked("a", 3, ends=frozenset([122])), manner(beams=Beams(2), stops=("d",)), ())
    found, _ = texts(engine, beams, written(asked("a", 3), manner(), ()))
    assert found[0] == PlannedText("bc", found[0].tokens, "stop", log_probability=-3.0)
    assert found[1].text == "bcd"
    with pytest.raises(
        ValueError, match=r"beam search of 30 tokens after a prompt of 1 needs a model\.max_positions of their sum"
    ):
        texts(engine, written(asked("a", 30), manner(beams=Beams(2)), ()))


def test_what_an_engine_refuses_is_raised():
    with pytest.raises(ValueError, match="13 tokens are too many"):
        texts(ScriptedEngine(), written(asked("abcdefghijklm", 2), manner(goes_on=False), ()))


def test_a_plan_takes_its_answers_in_the_order_of_its_requests():
    def plan():
        answers = yield [Asked(asked("a", 3)), Asked(asked("m", 1))]
        more = yield [Asked(replace(asked("x", 1), tokens=(scored.token,))) for scored in answers[1].tokens]
        return [bytes(scored.token for scored in answer.tokens) for answer in (*answers, *more)]

    found, _ = texts(ScriptedEngine(), plan())
    assert found == [[b"bcd", b"n", b"o"]]
