"""The store where ranks meet: what one rank asks of it does not grow with the world, and a message about it neither."""

import resource
import socket
import threading
from collections import Counter
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from megatrain.runtime.interface import interfaces
from megatrain.transport import store as meeting_place
from megatrain.transport.board import Board
from megatrain.transport.group import TransportError, World, name_ranks
from megatrain.transport.processes import Rendezvous, TorchWorld
from megatrain.transport.store import claim_rank, meet_all, require_own, serve_at
from megatrain.transport.wrappers import RecordedWorld, Recorder

LARGEST = 16_384
LIMIT = timedelta(seconds=0.2)


class Counted:
    """A store in memory that counts messages, and the most keys of one."""

    def __init__(self, **texts):
        self.inner, self.calls, self.most = HashStore(), Counter(), 0
        for key, text in texts.items():
            self.inner.set(key.replace("_", " "), text)

    def __getattr__(self, what):
        def ask(first, *args):
            self.calls[what] += 1
            self.most = max(self.most, len(first) if isinstance(first, list) else 1)
            return getattr(self.inner, what)(first, *args)

        return ask


@pytest.mark.parametrize("size", [64, LARGEST])
def test_to_join_and_to_leave_takes_as_many_messages_in_any_world(size):
    store = Counted(all_here="", all_leave="")
    claim_rank(store, 5, size)
    meet_all(store, 5, size, LIMIT)
    assert store.calls == {"add": 2, "wait": 1, "get": 1}
    TorchWorld(5, size, torch.device("cpu"), 1.0, store)._linger()
    assert store.calls == {"add": 3, "wait": 2, "get": 1}


def test_the_last_to_leave_lets_the_others_go():
    store = Counted()
    store.inner.add("leaving", 63)
    TorchWorld(5, 64, torch.device("cpu"), 1.0, store)._linger()
    assert store.inner.check(["all leave"]) and not store.calls["wait"]


@pytest.mark.parametrize(("devices", "shared"), [(("GPU-a", "GPU-b", "GPU-c"), False), (("GPU-a", "GPU-b", "GPU-a"), True)])
def test_two_ranks_that_would_use_one_gpu_are_told_on_all_ranks(devices, shared):
    store, said = HashStore(), {}

    def come(rank):
        try:
            claim_rank(store, rank, 3)
            meet_all(store, rank, 3, timedelta(seconds=20), devices[rank])
        except TransportError as error:
            said[rank] = str(error)

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(said) == ([0, 1, 2] if shared else [])
    assert all("another one would use the same GPU, GPU-a, but NCCL allows one rank per GPU" in text for text in said.values())


def test_two_processes_of_one_rank_are_told_on_all_ranks():
    store, said = HashStore(), []

    def come(rank):
        with pytest.raises(TransportError) as caught:
            claim_rank(store, rank, 3)
            meet_all(store, rank, 3, timedelta(seconds=20))
        said.append(str(caught.value))

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    twice = (
        "two processes have come as rank 1 of 3. Give each its own RANK, from 0 to 2; if each has, one of them is of another job, "
        "which needs another MASTER_PORT."
    )
    assert said == [twice] * 3


def test_a_rank_that_comes_twice_once_all_are_there_disturbs_nobody():
    store = Counted()
    for rank in (0, 1):
        claim_rank(store, rank, 2)
    for rank in (0, 1):
        threading.Thread(target=meet_all, args=(store, rank, 2, timedelta(seconds=20))).start()
    store.inner.wait(["all here"], timedelta(seconds=20))
    with pytest.raises(TransportError, match="two processes have come as rank 1 of 2"):
        claim_rank(store, 1, 2)
    assert store.inner.get("all here") == b""


def test_a_rank_of_another_job_is_turned_away_and_leaves_no_trace():
    store = HashStore()
    require_own(store, 0, 2, "the run in log.dir=/a", 29500)
    require_own(store, 1, 2, "the run in log.dir=/a", 29500)
    for job, size in (("the run in log.dir=/b", 2), ("the run in log.dir=/a", 4)):
        before = store.num_keys()
        with pytest.raises(TransportError) as caught:
            require_own(store, 1, size, job, 29500)
        assert str(caught.value) == (
            "rank 1: another job uses this port (MASTER_PORT=29500): the run in log.dir=/a, of 2 ranks; this one is "
            f"{job}, of {size} ranks. Choose another MASTER_PORT, for example 29501. Or, if they are to be one job, give all its ranks "
            "the same config and number of ranks."
        )
        assert store.num_keys() == before


def test_who_is_turned_away_opens_no_board():
    """So that it takes nothing of the rank that it would be: neither its name nor its alarms."""
    served, met = serve_at("127.0.0.1", 0, timedelta(seconds=20)), []
    own = PrefixStore("megatrain", served)
    require_own(own, 0, 2, "a", served.port)
    claim_rank(own, 1, 2)
    for job, said in (
        ("b", f"another job uses this port \\(MASTER_PORT={served.port}\\): a, of 2 ranks"),
        ("a", "have come as rank 1"),
    ):
        meeting = Rendezvous(("127.0.0.1", served.port), job=job)
        with pytest.raises(TransportError, match=said):
            TorchWorld.connect(1, 2, backend="gloo", rendezvous=meeting, join_seconds=20, met=lambda: met.append(1))
    assert met == []


def who_is_missing(store, rank, size):
    claim_rank(store, rank, size)
    with pytest.raises(TransportError) as caught:
        meet_all(store, rank, size, LIMIT)
    return str(caught.value)


@pytest.fixture
def all_but_two():
    store = Counted()
    for rank in set(range(LARGEST)) - {700, LARGEST - 1, 5}:
        store.inner.set(f"rank {rank}", "here")
    store.inner.add("arrived", LARGEST - 3)
    return store


def test_of_many_ranks_those_that_have_not_come_are_found_in_few_messages(all_but_two):
    message = who_is_missing(all_but_two, 5, LARGEST)
    assert f"of {LARGEST} ranks [700, {LARGEST - 1}] did not come" in message
    assert sum(all_but_two.calls.values()) < 100 and all_but_two.most <= 512


def test_when_many_ranks_ask_who_is_missing_few_look(all_but_two):
    all_but_two.inner.add("asked", 16)
    all_but_two.inner.set("missing", "[700] and 3 more")
    assert "ranks [700] and 3 more did not come" in who_is_missing(all_but_two, 5, LARGEST)
    assert all_but_two.calls["check"] == 0


def test_a_few_of_many_missing_ranks_are_named():
    store = Counted()
    for rank in set(range(40)) - {5}:
        store.inner.set(f"rank {rank}", "here")
    store.inner.add("arrived", 39)
    listed = ", ".join(map(str, range(40, 56)))
    assert f"of 1024 ranks [{listed}] and 968 more did not come" in who_is_missing(store, 5, 1024)


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
