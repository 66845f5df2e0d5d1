"""Words that nobody takes: they are on offer, and the process goes on."""

import os
import subprocess
import sys
import time

import jobs

PROGRAM = """
import sys, time
from megatrain.stderr import note, say
began = time.monotonic()
say("told: ä", float(sys.argv[1]))
took = time.monotonic() - began
if sys.argv[2] == "note":
    note("noted \\x1b[2J")
print(took < 5.0, flush=True)
sys.stdin.readline()
sys.exit(76)
"""


def start(seconds, stderr, more=""):
    words = [sys.executable, "-c", PROGRAM, str(seconds), more]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)


def test_lines_are_written_before_it_goes_on():
    with start(100, subprocess.PIPE, "note") as process:
        assert process.communicate(b"\n", timeout=30) == (b"True\n", "told: ä\nnoted \\x1b[2J\n".encode())
        assert process.returncode == 76


def test_a_pipe_that_is_full_keeps_nobody_and_gets_the_words_later():
    ours, theirs = jobs.full_pipe()
    with start(0.1, theirs) as process:
        os.close(theirs)
        assert process.stdout.readline() == b"True\n"
        said, until = b"", time.monotonic() + 20
        while b"told" not in said and time.monotonic() < until:
            said += os.read(ours, 1 << 16)
        os.close(ours)
        assert said.lstrip(b".").startswith(b"told")
        process.communicate(b"\n", timeout=30)
        assert process.returncode == 76


def test_a_pipe_whose_reader_has_gone_is_no_error_and_changes_no_exit_code():
    ours, theirs = os.pipe()
    os.close(ours)
    with start(100, theirs, "note") as process:
        os.close(theirs)
        assert process.communicate(b"\n", timeout=30)[0] == b"True\n"
        assert process.returncode == 76
