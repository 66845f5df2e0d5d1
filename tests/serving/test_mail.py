"""What goes from rank 0 to the others, and back to nobody."""

import threading
import time

import torch

from megatrain.inference.requests import Request, Sampling
from megatrain.inference.text_places import BlankPlaces, Segment
from megatrain.serving.mail import Mail, Mailbox, pack, shared, unpack
from megatrain.testing import simulate

FULL = Request(
    (1, 2, 3),
    7,
    Sampling(True, 0.5, 3, 0.9, 0.1, 1.2, 0.3, -0.4, ((5, -100.0), (6, 1.5)), (8, 9)),
    seed=(1 << 63) - 1,
    ends=frozenset({4, 2}),
    stops=("\n\n", "你\ud7ff"),
    text=True,
    top=3,
    score_from=1,
    places=BlankPlaces(2, (Segment(2, 1, True), Segment(3, 0))),
)


def test_requests_are_the_same_on_the_other_side():
    mail = Mail(((0, FULL), (1, Request((5,)))), (3, 4), True)
    assert unpack(pack(mail)) == mail
    assert bool(mail) and not Mail() and bool(Mail(end=True))


def test_every_rank_gets_the_mail_of_the_first():
    sent = [Mail(), Mail(((0, FULL),)), Mail(dropped=(0,)), Mail(), Mail(end=True)]

    def take(ctx):
        return [shared(mail if ctx.world.rank == 0 else Mail(), ctx.world, torch.device("cpu")) for mail in sent]

    assert simulate(3, take) == [sent] * 3
    assert simulate(1, take) == [sent]


def test_a_mailbox_waits_for_mail_and_no_longer():
    box = Mailbox()
    began = time.monotonic()
    assert box.collect(0.05) == Mail() and time.monotonic() - began >= 0.05
    threading.Timer(0.05, box.add, [[(1, FULL)]]).start()
    assert box.collect(10) == Mail(((1, FULL),)) and time.monotonic() - began < 5
    box.drop([1, 2])
    box.close()
    assert box.collect(10) == Mail((), (1, 2), True)
