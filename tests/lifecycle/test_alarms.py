"""An alarm over a real store that a stranger writes to: he may hinder the ranks, but never has a healthy one blamed or killed."""

import threading
import time

import pytest
from torch.distributed import PrefixStore, TCPStore

from megatrain.lifecycle import guard as guards
from megatrain.lifecycle.blame import Identity, State
from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.sections import SectionLimits
from megatrain.runtime.launch import Launch
from megatrain.transport.board import Board
from megatrain.transport.group import TransportError

WAITS = State(0, "waiting", "all_reduce", "world", (0, 1), "all_reduce", 7, 9.0)
SLEEPS = State(1, "busy", "step")
OPEN = ["alarms", "judge", "verdict", *(f"{what}/{rank}" for what in ("state", "wake", "identity", "alarm") for rank in (0, 1))]


class Job:
    """Two ranks, each with its own connections to one store."""

    def __init__(self):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.guards = [self.guard(rank) for rank in (0, 1)]
        self.verdicts = {}

    def guard(self, rank):
        launch = Launch(rank, rank, 2, 2, master_addr="127.0.0.1", master_port=self.store.port, secret="of this test alone")
        made = Guard(launch, SectionLimits(start=60.0, hang=60.0, save=60.0))
        made._board = made._open_board()
        made._board.write(f"identity/{rank}", Identity.own(rank).text())
        return made

    def scribble(self, *keys):
        names = PrefixStore(f"guard/{self.guards[0]._launch.store_prefix}", self.store)
        for key in keys:
            names.set(key, "x\x1b[31m")

    def alarm(self, state, after=0.0):
        def hold():
            time.sleep(after)
            self.verdicts[state.rank] = self.guards[state.rank]._agree_on_verdict(state)[0]

        thread = threading.Thread(target=hold)
        thread.start()
        return thread


@pytest.fixture
def job():
    return Job()


def test_a_stranger_who_has_set_every_key_changes_nothing_of_the_verdict(job):
    job.scribble(*OPEN)
    for thread in (job.alarm(WAITS), job.alarm(SLEEPS, after=0.7)):
        thread.join(20)
    assert sorted(job.verdicts) == [0, 1]
    for verdict in job.verdicts.values():
        assert (verdict.kind, verdict.culprits, verdict.kill) == ("hang", (1,), ())
        assert "rank 1 has come no further" in verdict.text and "\x1b" not in verdict.text


def test_a_rank_whose_word_a_stranger_has_replaced_is_not_killed_as_silent(job, monkeypatch):
    monkeypatch.setattr(guards, "STATES_SECONDS", 0.3)
    job.scribble("state/1")
    job.alarm(WAITS).join(20)
    assert job.verdicts[0].kill == () and job.verdicts[0].culprits == (1,)
    assert "rank 1 could not be heard: a process that is not of this job has written in its place" in job.verdicts[0].text


def test_a_connection_that_breaks_during_an_alarm_is_not_taken_for_the_end_of_the_store(job, monkeypatch):
    monkeypatch.setattr(guards, "STATES_SECONDS", 0.3)
    job.guards[1]._board.write("state/1", SLEEPS.text())

    def break_off(key, text):
        raise TransportError("Connection reset by peer")

    job.guards[0]._board.claim = break_off
    job.alarm(WAITS).join(20)
    assert job.verdicts[0].culprits == (1,) and "rank 1 has come no further" in job.verdicts[0].text


def test_one_rank_claims_a_key_and_the_others_hear_which(job):
    ours = [Board(PrefixStore("x", job.store), 4.0, b"key") for _ in range(3)]
    job.store.set("x/judge", b"\xff\xfe" * 40)
    assert [board.claim("judge", f"{rank}") for rank, board in enumerate(ours)] == ["0", "0", "0"]
    job.store.set("x/judge", "")
    assert ours[1].claim("judge", "1") == "1" and ours[2].claim("judge", "2") == "1"
