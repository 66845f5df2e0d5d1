"""To join and to leave: what one rank asks of the store does not grow with the world, and what a stranger writes there is not obeyed."""

import threading
import time
from datetime import timedelta

import pytest
import torch
from counted_store import Counted
from torch.distributed import HashStore, PrefixStore, TCPStore

from megatrain.transport import joining
from megatrain.transport.board import Board
from megatrain.transport.group import TransportError
from megatrain.transport.joining import claim_rank, leave_all, meet_all, require_own
from megatrain.transport.processes import Rendezvous, TorchWorld
from megatrain.transport.store import serve_at

LARGEST = 16_384
LIMIT = timedelta(seconds=0.2)
ESCAPE = "a stranger \x1b[31m says stop"


def board_of(store):
    return Board(store, 20.0, b"key")


def come(store, ranks, size, devices=("",) * 3, seconds=20.0):
    """Rank -> error of each of these ranks, which come as threads; empty if all have met."""
    said = {}

    def run(place, rank):
        try:
            board = board_of(store)
            meet_all(board, rank, size, timedelta(seconds=seconds), claim_rank(board, rank, size, devices[rank]))
        except TransportError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(ranks)]
    for thread in threads:
        thread.start()
    return threads, said


def joined(store, ranks, size, devices=("",) * 3):
    threads, said = come(store, ranks, size, devices)
    for thread in threads:
        thread.join(20)
    return said


@pytest.mark.parametrize("size", [64, LARGEST])
def test_to_join_and_to_leave_takes_as_many_messages_in_any_world(size):
    store = Counted()
    board = board_of(store)
    for place in ("all here 0", "all leave"):
        board.write(place, "")
    store.calls.clear()
    meet_all(board, 5, size, LIMIT, claim_rank(board, 5, size))
    assert store.calls == {"compare_set": 2, "wait": 1, "get": 1}
    TorchWorld(5, size, torch.device("cpu"), 1.0, board)._linger()
    assert store.calls == {"compare_set": 2, "set": 1, "wait": 2, "get": 2}


def test_rank_0_hears_and_answers_a_large_world_in_few_messages():
    store = Counted()
    board = board_of(store)
    for rank in range(1, LARGEST):
        store.inner.set(f"rank {rank}", board._seal.close(f"rank {rank}", f"{rank} "))
        store.inner.set(f"leaves {rank}", board._seal.close(f"leaves {rank}", ""))
    meet_all(board, 0, LARGEST, timedelta(seconds=60), claim_rank(board, 0, LARGEST))
    assert store.calls == {"compare_set": 3, "check": 64, "multi_get": 32} and store.most == 512
    assert board.read_all(["all here 0"]) == {"all here 0": ""}
    leave_all(board, 0, LARGEST, 60.0)
    assert board.read_all(["all leave"]) == {"all leave": ""}


@pytest.mark.parametrize(("devices", "shared"), [(("GPU-a", "GPU-b", "GPU-c"), False), (("GPU-a", "GPU-b", "GPU-a"), True)])
def test_two_ranks_that_would_use_one_gpu_are_told_on_all_ranks(devices, shared):
    said = joined(HashStore(), (0, 1, 2), 3, devices)
    assert sorted(said) == ([0, 1, 2] if shared else [])
    told = "rank 0 and rank 2 would use the same GPU, GPU-a, but NCCL allows one rank per GPU"
    assert all(told in text for text in said.values())


def test_two_processes_of_one_rank_are_told_on_all_ranks():
    said = joined(HashStore(), (0, 1, 1), 3)
    twice = (
        "two processes have come as rank 1 of 3. Give each its own RANK, from 0 to 2; if each has, one of them is of another job, "
        "which needs another MASTER_PORT."
    )
    assert list(said.values()) == [twice] * 3


def test_a_rank_that_comes_twice_once_all_are_there_disturbs_nobody():
    store = HashStore()
    assert joined(store, (0, 1), 2) == {}
    with pytest.raises(TransportError, match="two processes have come as rank 1 of 2"):
        claim_rank(board_of(store), 1, 2)
    assert board_of(store).read_all(["all here 0"]) == {"all here 0": ""}


def test_a_rank_of_another_job_is_turned_away_and_leaves_no_trace():
    store = HashStore()
    store.set("job", ESCAPE)
    board = board_of(store)
    require_own(board, 0, 2, "the run in log.dir=/a", 29500)
    require_own(board, 1, 2, "the run in log.dir=/a", 29500)
    for job, size in (("the run in log.dir=/b", 2), ("the run in log.dir=/a", 4)):
        before = store.num_keys()
        with pytest.raises(TransportError) as caught:
            require_own(board, 1, size, job, 29500)
        assert str(caught.value) == (
            "rank 1: another job uses this port (MASTER_PORT=29500): the run in log.dir=/a, of 2 ranks; this one is "
            f"{job}, of {size} ranks. Choose another MASTER_PORT, for example 29501. Or, if they are to be one job, give all its ranks "
            "the same config and number of ranks."
        )
        assert store.num_keys() == before


def test_who_is_turned_away_opens_no_board():
    """So that it takes nothing of the rank that it would be: neither its name nor its alarms."""
    served, met = serve_at("127.0.0.1", 0, timedelta(seconds=20)), []
    own = board_of(PrefixStore("megatrain", served))
    require_own(own, 0, 2, "a", served.port)
    claim_rank(own, 1, 2)
    for job, said in (
        ("b", f"another job uses this port \\(MASTER_PORT={served.port}\\): a, of 2 ranks"),
        ("a", "have come as rank 1"),
    ):
        meeting = Rendezvous(("127.0.0.1", served.port), job=job, key=b"key")
        with pytest.raises(TransportError, match=said):
            TorchWorld.connect(1, 2, backend="gloo", rendezvous=meeting, join_seconds=20, met=lambda: met.append(1))
    assert met == []


def who_is_missing(store, rank, size):
    board = board_of(store)
    word = claim_rank(board, rank, size)
    with pytest.raises(TransportError) as caught:
        meet_all(board, rank, size, LIMIT, word)
    return str(caught.value)


def come_before(ranks):
    store = Counted()
    seal = board_of(store)._seal
    for rank in ranks:
        store.inner.set(f"rank {rank}", seal.close(f"rank {rank}", "here"))
    return store


def test_of_many_ranks_those_that_have_not_come_are_found_in_few_messages():
    store = come_before(set(range(LARGEST)) - {700, LARGEST - 1, 5})
    store.inner.set("rank 700", "come")  # says a stranger
    message = who_is_missing(store, 5, LARGEST)
    assert f"of {LARGEST} ranks [700, {LARGEST - 1}] did not come" in message
    assert sum(store.calls.values()) < 150 and store.most <= 512


def test_when_many_ranks_ask_who_is_missing_one_looks():
    store = come_before(range(1))
    board_of(store).write("looks 0", "9")
    board_of(store).write("missing 0", "[700] and 3 more")
    assert "ranks [700] and 3 more did not come" in who_is_missing(store, 5, LARGEST)
    assert store.calls["check"] == 0


def test_where_the_rank_that_looks_has_died_another_looks(monkeypatch):
    monkeypatch.setattr(joining, "answer_seconds", lambda ranks: 0.05)
    store = come_before((0, 1))
    board_of(store).write("looks 0", "1")
    assert "of 4 ranks [2] did not come" in who_is_missing(store, 3, 4)


def test_a_few_of_many_missing_ranks_are_named():
    store = come_before(set(range(40)) - {5})
    listed = ", ".join(map(str, range(40, 56)))
    assert f"of 1024 ranks [{listed}] and 968 more did not come" in who_is_missing(store, 5, 1024)


OPEN = ["all here", "all here 0", "problem", "arrived", "asked", "looks 0", "missing", "missing 0", "device ", "all leave"]
OPEN += ["rank 0", "rank 1"]


def test_a_stranger_who_has_set_every_key_neither_starts_nor_ends_a_job():
    store = HashStore()
    for key in OPEN:
        store.set(key, ESCAPE)
    threads, said = come(store, (0,), 2)
    time.sleep(0.3)
    assert threads[0].is_alive() and said == {}  # rank 1 has not come
    assert joined(store, (1,), 2) == {}
    threads[0].join()
    assert said == {}


def test_a_rank_whose_word_a_stranger_replaces_comes_once_more():
    store = HashStore()
    threads, said = come(store, (1, 2), 3)
    while not store.check(["rank 1", "rank 2"]):
        time.sleep(0.01)
    store.set("rank 1", ESCAPE)
    assert joined(store, (0,), 3) == {} and said == {}
    for thread in threads:
        thread.join()
    assert said == {}


def test_of_ranks_that_do_not_come_the_error_has_no_word_of_a_strangers():
    store = HashStore()
    for key in OPEN:
        store.set(key, ESCAPE)
    message = who_is_missing(store, 0, 2)
    assert "of 2 ranks [1] did not come" in message and "stranger" not in message


def test_on_a_real_store_a_strangers_counter_closes_no_connection():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key in (*OPEN, "leaving"):
        server.set(f"job/{key}", ESCAPE)
    assert joined(PrefixStore("job", server), (0, 1), 2) == {}
    boards = [board_of(PrefixStore("job", server)) for _ in range(2)]
    threads = [threading.Thread(target=leave_all, args=(board, rank, 2, 20.0)) for rank, board in enumerate(boards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert boards[0].read_all(["all leave"]) == {"all leave": ""}
