"""The room of the workers: many share it, one can have it alone, and those who come later let it go first."""

import threading

import pytest
from room import Room


@pytest.fixture
def workers(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rooms = [Room("run") for _ in range(3)]
    assert len(list(tmp_path.iterdir())) == 2
    yield rooms
    for room in rooms:
        room.leave()
    assert list(tmp_path.iterdir()) == []


def test_who_wants_to_be_alone_waits_for_those_inside_and_comes_before_later_ones(workers):
    first, second, third = workers
    happened, threads = [], []

    def enter(room, name, alone):
        with room.taken(alone):
            happened.append(f"{name} in")
            inside.set()
            leave.wait()
            happened.append(f"{name} out")

    def start(*args):
        threads.append(threading.Thread(target=enter, args=args))
        threads[-1].start()

    inside, leave = threading.Event(), threading.Event()
    with first.taken(alone=False), second.taken(alone=False):
        pass  # both at once
    with first.taken(alone=False):
        start(second, "alone", True)
        while not door_is_kept(third):
            pass
        start(third, "later", False)
        assert not inside.wait(0.1) and happened == []
    assert inside.wait(10) and happened == ["alone in"]
    leave.set()
    for thread in threads:
        thread.join(10)
    assert happened == ["alone in", "alone out", "later in", "later out"]


def door_is_kept(room):
    import fcntl

    try:
        fcntl.flock(room._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(room._files[0], fcntl.LOCK_UN)
    return False
