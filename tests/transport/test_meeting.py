"""Ranks tell rank 0, rank 0 tells all; those that do not come are left out; a store of somebody else is none."""

from datetime import timedelta
from threading import Thread

import jobs
import pytest
from torch.distributed import TCPStore

from megatrain.transport.group import TransportError
from megatrain.transport.meeting import Meeting


def meet(rank, size, port, seconds=10.0, launcher_serves=False):
    return Meeting(rank, size, ("127.0.0.1", port), seconds, launcher_serves=launcher_serves, prefix="test", key=b"ours")


def together(ranks, body):
    """What `body(rank)` gives on each of these ranks, which are threads; an exception counts as what it gives."""
    results = {}

    def run(rank):
        try:
            results[rank] = body(rank)
        except Exception as error:
            results[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_alone_there_is_no_store():
    meeting = meet(0, 1, 0)
    assert meeting.collect("mine", 1.0) == {0: "mine"} and meeting.decide("word", 1.0) == "word"
    meeting.close()


@pytest.mark.parametrize("launcher_serves", [False, True])
def test_two_rounds(launcher_serves):
    port = jobs.free_port()
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if launcher_serves else None

    def body(rank):
        meeting = meet(rank, 3, port, launcher_serves=launcher_serves)
        try:
            return [
                (meeting.collect(f"{turn} of {rank}", 10.0), meeting.decide(f"{rank} says {turn}", 10.0)) for turn in range(2)
            ]
        finally:
            meeting.close()

    results = together(range(3), body)
    assert results[0] == [({rank: f"{turn} of {rank}" for rank in range(3)}, f"0 says {turn}") for turn in range(2)]
    assert results[1] == results[2] == [({}, "0 says 0"), ({}, "0 says 1")]
    del agent


def test_those_that_do_not_come_are_left_out():
    port = jobs.free_port()

    def body(rank):
        meeting = meet(rank, 4, port)
        try:
            return meeting.collect(f"of {rank}", 1.0), meeting.decide("stop", 10.0)
        finally:
            meeting.close()

    assert together([0, 2], body) == {0: ({0: "of 0", 2: "of 2"}, "stop"), 2: ({}, "stop")}


def test_rank_0_does_not_come():
    port = jobs.free_port()
    with pytest.raises(TransportError, match=f"rank 1 cannot reach the store at 127.0.0.1:{port} within 0.5 s"):
        meet(1, 2, port, 0.5)
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    meeting = meet(1, 2, port, launcher_serves=True)
    meeting.collect("here", 0.1)
    with pytest.raises(TransportError, match="rank 1 heard nothing from rank 0"):
        meeting.decide("", 0.5)
    meeting.close()
    del agent


def test_the_store_of_another_job(monkeypatch):
    """Rank 0 cannot serve, and no other rank takes the store that is there for its own."""
    monkeypatch.setattr("megatrain.transport.meeting.ANSWER_SECONDS", 0.5)
    port = jobs.free_port()
    other = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    with pytest.raises(TransportError, match=f"rank 0 cannot serve port {port}"):
        meet(0, 2, port)
    with pytest.raises(
        TransportError, match=f"rank 1 found a store at 127.0.0.1:{port} that is not served by rank 0 of this job"
    ):
        meet(1, 2, port)
    del other


def test_a_store_that_a_stranger_calls_open_is_not_that_of_rank_0(monkeypatch):
    monkeypatch.setattr("megatrain.transport.meeting.ANSWER_SECONDS", 0.5)
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent.set("test/open", "")
    with pytest.raises(TransportError, match="that is not served by rank 0 of this job"):
        meet(1, 2, agent.port)


def test_a_stranger_decides_nothing_and_counts_as_no_rank():
    port = jobs.free_port()
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for key, text in {"1 decided": "0", "1 from 1": "well", "1 came": "x", "1 all": "", "left": "x", "left 1": "x"}.items():
        agent.set(f"test/{key}", text)

    def body(rank):
        meeting = meet(rank, 2, port, launcher_serves=True)
        return meeting.collect("mine", 1.0), meeting.decide("1", 10.0)

    meeting = meet(1, 2, port, launcher_serves=True)
    meeting._round = 1
    results = together([0], body)
    assert results[0] == ({0: "mine"}, "1")
    assert meeting.decide("", 10.0) == "1"
    agent.set("test/1 decided", "0")
    with pytest.raises(TransportError, match="what rank 0 has not written"):
        meeting.decide("", 0.2)
