"""Two runs never write into one directory; that of a dead one is taken over, with a note; one that was removed is taken again."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

from megatrain.checkpoint import claim as claims
from megatrain.checkpoint.claim import claim, claim_log, taken
from megatrain.checkpoint.together import CheckpointError
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import simulate
from megatrain.transport.owner import own

SINGLE = ParallelContext.single()


def hold_elsewhere(directory, orderly=False):
    """A lock file of a process that has ended: killed while it held the directory or, in order, after giving it up."""
    how = "held.release()" if orderly else "os.kill(os.getpid(), 9)"
    text = (
        f"import os, sys; from pathlib import Path; from megatrain.checkpoint.claim import claim_log; from megatrain.parallel.mesh import "
        f"ParallelContext; held = claim_log(Path(sys.argv[1]), ParallelContext.single(), 'a job'); {how}"
    )
    return subprocess.run([sys.executable, "-c", text, directory], check=False, timeout=60).returncode


def test_a_dead_owner_is_taken_over_with_a_note_and_an_orderly_end_leaves_none(tmp_path):
    assert hold_elsewhere(tmp_path) == -9
    said = json.loads((tmp_path / ".lock").read_text())
    held = claim_log(tmp_path, SINGLE)
    assert held.note == (
        f"log.dir={tmp_path} was left behind by process {said['pid']} on {said['host']} (since {said['since']}), which has ended; this "
        "run has taken it over"
    )
    held.release()
    assert (tmp_path / ".lock").read_text() == ""
    assert claim_log(tmp_path, SINGLE).note == ""


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A directory with two files that a live process holds, as far as its lock file and the system tell."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    text = json.dumps({"host": "here", "machine": own().machine, "pid": 1, "born": "0", "since": "today", "job": "first"})
    (tmp_path / ".lock").write_text(text)
    lock = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(claims, "_LEAVING_SECONDS", 0.01)
    yield tmp_path
    os.close(lock)


def test_a_live_owner_refuses_on_every_rank_and_nothing_is_touched(live):
    before = {path.name: path.read_bytes() for path in live.iterdir()}

    def attempt(ctx):
        with pytest.raises(CheckpointError) as caught:
            claim_log(live, ctx)
        return str(caught.value)

    refusal = (
        f"another run keeps its log in log.dir={live}: process 1 on here (since today). Wait for it or stop it, or set log.dir to another "
        "directory."
    )
    assert simulate(2, attempt) == [f"rank 0: {refusal}"] * 2
    assert {path.name: path.read_bytes() for path in live.iterdir()} == before
    assert taken(live, "log.dir", "second") == refusal
    assert taken(live, "log.dir", "first") == ""  # this very job, some of whose workers live


def test_what_nobody_holds_is_not_taken(tmp_path):
    assert taken(tmp_path, "log.dir", "") == taken(tmp_path / "nowhere", "log.dir", "") == ""
    claim(tmp_path, SINGLE).release()
    assert taken(tmp_path, "log.dir", "") == ""


def test_without_locks_of_the_file_system_a_live_process_of_this_machine_is_known(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    parent = claims.Owner.of(os.getppid())
    said = {"host": "here", "since": "today", "machine": parent.machine, "pid": parent.pid, "born": parent.born}
    (tmp_path / ".lock").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=f"another run saves in checkpoint.dir=.*: process {parent.pid} on here"):
        claim(tmp_path, SINGLE)
    (tmp_path / ".lock").write_text(json.dumps(said | {"born": "1"}))  # another process of that number, long ago
    held = claim(tmp_path, SINGLE)
    assert f"left behind by process {parent.pid} on here" in held.note
    held.release()


def test_a_directory_that_was_removed_is_taken_again_unless_another_run_was_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_LEAVING_SECONDS", 0.01)
    folder = tmp_path / "run"
    held = claim_log(folder, SINGLE)
    held.hold()
    first = json.loads((folder / ".lock").read_text())
    shutil.rmtree(folder)
    assert held.lost() == ""
    with monkeypatch.context() as patch:  # a disk that does not answer for a moment
        patch.setattr(os.path, "samestat", lambda *files: False)
        held.hold()
    again = json.loads((folder / ".lock").read_text())
    assert again["pid"] == first["pid"] and again["mark"] != first["mark"] and taken(folder, "log.dir", "other") != ""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".lock").write_text(json.dumps({"host": "there", "pid": 7, "since": "now"}))
    lock = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert held.lost().startswith(f"another run keeps its log in log.dir={folder}: process 7 on there (since now).")
    os.close(lock)
    held.release()
    claim_log(folder, SINGLE).release()


ENDLESS = '{"machine": "m", "pid": 1e999, "born": ""}'


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[1]", '{"pid": "x"}', '{"machine": "m", "pid": null, "born": ""}', "[" * 4000, ENDLESS]
)
def test_a_lock_file_with_any_text_is_no_obstacle(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    held = claim(tmp_path, SINGLE)
    assert held.note == ""
    held.release()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path, victim: path.symlink_to(victim), "a link, to {victim}"),
        (lambda path, victim: path.symlink_to(victim.with_name("nowhere")), "a link, to {nowhere}"),
        (lambda path, victim: os.mkfifo(path), "no plain file"),
        (lambda path, victim: path.mkdir(), "no plain file"),
    ],
    ids=["link", "dangling", "fifo", "folder"],
)
@pytest.mark.parametrize("key", ["checkpoint.dir", "log.dir"])
def test_nothing_is_written_through_a_link_in_the_place_of_the_lock_file(tmp_path, make, what, key):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    make(folder / ".lock", victim)
    what = what.format(victim=victim, nowhere=tmp_path / "nowhere")
    assert taken(folder, key, "") == ""
    with pytest.raises(CheckpointError) as caught:
        (claim if key == "checkpoint.dir" else claim_log)(folder, SINGLE)
    assert str(caught.value).startswith(
        f"{key}={folder} cannot be written ({folder}/.lock is {what}, and a run writes there alone what is its own. Move it away). Set"
    )
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_hard_link_to_a_foreign_file_is_left_as_it_is_and_one_to_a_lock_is_taken(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_text("precious")
    (folder / ".lock").hardlink_to(victim)
    with pytest.raises(
        CheckpointError, match=r"run/\.lock is a hard link to a file that is no run's lock\. Move it away\)\. Set log\.dir"
    ):
        claim_log(folder, SINGLE)
    assert victim.read_text() == "precious"
    victim.write_text(json.dumps({"host": "here", "pid": 1}))  # of a copy of the directory, made of hard links
    claim_log(folder, SINGLE).release()
