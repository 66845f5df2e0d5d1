"""Shared memory of dead processes is found by its name and removed; nobody else's is touched."""

import os
import subprocess
import sys

import pytest

from megatrain.transport import leftovers
from megatrain.transport.leftovers import name_of, remove_leftovers
from megatrain.transport.owner import Owner, own

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")


@pytest.fixture
def dead():
    """A process that has ended."""
    with subprocess.Popen(["sleep", "60"]) as child:
        owner = Owner.of(child.pid)
        child.kill()
    return owner


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path, dead, monkeypatch):
    numbering, reborn = leftovers._numbering(), Owner(own().machine, os.getpid(), str(int(own().born) - 5))
    (tmp_path / name_of(dead, "abc-0")).write_bytes(bytes(3 << 19))
    (tmp_path / name_of(reborn, "abc-1")).write_bytes(bytes(1 << 19))  # its number is another process's by now
    copy = tmp_path / name_of(dead, "copy")
    (copy / "step_00000001").mkdir(parents=True)
    (copy / "step_00000001/weights.safetensors").write_bytes(bytes(1 << 20))
    others = {
        name_of(own(), "abc-2"),
        f"megatrain-{numbering}1-{dead.pid}-{dead.born}-abc-3",  # another container's
        f"megatrain-{dead.pid}-{dead.born}",
        "megatrain-0123456789abcdef0123456789abcdef-0",
        f"sem.megatrain-{numbering}-{dead.pid}-{dead.born}-x",
    }
    for name in others:
        (tmp_path / name).write_text("")
    assert remove_leftovers(tmp_path) == f"{tmp_path} held 3.0 MiB of 3 dead processes' shared memory; it is removed"
    assert {path.name for path in tmp_path.iterdir()} == others
    assert remove_leftovers(tmp_path) == remove_leftovers(tmp_path / "nowhere") == ""
    (tmp_path / name_of(dead, "abc-4")).write_text("")
    monkeypatch.setattr(leftovers.os, "getuid", lambda: os.geteuid() + 1)
    assert remove_leftovers(tmp_path) == ""  # another user's


KILLED = """
import os, sys
from megatrain.transport import leftovers
from megatrain.transport.owner import own
from megatrain.transport.shared_memory import SharedSlots
from pathlib import Path
leftovers.FOLDER = Path(sys.argv[1])
SharedSlots.create(leftovers.name_of(own(), "abc"), 0, 2)
os.kill(os.getpid(), 9)
"""


def test_a_kill_between_making_and_mapping_the_files_leaves_one_that_the_next_start_removes(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False, timeout=60).returncode == -9
    [left] = tmp_path.iterdir()
    assert left.stat().st_size >= 32 << 20
    assert remove_leftovers(tmp_path).startswith(f"{tmp_path} held 32.0 MiB of 1 dead processes'")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_itself_and_not_what_it_leads_to(tmp_path, dead):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/file").write_text("mine")
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / name_of(dead, "link")).symlink_to(tmp_path / "home")
    assert remove_leftovers(tmp_path / "shm") != ""
    assert (tmp_path / "home/file").read_text() == "mine" and list((tmp_path / "shm").iterdir()) == []


def test_what_another_user_may_have_made_or_can_write_to_is_not_private(tmp_path, monkeypatch):
    own, open_to_all, link = tmp_path / "own", tmp_path / "open", tmp_path / "link"
    own.mkdir(mode=0o700)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link.symlink_to(own)
    (tmp_path / "file").touch(mode=0o600)
    found = {name: leftovers.is_private(tmp_path / name) for name in ("own", "open", "link", "file", "none")}
    assert found == {"own": True, "open": False, "link": False, "file": False, "none": False}
    leftovers.require_private(own)
    monkeypatch.setattr(leftovers.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(
        OSError, match=r"/own is no folder of this user's alone, so that others could read or change what it holds"
    ):
        leftovers.require_private(own)
