"""Forked processes behave as started ones: words, environment, output, exit code, signals."""

import os
import signal
import subprocess
from pathlib import Path

import jobs
import pytest
from forked import Forked

pytestmark = pytest.mark.skipif(not jobs.FORKS, reason="processes are started here")

SCRIPT = """
import os, sys, time
print(sorted(name for name in ("torch", "megatrain.program") if name in sys.modules), sys.argv[1:], os.environ["WHO"], os.getcwd())
print("to stderr", file=sys.stderr)
if sys.argv[1] == "wait":
    time.sleep(60)
sys.exit(7)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def started(word):
        env = {**jobs.environment(), "WHO": word.upper()}
        return Forked([str(tmp_path / "script.py"), word], env, tmp_path / f"{word}.out", tmp_path / f"{word}.err")

    return started


def test_words_environment_output_and_exit_code(start, tmp_path):
    first, second = start("first"), start("second")
    assert (first.wait(30), second.wait(30)) == (7, 7)
    assert first.poll() == 7 and first.pid != second.pid
    said = f"['megatrain.program', 'torch'] ['first'] FIRST {Path.cwd()}\n"
    assert (tmp_path / "first.out").read_text() == said
    assert (tmp_path / "second.out").read_text() == said.replace("first", "second").replace("FIRST", "SECOND")
    assert (tmp_path / "first.err").read_text() == "to stderr\n"


def test_signals_reach_it_and_are_its_exit_code(start):
    process = start("wait")
    assert process.poll() is None and os.getpgid(process.pid) == process.pid
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    process.kill()  # of a process that is over: nothing


def test_it_is_the_command(tmp_path):
    with jobs.start(tmp_path, [str(tmp_path / "none.yaml")]) as job:
        (ended,) = job.finish()
    assert (ended.code, ended.out) == (1, "") and "none.yaml: no such file" in ended.err
