"""The store where ranks meet: what one rank asks of it does not grow with the world, and a message about it neither."""

import resource
import socket
import threading
from datetime import timedelta

import pytest
from counted_store import Counted
from torch.distributed import DistStoreError, HashStore

from megatrain.runtime.interface import interfaces
from megatrain.transport import store as meeting_place
from megatrain.transport.board import Board
from megatrain.transport.group import World, name_ranks
from megatrain.transport.wrappers import RecordedWorld, Recorder

LARGEST = 16_384
LIMIT = timedelta(seconds=0.2)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [(1024, resource.RLIM_INFINITY, 66_560), (1024, 4096, 4096), (10**6, 10**6, None), (4096, 4096, None)],
)
def test_the_process_that_serves_the_store_may_have_a_file_open_for_every_connection(monkeypatch, soft, hard, wanted):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(meeting_place, "TCPStore", lambda *_, **__: "served")
    assert meeting_place.open_store(0, LARGEST, ("127.0.0.1", 0), LIMIT, serve=True) == "served"
    assert asked == ([] if wanted is None else [(wanted, hard)])


def test_a_message_lists_few_ranks():
    assert name_ranks((0, 1)) == "[0, 1]"
    assert name_ranks(range(16)) == str(list(range(16)))
    assert name_ranks(range(0, LARGEST, 8)) == "[0, 8, 16, ..., 16376] (2048 ranks)"


def test_a_board_reads_what_is_there_of_many_keys_in_few_messages():
    store = Counted()
    board = Board(store, 4.0)
    keys = [f"state/{rank}" for rank in range(LARGEST)]
    board.write_all(keys, "here")
    assert board.complete(keys) and store.most == 512
    for rank in (7, 8, 9000):
        store.inner.delete_key(f"state/{rank}")
    store.calls.clear()
    found = board.read_all(keys)
    assert not board.complete(keys)
    assert set(keys) - set(found) == {"state/7", "state/8", "state/9000"} and set(found.values()) == {"here"}
    assert sum(store.calls.values()) < 200 and store.most == 512
    assert board.read_all([]) == {} and board.read_all(["state/7"]) == {}


def test_what_a_stranger_writes_on_a_board_is_not_seen():
    store = HashStore()
    board = Board(store, 4.0, b"the ranks' key")
    board.write("state/0", "well")
    sealed = store.get("state/0").decode()
    stranger = Board(store, 4.0, b"another key")
    store.set("state/1", "alarm")  # without a seal
    store.set("state/2", sealed)  # moved from another key
    store.set("state/3", sealed[:-4] + "ill.")
    store.set("state/4", b"\xff\xfe" * 40)
    stranger.write("state/5", "alarm")
    board.write("state/6", "two\nlines \u00e9")
    assert board.read_all([f"state/{rank}" for rank in range(7)]) == {"state/0": "well", "state/6": "two\nlines \u00e9"}
    assert board.wait("state/0") == "well" and board.wait("state/1", 0.01) is None
    board.reseal(b"a key of now")
    assert board.read_all(["state/0"]) == {}


def test_who_waits_for_a_word_goes_on_waiting_where_a_stranger_gives_it(monkeypatch):
    monkeypatch.setattr("megatrain.transport.board._STRANGER_SECONDS", 0.01)
    store = HashStore()
    store.set("wake", "alarm")
    board = Board(store, 4.0, b"key")
    told = threading.Timer(0.1, board.write, ["wake", "bye"])
    told.start()
    assert board.wait("wake") == "bye"
    told.join()


def test_a_wait_that_is_nearly_over_has_a_limit_that_the_store_knows_as_one():
    limits = []

    class Late:
        def wait(self, keys, limit):
            limits.append(limit)
            raise DistStoreError("timeout")

    assert Board(Late(), 4.0).wait("a word", 0.0004) is None
    assert limits and min(limits) >= timedelta(milliseconds=1), "torch waits for ever where the milliseconds are 0"


class Counting(World):
    def __init__(self):
        self.rank, self.size, self.made = 0, 4, []

    def group(self, name, ranks):
        self.made.append(name)
        group = type("Idle", (), {})()
        group.name, group.ranks, group.rank = name, tuple(ranks), 0
        return group


def test_the_group_of_all_ranks_is_made_once():
    world = RecordedWorld(Counting(), Recorder())
    assert world.group("world", range(4)) is world.group("world", range(4))
    assert world.group("tp", (0, 1)) is not world.group("tp", (0, 1))
    assert world.inner.made == ["world", "tp", "tp"]


def bound(host, monkeypatch, meaning=None):
    """The address at which a store for `host` listens; a name means `meaning`."""
    if meaning is not None:
        family = socket.AF_INET
        answer = [(family, socket.SOCK_STREAM, 6, "", (meaning, 0))]
        monkeypatch.setattr(meeting_place.socket, "getaddrinfo", lambda *words, **more: answer)
    with meeting_place._listen(host, 0) as listener:
        return listener.getsockname()[0]


def test_the_store_listens_on_the_interface_of_its_address_alone(monkeypatch):
    own = next(one.address for one in interfaces() if not one.is_loopback and "." in one.address)
    assert bound("127.0.0.1", monkeypatch) == "127.0.0.1"
    assert bound(own, monkeypatch) == own
    assert bound("node1", monkeypatch, own) == own


def test_a_name_that_means_loopback_is_served_on_loopback_alone(monkeypatch):
    assert bound("node1", monkeypatch, "127.0.1.1") == "127.0.1.1"
    assert bound("localhost", monkeypatch) in ("127.0.0.1", "127.0.1.1", "::1")


def test_where_others_reach_it_by_a_translated_address_it_listens_on_all(monkeypatch):
    everywhere = ("::", "0.0.0.0")
    assert bound("198.51.100.7", monkeypatch) in everywhere
