"""The request to stop: what each signal does at the start, while training and at the end, whatever the main thread does."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatrain.lifecycle.stop import PREEMPTED, SIGNALS, StopRequest, is_stopping, write_marker
from megatrain.runtime.launch import Launch

TORCHRUN = Launch(launcher="torchrun", job="a job", restart_count=1)
PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from megatrain.runtime.launch import Launch
from megatrain.lifecycle.stop import StopRequest
with StopRequest(Path(sys.argv[1]), Launch(job="a job")) as stop:
    if sys.argv[2] == "training":
        stop.started()
    print("ready", flush=True)
    if sys.argv[2] == "starting":
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # waits in C for ever: no handler in Python is run
    time.sleep(float(sys.argv[3]))
    print(stop.signal.name, flush=True)
"""


def start(marker, phase, seconds=60.0):
    """The program, which stays in its phase for some seconds."""
    command = [sys.executable, "-c", PROGRAM, str(marker), phase, str(seconds)]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def heard(stop, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not stop and time.monotonic() < deadline:
        time.sleep(0.005)
    return stop.signal


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_while_training_it_is_remembered(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        with stop:  # the command listens, and so does the loop
            assert not stop
            os.kill(os.getpid(), number)
            assert heard(stop) == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number and signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda number: number.name)
def test_before_the_first_step_it_ends_at_once(tmp_path, number):
    """Also while the main thread waits in C, as it does for ranks that do not come."""
    marker = tmp_path / "run" / PREEMPTED
    process = start(marker, "starting")
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 75, said
    assert said == f"megatrain: {number.name} came before the first step: nothing is to be saved; the same command goes on\n"
    record = json.loads(marker.read_text())
    assert (record["why"], record["step"], record["job"]) == (number.name, None, "a job")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR2", 75)])
def test_a_launcher_may_mean_that_another_worker_failed(tmp_path, name, code):
    """Its SIGTERM at the start is no request: a job that fails must not look like one that was told to stop."""
    program = PROGRAM.replace('Launch(job="a job")', 'Launch(job="a job", launcher="srun")')
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / PREEMPTED), "starting"], stdout=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[name])
    process.communicate(timeout=10)
    assert process.returncode == code and (tmp_path / PREEMPTED).exists() == (code == 75)


def test_interrupted_twice_it_ends_at_once(tmp_path):
    """Twice at once is the terminal and the launcher; twice in a while is a person who does not want to wait."""
    process = start(tmp_path / PREEMPTED, "training")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(3.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and "the last checkpoint holds" in said


def test_a_remembered_signal_waits_for_the_main_thread(tmp_path):
    process = start(tmp_path / PREEMPTED, "training", seconds=0.5)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=20)[0] == "SIGUSR2\n" and not (tmp_path / PREEMPTED).exists()


def test_a_process_that_ends_is_deaf():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with StopRequest() as stop:
            stop.ignore()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop and signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else before)


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert heard(stop, 0.2) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_held_across_exec_are_not_lost(tmp_path):
    code = (
        "import os, signal, sys; from megatrain.lifecycle.stop import hold_signals; hold_signals(); "
        "os.kill(os.getpid(), signal.SIGUSR2); os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, PROGRAM, str(tmp_path / PREEMPTED), "starting"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 75 and "SIGUSR2 came before the first step" in done.stderr


@pytest.mark.parametrize("broken", ["written", "made"])
def test_a_marker_that_cannot_be_written_changes_no_end(tmp_path, monkeypatch, capfd, broken):
    """As on a full disk: neither where the file is nor where its directory would be."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text" if broken == "written" else "mkdir", Mock(side_effect=full))
    marker = tmp_path / PREEMPTED
    write_marker(marker, TORCHRUN, "SIGTERM", 7)
    said = f"warning: {marker} could not be written (No space left on device); the exit code holds without it\n"
    assert capfd.readouterr().err == said and list(tmp_path.iterdir()) == []


def test_a_worker_of_a_stopping_job_is_told_from_others(tmp_path):
    marker = tmp_path / PREEMPTED
    assert not is_stopping(marker, TORCHRUN)
    marker.write_text("")  # of another program, or cut off
    assert not is_stopping(marker, TORCHRUN)
    write_marker(marker, TORCHRUN, "SIGTERM", 7)
    assert is_stopping(marker, TORCHRUN)
    assert not is_stopping(marker, Launch(launcher="torchrun", job="a job"))  # its first start
    assert not is_stopping(marker, Launch(launcher="torchrun", job="another", restart_count=1))
    assert not is_stopping(marker, Launch(launcher="srun", job="a job", restart_count=1))  # put back into the queue: goes on
