"""The guard of a run of one rank: no store and no collectives, and yet no section without an end."""

import jobs
import pytest

from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.sections import SectionLimits
from megatrain.runtime.launch import Launch

ALONE = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from megatrain.lifecycle import guard, sections
from megatrain.lifecycle.guard import Guard
from megatrain.lifecycle.sections import SectionLimits
from megatrain.runtime.launch import Launch

def load_sample_that_never_comes():
    time.sleep(30)

class Store:
    bin_path = Path("/disk/corpus.bin")

    def read(self):
        load_sample_that_never_comes()

def expression_that_keeps_python():
    while True:
        ctypes.PyDLL(None).usleep(600_000)  # no other thread runs
        time.sleep(0.05)

def stderr_is_a_pipe(read, filled):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    while filled:
        try:
            os.write(theirs, b"." * 4096)
        except BlockingIOError:
            break
    os.set_blocking(theirs, True)
    os.dup2(theirs, 2)
    if not read:
        os.close(ours)

what = sys.argv[1]
if what in ("unread", "unreadable"):
    stderr_is_a_pipe(read=what == "unread", filled=what == "unread")
sections.TOLD_SECONDS, guard.LATE_SECONDS = 0.3, 0.2
long = {"set-up": (0.5, 0.5, 1.0), "told": (60.0, 60.0, 1.0), "told save": (60.0, 0.5, 60.0), "told first": (60.0, 4.0, 1.0)}
limits = SectionLimits(*long.get(what, (60.0, 0.5, 1.0)))
of = Guard(Launch(), limits)
of.on_event = lambda kind, rank, text: print(kind, rank, flush=True)
with of, of.watching():
    if what == "set-up":
        with of.section("set-up"):
            load_sample_that_never_comes()
    time.sleep(1.0)  # in no section: no limit
    with of.section("step"):
        if what == "told first":  # nothing is known of a step's usual time
            guard.WHERE_SECONDS = 0.1
            of.told = lambda: began
            began = time.monotonic()
            load_sample_that_never_comes()
        for _ in range(30):
            of.tick()
            time.sleep(0.03)
        if what == "told save":
            of.sections.longest_save = lambda: 0.05
            told = time.monotonic()
            of.told = lambda: told
            with of.section("save", lambda: "/disk/step_00000008"):
                load_sample_that_never_comes()
        if what == "told":
            told = time.monotonic()
            of.told = lambda: told
        if what == "background":
            began = time.monotonic()
            of.background = lambda: (began, "/disk/step_00000004/weights")
            while True:
                of.tick()
                time.sleep(0.03)
        if what == "kept":
            expression_that_keeps_python()
        if what == "data":
            reads = threading.Thread(target=Store().read, daemon=True)
            reads.start()
            of.reader = lambda: reads.ident
            with of.phase("data"):
                reads.join()
        elif what in ("save", "evaluation", "samples"):
            with of.section(what, lambda: "/disk/step_00000004" if what == "save" else ""):
                load_sample_that_never_comes()
        elif what != "well":
            load_sample_that_never_comes()
    of.leave()
print("DONE")
"""
SAID = {
    "set-up": "in set-up (train.start_timeout_seconds=0.5), and",
    "data": "in data at /disk/corpus.bin (train.hang_timeout_seconds=0.5), and",
    "step": "in step (train.hang_timeout_seconds=0.5), and",
    "kept": "in step (train.hang_timeout_seconds=0.5), and",
    "evaluation": "in evaluation (train.hang_timeout_seconds=0.5), and",
    "samples": "in samples (train.hang_timeout_seconds=0.5), and",
    "save": "in save at /disk/step_00000004 (checkpoint.timeout_seconds=1), and",
    "background": "in save at /disk/step_00000004/weights (checkpoint.timeout_seconds=1)\n",
    "told": "in step (told to stop; ",
    "told save": "in save at /disk/step_00000008 (told to stop; 0.3 s are far above its usual time), and",
}
AT = {
    "background": "in <module>",
    "kept": "in expression_that_keeps_python",
    "data": "and its thread that makes the batch is at\n",
}
"""In its stack, beside load_sample_that_never_comes."""
MUTE = ("unread", "unreadable")
"""Its stderr is a pipe that nobody reads, and is full; a pipe whose reader has gone."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What -> how a run ended that hangs there; all at once."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "alone.py").write_text(ALONE)
    with jobs.Job(folder) as job:
        for what in (*SAID, *MUTE, "told first", "well"):
            job.fork([str(folder / "alone.py"), what], jobs.environment())
        return dict(zip((*SAID, *MUTE, "told first", "well"), job.finish(), strict=True))


@pytest.mark.parametrize("what", SAID)
def test_a_section_that_comes_no_further_ends_the_run_with_its_name_and_stack(ended, what):
    code, out, err = ended[what].code, ended[what].out, ended[what].err
    assert (code, out) == (1, "hang 0\n"), err
    assert err.startswith("megatrain: rank 0 ends after a hang; to blame: rank 0\n    rank 0 has come "), err
    assert SAID[what] in err
    assert AT.get(what, "") in err and (what in ("background", "kept") or "in load_sample_that_never_comes" in err)


@pytest.mark.parametrize("what", MUTE)
def test_a_run_whose_words_nobody_reads_ends_as_well_and_leaves_its_event(ended, what):
    assert ended[what] == jobs.Ended(1, "hang 0\n", "")


def test_a_run_that_was_told_to_stop_in_vain_says_where_it_is_before_its_limit_ends_it(ended):
    code, out, err = ended["told first"].code, ended["told first"].out, ended["told first"].err
    first, then = err.split("megatrain: rank 0 ends after a hang")
    assert (code, out) == (1, "stopping None\nhang 0\n"), err
    assert first.startswith("megatrain: told to stop, but come no further for 0.1 s\n    rank 0 has come no further for "), err
    assert "in load_sample_that_never_comes" in first and "in load_sample_that_never_comes" in then


def test_a_run_that_comes_further_is_let_alone(ended):
    assert ended["well"] == jobs.Ended(0, "DONE\n", "")


class Told:
    """A monitor that remembers what it was told."""

    def __init__(self):
        self.beats = []

    def beat(self, seconds, what, step=0, events=""):
        self.beats.append((round(seconds), what))


def test_the_monitor_is_told_at_once_what_begins():
    told = Told()
    guard = Guard(Launch(), SectionLimits(16.0, 8.0, 30.0), told)
    with guard.section("set-up"):
        pass
    with guard.section("step"), guard.section("save", lambda: "/checkpoints"), guard.phase("data"):
        pass
    assert told.beats == [
        (18, "set-up (train.start_timeout_seconds=16)"),
        (8, "step (train.hang_timeout_seconds=8)"),
        (30, "save at /checkpoints (checkpoint.timeout_seconds=30)"),
    ]
