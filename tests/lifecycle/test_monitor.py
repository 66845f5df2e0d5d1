"""A rank that can no longer run Python is ended by its monitor, which leaves no process behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

RANK = """
import ctypes, faulthandler, os, signal, sys, time
from megatrain.lifecycle.monitor import DUMP_SIGNAL, Monitor
monitor = Monitor(3, 0.5, "train.start_timeout_seconds", margin=0.25)
print(monitor._pid, flush=True)
faulthandler.register(DUMP_SIGNAL, file=2)

def stuck_in_c():
    while True:
        ctypes.PyDLL(None).usleep(60_000_000)  # holds the interpreter

if sys.argv[1] == "in C":
    monitor.beat(0.2, "step (train.hang_timeout_seconds=0.2)", 812, sys.argv[2])
    stuck_in_c()
if sys.argv[1] == "frozen":
    os.kill(os.getpid(), signal.SIGSTOP)
for _ in range(60):
    monitor.beat(0.4, "step")
    time.sleep(0.02)
if sys.argv[1] == "suspended":
    began = time.monotonic()
    os.kill(monitor._pid, signal.SIGSTOP)  # as all of the job
    time.sleep(2.0)
    os.kill(monitor._pid, signal.SIGCONT)
    ((ended, seconds),) = monitor.suspended(wait=30.0)
    assert began + 2.0 <= ended <= time.monotonic() and seconds >= 2.0, (began, ended, seconds)
    assert monitor.suspended() == []
if sys.argv[1] == "closed":
    monitor.close()
    monitor.beat(0.4, "step")
    time.sleep(1.0)
if sys.argv[1] == "without":
    os.kill(monitor._pid, signal.SIGKILL)
    for _ in range(10):
        monitor.beat(0.4, "step")
        time.sleep(0.02)
"""


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody is left to wait for it
    except OSError:
        return True


def run(what, events=""):
    process = subprocess.Popen([sys.executable, "-c", RANK, what, str(events)], stdout=-1, stderr=-1, text=True)
    monitor = int(process.stdout.readline())
    _, err = process.communicate(timeout=30)
    deadline = time.monotonic() + 5
    while not gone(monitor) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(monitor), "the monitor outlives its rank"
    return process, err


def test_a_rank_that_is_frozen_at_its_start_is_killed_with_its_name():
    process, err = run("frozen")
    assert process.returncode == -signal.SIGKILL
    assert err.startswith(f"megatrain: rank 3 (process {process.pid} on ")
    assert "is frozen (stopped by a signal), and the time of its section is over; to blame: rank 3\n" in err
    assert "    set-up (train.start_timeout_seconds=0.5)\n" in err


def test_a_rank_that_is_stuck_in_c_shows_its_stacks_and_is_killed_and_leaves_an_event(tmp_path):
    events = tmp_path / "a run" / "events.jsonl"
    events.parent.mkdir()
    events.write_text('{"event": "start"}\n{"event": "sa')  # a line that a full disk has cut
    process, err = run("in C", events)
    assert process.returncode == -signal.SIGKILL
    assert "runs no Python any more" in err and "    step (train.hang_timeout_seconds=0.2)\n" in err
    assert "in stuck_in_c\n" in err
    _, _, line = events.read_text().splitlines()
    event = json.loads(line)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", event.pop("time"))
    assert event == {
        "event": "hang",
        "step": 812,
        "rank": 3,
        "message": f"rank 3 (process {process.pid} on {socket.gethostname()}) runs no Python any more, and the time of its section is "
        "over; to blame: rank 3\n    step (train.hang_timeout_seconds=0.2)",
    }


@pytest.mark.parametrize("reader", ["sleeps", "has gone"])
def test_it_kills_the_rank_where_nobody_reads_its_words(reader):
    ours, theirs = jobs.full_pipe()
    process = subprocess.Popen([sys.executable, "-c", RANK, "frozen"], stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    if reader == "has gone":
        os.close(ours)
    assert process.wait(timeout=20) == -signal.SIGKILL
    if reader == "sleeps":
        said = b""
        while len(said) < 2**16 + 30:
            said += os.read(ours, 4096)
        os.close(ours)
        assert b"megatrain: rank 3 (process " in said, "the words are still on offer"


@pytest.mark.parametrize("what", ["well", "suspended", "closed", "without"])
def test_a_rank_that_goes_well_is_let_alone(what):
    process, err = run(what)
    assert (process.returncode, err) == (0, "")
