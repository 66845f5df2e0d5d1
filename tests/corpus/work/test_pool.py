"""Workers never outlive what they are for: their pool, and the work."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from megatrain.corpus.work import pool
from megatrain.corpus.work.pool import PoolError, run_workers

WORKER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from megatrain.corpus.work.pool import ending_in_order
    here = Path(sys.argv[1])
    with ending_in_order():
        try:
            (here / "begun").touch()
            time.sleep(60)
        finally:
            (here / "left").touch()
    """
)


def wait_for(what):
    deadline = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)]


def test_a_pool_that_is_killed_takes_its_workers_with_it(worker, tmp_path):
    program = f"from megatrain.corpus.work.pool import run_workers\nrun_workers({worker!r}, 1, lambda: None)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        wait_for((tmp_path / "begun").exists)
        (child,) = psutil.Process(process.pid).children()
        process.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert (tmp_path / "left").exists()


def test_a_pool_that_is_told_to_stop_ends_its_workers_in_order(worker, tmp_path):
    program = f"from megatrain.corpus.work.pool import run_workers\nrun_workers({worker!r}, 1, lambda: None)"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        wait_for((tmp_path / "begun").exists)
        process.terminate()
        assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert (tmp_path / "left").exists()


def test_a_worker_that_is_told_to_end_is_replaced(tmp_path, worker, capfd):
    def look():
        if (tmp_path / "left").exists():
            raise TimeoutError
        for child in psutil.Process().children() if (tmp_path / "begun").exists() else ():
            child.terminate()

    with pytest.raises(TimeoutError):
        run_workers(worker, 1, look)
    (tmp_path / "worker.py").write_text("import sys; sys.exit(143)")
    with pytest.raises(PoolError, match="11 workers were ended by a signal, the last by SIGTERM"):
        run_workers(worker, 1, lambda: None)
    assert "was ended by SIGTERM; another takes its place" in capfd.readouterr().err


def test_when_one_has_done_all_another_that_is_held_does_not_hold_up_the_pool(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.5)
    (tmp_path / "worker.py").write_text(
        "import os, signal, sys\nfrom pathlib import Path\n"
        "try:\n    os.mkdir(sys.argv[1])\nexcept FileExistsError:\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    run_workers([sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "one")], 2, lambda: None)
    assert "all is done, and 1 workers do not end; they are ended" in capfd.readouterr().err


def test_elsewhere_nothing_is_sent_and_afterwards_all_is_as_before(monkeypatch):
    monkeypatch.setenv(pool.POOL, str(os.getpid()))  # of a process that has not started this one
    before = signal.getsignal(signal.SIGTERM)
    with pool.ending_in_order(), pytest.raises(SystemExit, match="143"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before
