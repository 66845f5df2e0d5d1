"""One worker gets a lease; one that is dead or silent loses it; a chore that loses worker after worker is at fault."""

import json
import os
import subprocess
import sys
import time

import pytest

from megatrain.corpus.work import leases
from megatrain.corpus.work.leases import Leases, LostWorkersError, OtherWorkError, Sign


@pytest.fixture
def held(tmp_path):
    return Leases(tmp_path, 60.0)


def put(folder, name, age=0.0, **about):
    path = folder / name
    path.write_text(json.dumps({"host": "elsewhere", "process": 7, "born": 0.0, "done": 0, **about}))
    os.utime(path, (time.time() - age,) * 2)


def test_one_worker_gets_a_lease_and_gives_it_back(held, tmp_path):
    with held.held("read.unit_0", None) as lease:
        assert lease is not None
        lease.progress(70)
        with Leases(tmp_path, 60.0).held("read.unit_0", None) as second:
            assert second is None
        sign = held.signs()["read.unit_0"]
        assert (sign.number, sign.process, sign.left) == (1, os.getpid(), False)
    assert held.signs() == {}
    held.leave()
    assert list(tmp_path.iterdir()) == []


def test_signs_of_life_say_how_much_is_done(held, monkeypatch):
    monkeypatch.setattr(leases, "SIGN_SECONDS", 0.01)
    with held.held("a", None) as lease:
        lease.progress(70)
        deadline = time.monotonic() + 10
        while held.signs()["a"].done != 70:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_silence_and_death_leave_a_lease(held, tmp_path):
    put(tmp_path, "silent.1", age=61.0)
    put(tmp_path, "silent.2", age=59.0)
    put(tmp_path, "old.1", age=61.0)
    put(tmp_path, "dead.1", host=leases.socket.gethostname(), process=os.getpid(), born=5.0)
    (tmp_path / "begun.3").touch()
    signs = held.signs()
    assert {name: (sign.number, sign.left) for name, sign in signs.items()} == {
        "silent": (2, False),
        "old": (1, True),
        "dead": (1, True),
        "begun": (3, False),
    }
    with held.held("old", signs["old"]) as lease:
        assert lease is not None and (tmp_path / "old.2").exists()
    held.forget("old")
    assert not list(tmp_path.glob("old.*"))


def test_a_task_that_costs_too_many_workers_is_at_fault(held):
    lost, sign = r"unit_3: 4 workers were lost at it, the last was process 7 on far", Sign(4, 61.0, "far", 7, 0.0, 0)
    with pytest.raises(LostWorkersError, match=lost), held.held("unit_3", sign):
        pass
    with (
        pytest.raises(LostWorkersError, match=r"unit_3 \(raw/a\.jsonl\): 4 workers"),
        held.held("unit_3", sign, about="raw/a.jsonl"),
    ):
        pass


def test_a_process_that_does_not_move_ends_itself(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom megatrain.corpus.work import leases\nleases.SIGN_SECONDS = 0.05\n"
        "with leases.Leases(Path(sys.argv[1]), 0.2).held('unit_3', None):\n    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == leases.STUCK
    assert "unit_3 has not moved for 0.2 s" in done.stderr and "time.sleep(60)" not in done.stdout
    assert 'File "<string>", line 6' in done.stderr


def test_a_chore_that_cannot_say_how_far_it_is_may_be_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SIGN_SECONDS", 0.01)
    with Leases(tmp_path, 0.02).held("report.all", None, steady=False) as lease:
        time.sleep(0.2)  # a steady one has ended this process by now
        assert lease is not None


def test_process_numbers_of_another_container_say_nothing(held, tmp_path):
    put(tmp_path, "same.1", host=leases.socket.gethostname(), process=os.getpid(), born=5.0)
    put(tmp_path, "other.1", host=leases.socket.gethostname(), process=os.getpid(), born=5.0, space="pid:[1]")
    assert {name: sign.left for name, sign in held.signs().items()} == {"same": True, "other": False}


def test_a_new_run_forgives_what_was_left(held, tmp_path):
    put(tmp_path, "lost.1", age=61.0)
    put(tmp_path, "lost.2", age=61.0)
    put(tmp_path, "at_work.1", age=61.0)
    put(tmp_path, "at_work.2")
    held.forgive()
    held.leave()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at_work.1", "at_work.2"]


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    put(tmp_path, "a.1", run="5", process=70)
    put(tmp_path, "b.1", run="1", age=61.0)
    for run, first, fine in [
        ("5", True, True),
        ("9", True, False),
        ("9", False, False),
        ("3", True, False),
        ("3", False, True),
    ]:
        own = Leases(tmp_path, 60.0, run)
        if fine:
            own.require_alone(own.signs().values(), first=first)
        else:
            with pytest.raises(
                OtherWorkError, match=r"is being worked at for another config, .* process 70 on elsewhere\. Wait"
            ):
                own.require_alone(own.signs().values(), first=first)


@pytest.mark.parametrize(
    "text", ["[]", "7", "[" * 4000, "9" * 4000, "x" * 5000, '{"process": "7"}', '{"more": 1}', '{"born": 1}']
)
def test_what_is_no_lease_says_nothing_and_grows_old(held, tmp_path, text):
    (tmp_path / "a.1").write_text(text)
    os.utime(tmp_path / "a.1", (time.time() - 61.0,) * 2)
    assert (held.signs()["a"].number, held.signs()["a"].host, held.signs()["a"].left) == (1, "", True)


def test_a_pipe_a_link_and_a_number_that_no_worker_has_reached_are_no_leases(held, tmp_path):
    os.mkfifo(tmp_path / "a.1")
    (tmp_path / "b.1").symlink_to("/dev/zero")
    put(tmp_path, "c.9999999999")
    put(tmp_path, "d.1", host=leases.socket.gethostname(), process=-7)
    put(tmp_path, "e.1", host=leases.socket.gethostname(), process=10**30)
    signs = held.signs()
    assert {name: sign.host for name, sign in signs.items() if name in "abc"} == {"a": "", "b": ""}
    assert signs["d"].left and signs["e"].left
    held.forgive()
