"""Duties between steps: which are done, in what order, and what each may change of the others."""

import pytest

from megatrain.duties import Duty, Pause, always, do, due, goes_on


def done(step, *, last=False, stop=False, stop_seen_late=False, back=False, bad=()):
    """What is done in a pause of a run with duties of each sort; whether reports were waited for; the pause."""
    found, waited = [], []

    def act(name, **changes):
        def acts(pause):
            found.append(name)
            for field, value in changes.items():
                setattr(pause, field, value)

        return acts

    def catch_up():
        waited.append(True)
        return stop or stop_seen_late

    duties = [
        Duty(act("remember"), when=always, waits=False),
        Duty(act("recover", **({"gone_back": True} if back else {"failed": True})), when=lambda pause: bool(bad)),
        Duty(act("audit"), every=3),
        Duty(act("save"), every=4, when=lambda pause: pause.final),
        Duty(act("copy"), when=goes_on, waits=False),
    ]
    pause = Pause(step, last=last, stop=stop)
    do(duties, pause, catch_up)
    return found, bool(waited), pause.ends


@pytest.mark.parametrize(
    ("pause", "expected"),
    [
        ({"step": 1}, (["remember", "copy"], False, False)),
        ({"step": 3}, (["remember", "audit", "copy"], True, False)),
        ({"step": 12}, (["remember", "audit", "save", "copy"], True, False)),
        ({"step": 1, "last": True}, (["remember", "save"], True, False)),
        ({"step": 1, "stop": True}, (["remember", "save"], True, True)),
        ({"step": 1, "stop": True, "last": True}, (["remember", "save"], True, False)),
        ({"step": 3, "stop_seen_late": True}, (["remember", "audit", "save"], True, True)),
        ({"step": 1, "stop_seen_late": True}, (["remember", "copy"], False, False)),
        ({"step": 12, "bad": [1], "back": True}, (["remember", "recover"], True, False)),
        ({"step": 12, "bad": [1], "back": True, "stop": True}, (["remember", "recover"], True, False)),
        ({"step": 12, "bad": [1], "last": True}, (["remember", "recover"], True, True)),
    ],
)
def test_duties_are_done_in_order(pause, expected):
    assert done(**pause) == expected


@pytest.mark.parametrize(("step", "every", "expected"), [(4, 0, False), (4, 2, True), (3, 2, False), (5, 5, True)])
def test_every_so_many_steps(step, every, expected):
    assert due(step, every) is expected
