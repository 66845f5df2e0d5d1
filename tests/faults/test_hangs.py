"""A rank that is frozen or sleeps, in any section of a run: all ranks end within the section's limit and 10 s, and it is named."""

import random
import signal
import socket
import time
from datetime import datetime

import jobs
import pytest
from breaking import LAYOUTS, MAIN, STEPS, codes, count, kinds, no_process_is_left, said

LIMIT = 8.0
LIMITS = (
    f"train.hang_timeout_seconds={LIMIT}",
    f"train.start_timeout_seconds={2 * LIMIT}",
    f"checkpoint.timeout_seconds={LIMIT}",
    "train.eval_every=5",
    "train.eval_batches=1",
)
SECTIONS = {"start": 1, "data": 9, "step": 9, "evaluation": 2, "save": 2, "end": 1}
"""Places of sabotage.py, and at which visit."""
WHERE = {"data": "in batch\n", "evaluation": "in _sleep\n", "save": "in _sleep\n"}
"""In the stack of a rank that sleeps there; batches are made in a thread, for which the step waits."""


def strike(house, measured, name, act, limit):
    """Break a run by `act`; how its ranks ended."""
    layout = LAYOUTS[MAIN]
    with house.start(MAIN, name, f"data.valid={house.folder / 'data'}", *LIMITS, act=act) as job:
        ended = job.finish(jobs.SECONDS + limit + 40)
        took = house.since(name)
    no_process_is_left(house.run(name))
    assert 0 not in codes(ended) and len(ended) == layout.size, said(ended)
    measured.detected(took)
    return ended


@pytest.mark.fault(
    injection="SIGSTOP of any one rank, {section}",
    promise="all ranks end, the error names the rank",
    bound="{limit} + 10",
    layout=MAIN,
)
@pytest.mark.parametrize(("section", "limit"), [(name, 2 * LIMIT if name == "start" else LIMIT) for name in SECTIONS])
@pytest.mark.timeout(3600)
def test_a_frozen_rank_is_named_in_every_section(house, measured, section, limit):
    for turn in range(count("MEGATRAIN_FAULTS_TRIES", 1)):
        victim = random.SystemRandom().randrange(LAYOUTS[MAIN].size)
        act = {"what": "stop", "where": section, "at": SECTIONS[section], "ranks": [victim]}
        ended = strike(house, measured, f"stop_{section}_{turn}", act, limit)
        others = [end for rank, end in enumerate(ended) if rank != victim]
        assert any(f"to blame: rank {victim}\n" in end.err for end in others), (victim, said(ended))


@pytest.mark.fault(
    injection="one rank sleeps, {section}",
    promise="all ranks end, the error names the rank and has the stacks of all",
    bound="{limit} + 10",
    layout=MAIN,
)
@pytest.mark.parametrize(("section", "limit"), [("data", LIMIT), ("evaluation", LIMIT), ("save", LIMIT)])
def test_a_rank_that_sleeps_is_named_with_the_stacks_of_all(house, measured, section, limit):
    victim = random.SystemRandom().randrange(LAYOUTS[MAIN].size)
    act = {"what": "sleep", "where": section, "at": SECTIONS[section], "ranks": [victim]}
    ended = strike(house, measured, f"sleep_{section}", act, limit)
    text = said(ended)
    assert f"to blame: rank {victim}\n" in text, text
    assert WHERE[section] in text, text
    for rank in range(LAYOUTS[MAIN].size):
        assert f"rank {rank}" in text, text


@pytest.mark.fault(
    injection="all ranks sleep at once, {section}",
    promise="all ranks end, with the stacks of all",
    bound="{limit} + 10",
    layout=MAIN,
)
@pytest.mark.parametrize(("section", "limit"), [("data", LIMIT), ("evaluation", LIMIT), ("save", LIMIT)])
def test_a_run_all_of_whose_ranks_sleep_ends(house, measured, section, limit):
    ended = strike(house, measured, f"all_{section}", {"what": "sleep", "where": section, "at": SECTIONS[section]}, limit)
    assert all(WHERE[section] in end.err for end in ended), said(ended)


@pytest.mark.fault(
    injection="the only rank of a run sleeps, {section}",
    promise="it ends, with its stack",
    bound="{limit} + 10",
    layout="1 rank",
)
@pytest.mark.parametrize(("section", "limit"), [("data", LIMIT), ("evaluation", LIMIT), ("save", LIMIT)])
def test_a_run_of_one_rank_that_sleeps_ends(house, measured, section, limit):
    name = f"alone_{section}"
    act = {"what": "sleep", "where": section, "at": SECTIONS[section]}
    with house.start("1 rank", name, f"data.valid={house.folder / 'data'}", *LIMITS, act=act) as job:
        (ended,) = job.finish(jobs.SECONDS + limit + 40)
    measured.detected(house.since(name))
    assert ended.code not in (0, 75) and WHERE[section] in ended.err, ended


@pytest.mark.fault(
    injection="SIGSTOP of the only rank of a run, {section}",
    promise="its monitor ends it and says where, on stderr and as an event",
    bound="{limit} + 10",
    layout="1 rank",
)
@pytest.mark.parametrize(("section", "limit"), [("step", LIMIT), ("save", LIMIT)])
def test_a_run_of_one_rank_that_is_frozen_ends(house, measured, section, limit):
    name = f"frozen_{section}"
    act = {"what": "stop", "where": section, "at": SECTIONS[section]}
    with house.start("1 rank", name, *LIMITS[:3], act=act) as job:
        (ended,) = job.finish(jobs.SECONDS + limit + 40)
    measured.detected(house.since(name))
    assert ended.code == -signal.SIGKILL and "is frozen (stopped by a signal)" in ended.err, ended
    (event,) = kinds(house.run(name), "hang")
    assert event["rank"] == 0 and event["step"] <= 9 and "to blame: rank 0\n" in event["message"], event
    assert event["message"] in ended.err, event


@pytest.mark.fault(
    injection="a peer never comes",
    promise="the others end, with one clear error, and no process is left",
    bound="{limit} + 10",
    layout=MAIN,
)
@pytest.mark.parametrize("limit", [LIMIT])
def test_a_peer_that_never_comes(house, measured, limit):
    job, port, size = jobs.Job(house.folder / "job_lonely"), jobs.free_port(), LAYOUTS[MAIN].size
    words = [
        "train",
        *house.words(MAIN, "lonely", f"train.hang_timeout_seconds={limit}", f"train.start_timeout_seconds={limit}"),
    ]
    with job:
        began = time.monotonic()
        for rank in range(size - 1):
            job.fork(words, jobs.environment(rank, size, port))
        ended = job.finish()
        measured.detected(time.monotonic() - began)
    no_process_is_left(house.run("lonely"))
    assert codes(ended) == [1] * (size - 1), said(ended)
    assert all("megatrain: error: " in end.err and "Traceback" not in end.err for end in ended), said(ended)


@pytest.mark.fault(
    injection="the port of the rendezvous is taken",
    promise="all ranks end, with one clear error, and no process is left",
    bound="{limit} + 10",
    layout=MAIN,
)
@pytest.mark.parametrize("limit", [LIMIT])
def test_a_port_that_is_taken(house, measured, limit):
    size = LAYOUTS[MAIN].size
    words = [
        "train",
        *house.words(MAIN, "taken", f"train.hang_timeout_seconds={limit}", f"train.start_timeout_seconds={limit}"),
    ]
    with socket.socket() as other, jobs.Job(house.folder / "job_taken") as job:
        other.bind(("127.0.0.1", 0))
        other.listen()
        began = time.monotonic()
        for rank in range(size):
            job.fork(words, jobs.environment(rank, size, other.getsockname()[1]))
        ended = job.finish()
        measured.detected(time.monotonic() - began)
    no_process_is_left(house.run("taken"))
    assert codes(ended) == [1] * size, said(ended)
    assert "it is in use" in ended[0].err, said(ended)
    for end in ended[1:]:  # whatever listens there lets them wait
        assert "megatrain: error: " in end.err or "rank 0, which serves the rendezvous store" in end.err, said(ended)
    assert all("Traceback" not in end.err for end in ended), said(ended)


@pytest.mark.fault(
    injection="one rank is several times slower",
    promise="event `slow` with rank and ratio within 10 steps; the result is the undisturbed run's, to the bit",
    layout="{layout}",
)
@pytest.mark.parametrize(("layout", "victim", "at"), [(MAIN, 3, 2), ("dp 2", 1, 2), ("pp 2", 1, 2), ("pp 2", 1, 12)])
def test_a_slow_rank(house, measured, layout, victim, at):
    """Without peers a rank is told by the other stages, or by its own past where it has one."""
    name = f"slow_{layout}_{at}".replace(" ", "_")
    act = {"what": "slow", "at": at, "ranks": [victim], "seconds": 0.15}
    with house.start(layout, name, "log.stragglers_every=2", act=act) as job:
        ended = job.finish()
    assert codes(ended) == [0] * LAYOUTS[layout].size, said(ended)
    run = house.run(name)
    told = kinds(run, "slow")
    event = next((event for event in told if event["rank"] == victim), {"step": STEPS, "ratio": 0.0})
    assert event["ratio"] > 2 and event["step"] <= at + 10, (told, (run / "metrics.jsonl").read_text())
    measured.detected(datetime.fromisoformat(event["time"]).timestamp() - house.told(name).stat().st_mtime)
    jobs.same(run, house.undisturbed(layout), STEPS)
