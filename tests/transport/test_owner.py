"""A process is told from a later one of the same number, and from one of another machine."""

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatrain.transport.owner import Owner, own, process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")


def test_the_condition_of_a_process():
    me = own()
    assert me == Owner.of(os.getpid()) and me.condition() == "running"
    assert replace(me, born=str(int(me.born) - 1)).condition() == "gone"
    assert replace(me, machine="another").condition() == replace(me, born="").condition() == "elsewhere"
    with subprocess.Popen(["sleep", "60"]) as child:
        sleeping = Owner.of(child.pid)
        child.send_signal(signal.SIGSTOP)
        while process(child.pid)[0] != "T":
            pass
        assert sleeping.condition() == "stopped"
        child.kill()
        child.wait()
    assert sleeping.condition() == "gone" and process(child.pid) == ("", "")


def test_a_process_may_have_any_name():
    libc, set_name = ctypes.CDLL(None), 15
    before = Path("/proc/self/comm").read_bytes().strip()
    libc.prctl(set_name, b"\xff) \xe9\x1b", 0, 0, 0)
    try:
        assert process(os.getpid())[0] in "RS" and own().condition() == "running"
    finally:
        libc.prctl(set_name, before, 0, 0, 0)
