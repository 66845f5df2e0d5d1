"""The rendezvous that torchrun is given: torch's, told apart by what it adds: limits, and word of nodes that wait."""

from threading import Event

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler

from megatrain.lifecycle import agent_nodes
from megatrain.lifecycle.agent_logs import RankLogs
from megatrain.lifecycle.agent_nodes import LimitedRendezvous


class Meeting(RendezvousHandler):
    """A rendezvous of a store that answers, or hangs until `released`."""

    use_agent_store = True

    def __init__(self, released=None):
        self.released, self.closed = released, False

    def get_backend(self):
        return "c10d"

    def get_run_id(self):
        return "job 7 with a secret"

    def is_closed(self):
        if self.released is not None:
            self.released.wait()
        return self.closed

    def set_closed(self):
        self.closed = True

    def num_nodes_waiting(self):
        return 2 - self.is_closed() * 2

    def next_rendezvous(self):
        return "met"

    def shutdown(self):
        return not self.is_closed()


def logs_of(tmp_path):
    return RankLogs(tmp_path, tmp_path / "preempted", terminal=False)


def test_it_answers_as_the_inner_one_and_tells_of_nodes_that_wait(tmp_path):
    inner, logs = Meeting(), logs_of(tmp_path)
    limited = LimitedRendezvous(inner, logs, "job 7")
    assert (limited.get_backend(), limited.get_run_id(), limited.use_agent_store) == ("c10d", "job 7", True)
    assert not limited.is_closed() and not logs.grows
    assert (limited.next_rendezvous(), limited.num_nodes_waiting(), logs.grows) == ("met", 2, True)
    assert limited.shutdown() is True
    limited.set_closed()
    assert inner.closed and limited.is_closed()
    assert (limited.num_nodes_waiting(), limited.shutdown()) == (0, False)
    assert logs.grows  # until the workers are started again


def test_a_store_that_is_gone_ends_a_call_and_not_the_leaving(tmp_path, monkeypatch):

    monkeypatch.setattr(agent_nodes, "ANSWER_SECONDS", 0.1)
    released = Event()
    limited = LimitedRendezvous(Meeting(released), logs_of(tmp_path), "job 7")
    try:
        for call in (limited.num_nodes_waiting, limited.next_rendezvous):
            with pytest.raises(RendezvousConnectionError, match=r"has its host gone\?"):
                call()
        assert limited.shutdown() is False
    finally:
        released.set()
