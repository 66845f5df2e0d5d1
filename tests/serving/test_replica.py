"""Rank 0 leads, the others follow: the same calls in the same order, and mail of nothing while there is nothing to do."""

import threading
import time
from itertools import pairwise
from types import SimpleNamespace

from megatrain.inference.requests import Answer, Request, Scored, StepUpdate
from megatrain.serving import replica
from megatrain.serving.mail import Mail, Mailbox
from megatrain.serving.meters import NOTHING
from megatrain.serving.replica import Replica, follow, lead
from megatrain.testing import simulate


class StandIn:
    """An engine whose answers are the numbers 0, 1, 2 ... up to max_tokens; it writes down how it is called."""

    stats = NOTHING

    def __init__(self):
        self.calls, self._live, self._answers = [], {}, {}
        self.scheduler = SimpleNamespace(running=self._live, waiting=[])

    @property
    def busy(self):
        return bool(self._live)

    def add(self, request):
        self.calls.append(("add", request))
        if request.max_tokens > 5:
            raise ValueError("too many")
        number = len(self.calls)
        self._live[number] = [request.max_tokens, 0]
        return number

    def cancel(self, number):
        self.calls.append(("cancel", number))
        self._live.pop(number, None)

    def answer(self, number):
        return self._answers.pop(number)

    def step(self):
        self.calls.append(("step", sorted(self._live)))
        updates = []
        for number, of in list(self._live.items()):
            token, of[1] = Scored(of[1], -1.0, True), of[1] + 1
            done = of[0] == of[1]
            if done:
                del self._live[number]
                self._answers[number] = Answer((), "", "length", None, (), 0)
            updates.append(StepUpdate(number, (token,), str(token.token), "length" if done else None))
        return updates


def request(count):
    return Request((1,), count)


def test_parts_have_the_keys_of_their_requests():
    engine = StandIn()
    turns = Replica(engine)
    parts, started = turns.turn(Mail(((7, request(2)), (8, request(9)), (9, request(1)))))
    assert [(part.key, part.text, part.error, part.last) for part in parts] == [
        (8, "", "too many", True),
        (7, "0", None, False),
        (9, "0", None, True),
    ]
    assert started == [7, 9]
    parts, started = turns.turn(Mail(dropped=(9, 8, 100)))  # they have ended, or were never there
    assert [(part.key, part.text, part.last) for part in parts] == [(7, "1", True)] and started == []
    assert [call for call in engine.calls if call[0] == "cancel"] == []
    turns.turn(Mail(((10, request(5)),)))
    turns.turn(Mail(dropped=(10,)))
    assert engine.calls[-1][0] == "cancel" and not engine.busy


def test_every_rank_makes_the_same_calls(monkeypatch):
    """Under mail that comes at any time, and while none comes: the leader sends something before anybody's patience ends."""
    monkeypatch.setattr(replica, "HEARTBEAT_SECONDS", 0.02)
    mailbox, delivered, engines = Mailbox(), [], [StandIn() for _ in range(3)]
    sent = []
    shared = replica.shared

    def watched(mail, world, device):
        sent.append((world.rank, time.monotonic()))
        return shared(mail, world, device)

    monkeypatch.setattr(replica, "shared", watched)

    def people():
        for number in range(20):
            mailbox.add([(number, request(1 + number % 7))])
            if number % 3 == 0:
                mailbox.drop([number])
            time.sleep(0.003)
        time.sleep(0.3)
        mailbox.close()

    thread = threading.Thread(target=people)
    thread.start()

    def run(ctx):
        if ctx.world.rank == 0:
            lead(engines[0], ctx, mailbox, delivered.append, lambda: 0.0)
        else:
            follow(engines[ctx.world.rank], ctx)

    simulate(3, run)
    thread.join()
    assert engines[0].calls == engines[1].calls == engines[2].calls and len(engines[0].calls) > 40
    idle = sorted(at for rank, at in sent if rank == 0)
    assert len(idle) > 20 and max(after - before for before, after in pairwise(idle)) < 0.25
    texts = {}
    for step in delivered:
        for part in step.parts:
            texts[part.key] = texts.get(part.key, "") + (part.error or part.text)
    whole = {number: "".join(map(str, range(1 + number % 7))) if number % 7 < 5 else "too many" for number in range(20)}
    assert {key: text for key, text in texts.items() if key % 3} == {key: text for key, text in whole.items() if key % 3}


def test_parts_are_held_back_but_for_first_and_last_ones(monkeypatch):
    monkeypatch.setattr(replica, "HEARTBEAT_SECONDS", 0.01)
    mailbox, delivered = Mailbox(), []
    mailbox.add([(1, request(5)), (2, request(3))])
    threading.Timer(0.2, mailbox.close).start()
    simulate(1, lambda ctx: lead(StandIn(), ctx, mailbox, delivered.append, lambda: 1000.0))
    shown = [[(part.key, part.text) for part in step.parts] for step in delivered if step.parts]
    assert shown == [[(1, "0"), (2, "0")], [(1, "12"), (2, "12")], [(1, "34")]]
