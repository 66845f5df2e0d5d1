"""Workers share the chores of phases, and take over those of lost ones: the result does not say who did what."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatrain.corpus.work.chores import Chore, Phase, Published
from megatrain.corpus.work.pool import PoolError, run_workers
from megatrain.corpus.work.shift import work_on

PROGRAM = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from megatrain.corpus.work import leases
    from megatrain.corpus.work.chores import Published, Phase, Chore
    from megatrain.corpus.work.shift import work_on

    root, fault = Path(sys.argv[1]), sys.argv[2]
    leases.STALE_SECONDS = 3.0
    published = Published(root / "work")

    def run(name):
        def chore(folder, progress):
            with (root / "begun.txt").open("a") as file:
                file.write(f"{name} {os.getpid()}\\n")
            time.sleep(0.05)
            if fault == name:
                raise ValueError(f"{name} is bad")
            (folder / "out.txt").write_text(name)
            progress(1)
            return {"name": name}
        return chore

    first = Phase("first", "1" * 16, [Chore(f"unit_{i}", 1, run(f"first_{i}")) for i in range(8)])
    def merge(folder, progress):
        (folder / "all.txt").write_text(" ".join(published.file(first, chore.name, "out.txt").read_text() for chore in first.chores))
        return {}
    second = Phase("second", "2" * 16, [Chore("all", 1, merge)])
    work_on([first, second], published, 60.0)
    """
)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def result(root):
    return (root / "work" / f"second-{'2' * 12}/all/all.txt").read_text()


ALL = " ".join(f"first_{i}" for i in range(8))


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_workers_does_each_task_once(program, tmp_path, count):
    run_workers([sys.executable, str(program), str(tmp_path), ""], count, lambda: None)
    assert result(tmp_path) == ALL
    begun = (tmp_path / "begun.txt").read_text().splitlines()
    assert sorted(line.split()[0] for line in begun) == ALL.split()
    assert list((tmp_path / "work/leases").iterdir()) == []


def test_a_killed_worker_costs_the_task_that_it_was_at(program, tmp_path):
    killed = []

    def kill():
        begun = (tmp_path / "begun.txt").read_text().splitlines() if (tmp_path / "begun.txt").exists() else []
        if len(begun) >= 3 * (len(killed) + 1) and len(killed) < 2:
            os.kill(int(begun[-1].split()[1]), signal.SIGKILL)
            killed.append(begun[-1])

    run_workers([sys.executable, str(program), str(tmp_path), ""], 1, kill)
    assert result(tmp_path) == ALL and len(killed) == 2
    assert len((tmp_path / "begun.txt").read_text().splitlines()) <= 8 + 2


def test_a_frozen_worker_is_passed_by(program, tmp_path):
    words = [sys.executable, str(program), str(tmp_path), ""]
    with subprocess.Popen(words) as frozen:
        while not (tmp_path / "begun.txt").exists():
            time.sleep(0.01)
        frozen.send_signal(signal.SIGSTOP)
        try:
            subprocess.run(words, timeout=60, check=True)
            assert result(tmp_path) == ALL
        finally:
            frozen.send_signal(signal.SIGCONT)
        assert frozen.wait(30) == 0
    assert result(tmp_path) == ALL


def test_a_worker_that_fails_ends_all(program, tmp_path, capfd):
    with pytest.raises(PoolError, match=r"worker \d+ failed \(exit code 1\); what it said stands above"):
        run_workers([sys.executable, str(program), str(tmp_path), "first_3"], 2, lambda: None)
    assert "first_3 is bad" in capfd.readouterr().err


def test_in_this_process(tmp_path):
    def run(folder, progress):
        progress(1)
        return {"bytes": 3}

    published, phase = Published(tmp_path), Phase("one", "3" * 16, [Chore("only", 1, run)])
    work_on([phase], published, 60.0)
    assert published.facts(phase, "only") == {"bytes": 3}
